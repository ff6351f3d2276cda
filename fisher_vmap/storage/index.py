"""index.json: what a results folder holds, from which settings, and whether it is finished.

While a run goes on, it lags behind the entries beside the shards (`entries.py`). It is replaced as a whole and carries
a checksum of itself, so that what is read is what was written.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import replacing
from fisher_vmap.storage.entries import ShardEntry, Stored, read_entries
from fisher_vmap.storage.records import ShardLayout

INDEX_NAME = "index.json"
TABLE_NAME = "prompts.parquet"
MEAN_NAME = "mean.safetensors"
METADATA_NAME = "metadata.yaml"

_NO_CHECKSUM = "0" * 64
_HEAD = re.compile(rb'\{\s*"checksum":\s*"([0-9a-f]{64})"')


def npz_name(layer: str, layers: Iterable[str]) -> str:
    """The npz of one layer: the plain name when it is the only layer."""
    return f"fisher_matrices_compressed{'' if len(list(layers)) == 1 else '.' + layer}.npz"


class FileEntry(Stored):
    """A file made from the shards at the end of a run; `tensors` holds the CRC-32 of each tensor in it."""

    sha256: str
    bytes: NonNegativeInt
    tensors: dict[str, int] = Field(default_factory=dict)


class SumEntry(FileEntry):
    """The running sum over the prompts of the folded shards: `prompts` counts those with numbers."""

    prompts: NonNegativeInt


class Index(Stored):
    """The contents of index.json."""

    checksum: str = _NO_CHECKSUM
    """SHA-256 of the file itself, with these 64 digits as zeros."""
    format: Literal["fisher_vmap results"] = "fisher_vmap results"
    version: Literal[1] = 1
    complete: bool = False
    """True only when every shard and every file made from them is there."""
    num_prompts: NonNegativeInt | None = None
    shard_size: PositiveInt
    layout: ShardLayout
    fingerprint: dict[str, Any]
    """Every setting that changes results."""
    resolved: dict[str, Any] | None = None
    """What was chosen automatically, such as the kernel's form for each layer and why; None until it is known."""
    versions: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, Any] | None = None
    """The settings of the run that filled the folder last, for whoever finishes it."""
    shards: tuple[ShardEntry, ...] = ()
    sum: SumEntry | None = None
    """Of the file `sum_name(folded)`, where shards have been folded into it."""
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.layout.check()
        numbers = [shard.number for shard in self.shards]
        if numbers != sorted(set(numbers)):
            raise ValueError("its shards are not in order")
        for shard in self.shards:
            first = shard.number * self.shard_size
            if shard.start != first or shard.stop > first + self.shard_size:
                raise ValueError(f"shard {shard.number} has the prompts [{shard.start}, {shard.stop})")
        folded = [shard.number for shard in self.shards if shard.folded]
        if len(folded) != self.folded or folded != list(range(self.folded)):
            raise ValueError("its folded shards are not its first ones")
        if (self.sum is not None) != (self.folded > 0) or (self.folded and not self.layout.means_only):
            raise ValueError("its folded shards and its sum do not belong together")
        if self.complete and (self.num_prompts != self.stop or self.missing(self.stop)):
            raise ValueError("it says complete, but shards are missing")
        allowed = {TABLE_NAME, MEAN_NAME, METADATA_NAME, *(npz_name(name, self.layout.widths) for name in self.layers)}
        if strange := set(self.files) - allowed:
            raise ValueError(f"it lists the file {min(strange)!r}")
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, in order."""
        return self.layout.layers

    @property
    def mark(self) -> str:
        """What the entries of this run's shards are marked with: another for other settings or shapes."""
        what = [self.shard_size, self.layout.model_dump(), self.fingerprint]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folded(self) -> int:
        """Number of shards that are in the running sum: the first ones, and full."""
        return bisect_left(self.shards, True, key=lambda shard: not shard.folded)

    @property
    def stop(self) -> int:
        """One more than the highest prompt index that is stored."""
        return self.shards[-1].stop if self.shards else 0

    def find(self, number: int) -> ShardEntry | None:
        """The entry of a shard, or None."""
        place = bisect_left(self.shards, number, key=lambda shard: shard.number)
        found = self.shards[place] if place < len(self.shards) else None
        return found if found is not None and found.number == number else None

    def missing(self, num_prompts: int) -> list[int]:
        """Numbers of the shards that prompts [0, num_prompts) need and that are absent or too short."""
        stops = {shard.number: shard.stop for shard in self.shards}
        needed = range(-(-num_prompts // self.shard_size))
        return [n for n in needed if stops.get(n, 0) < min((n + 1) * self.shard_size, num_prompts)]

    def with_shards(self, added: Iterable[ShardEntry] = (), removed: Iterable[int] = ()) -> "Index":
        """The index after shards came or went: unfinished, since the files made from them are out of date."""
        kept = {shard.number: shard for shard in self.shards}
        for number in removed:
            kept.pop(number, None)
        kept.update((shard.number, shard) for shard in added)
        shards = tuple(kept[number] for number in sorted(kept))
        return self.model_copy(update={"shards": shards, "complete": False, "files": {}})

    def expecting(self, num_prompts: int) -> "Index":
        """The index of a run of so many prompts, or of those stored if they are more: unfinished if any are missing."""
        total = max(num_prompts, self.stop)
        unfinished = {"complete": False, "files": {}} if self.missing(total) else {}
        return self.model_copy(update={"num_prompts": total, **unfinished})

    def with_entries(self, entries: Iterable[ShardEntry]) -> "Index":
        """The index with what stands beside the shards: the same one where it lists all of that already."""
        known = {shard.number: shard for shard in self.shards}

        def is_news(entry: ShardEntry) -> bool:
            first, listed = entry.number * self.shard_size, known.get(entry.number)
            fits = entry.start == first and entry.stop <= first + self.shard_size and not entry.folded
            return fits and listed != entry and not (listed is not None and listed.folded)

        news = [entry for entry in entries if is_news(entry)]
        return self.with_shards(news) if news else self

    def unfolded(self) -> "Index":
        """The index without its folded shards and their sum: all of them are to be computed again."""
        shards = tuple(shard for shard in self.shards if not shard.folded)
        return self.model_copy(update={"shards": shards, "sum": None, "complete": False, "files": {}})


def sum_name(folded: int) -> str:
    """File name of the running sum over the first `folded` shards: a new name each time, so that no old one is lost."""
    return f"sum-{folded:05d}.safetensors"


def write_index(folder: Path, index: Index) -> None:
    """Replace index.json."""
    text = index.model_copy(update={"checksum": _NO_CHECKSUM}).model_dump_json(indent=1).encode()
    digits = hashlib.sha256(text).hexdigest().encode()
    with replacing(folder / INDEX_NAME) as file:
        file.write(text.replace(_NO_CHECKSUM.encode(), digits, 1))


def is_index(folder: Path) -> bool:
    """Whether index.json is one of ours, be it damaged further on."""
    with open(folder / INDEX_NAME, "rb") as file:
        return _HEAD.match(file.read(200)) is not None


def read_index(folder: Path) -> Index:
    """Read and check index.json, and add what stands beside the shards of an unfinished run.

    Raises:
        UserError: as `read_index_file`.
    """
    index = read_index_file(folder)
    return index if index.complete else index.with_entries(read_entries(folder, index.mark))


def stored_precision(folder: Path) -> str | None:
    """What the run in a folder is computed in; None where there is none, or it cannot be read."""
    try:
        precision = read_index_file(folder).fingerprint.get("precision")
    except UserError:
        return None
    return precision if isinstance(precision, str) else None


def read_index_file(folder: Path) -> Index:
    """Read and check index.json alone.

    Raises:
        UserError: it is missing, damaged, changed by hand, or of a version that this package does not read.
    """
    path = folder / INDEX_NAME
    try:
        text = path.read_bytes()
    except OSError as error:
        reason = "it has no index.json" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
        raise UserError(f"{folder} is not a results folder: {reason}") from error
    match = _HEAD.match(text)
    if match is None:
        raise UserError(f"{path} is damaged, or of something else: it has no checksum; choose another --output_dir")
    if hashlib.sha256(text.replace(match[1], _NO_CHECKSUM.encode(), 1)).hexdigest().encode() != match[1]:
        raise UserError(f"{path} is damaged or was changed by hand (its checksum differs); --overwrite starts anew")
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A later version may differ in other places too, but only this one tells what to do.
        first = next((found for found in errors if found["loc"] == ("version",)), errors[0])
        if first["loc"] == ("version",):
            version = first["input"]
            raise UserError(
                f"{path} has format version {version}, this package reads 1; install a newer one"
            ) from error
        where = ".".join(map(str, first["loc"])) or "index"
        raise UserError(f"{path} is not valid: {where}: {first['msg']}; --overwrite starts anew") from error
