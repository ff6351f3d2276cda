"""index.json: what a results folder holds, from which settings, and whether it is finished.

While a run goes on, it lags behind the entries beside the shards (`entries.py`). It is replaced as a whole and carries
a checksum of itself, so that what is read is what was written.

Versions of what the numbers depend on, told without importing any of it.

The entry of a stored shard, in a small file beside it: shards/shard-00000.json, until the run is finished.

A shard counts as stored once its entry stands there, which is the last of its files to get its name. So processes that
fill one folder have no file in common that they would have to write, and storing a shard costs the same however many
there are; index.json takes the entries in now and then, and all of them at the end, when these files go.
"""

import hashlib
import json
import platform
import re
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import readable_write_errors, replacing
from fisher_vmap.results.table import ShardLayout

PACKAGES = ("fisher_vmap", "torch", "transformers", "numpy", "safetensors", "pyarrow", "datasets")


def installed_versions() -> dict[str, str]:
    """Package name -> version, of those that are installed; "python" too."""
    found = {"python": platform.python_version()}
    found.update((package, number) for package in PACKAGES if (number := _version(package)) is not None)
    return found


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


SHARD_FOLDER = "shards"

_ENTRY_NAME = re.compile(r"shard-(\d{5,})\.json")


class Stored(BaseModel):
    """What is kept as JSON: unchangeable, of exactly these fields and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardEntry(Stored):
    """One finished shard: its prompts [start, stop), and its two files with their SHA-256 and sizes in bytes."""

    number: NonNegativeInt
    start: NonNegativeInt
    stop: PositiveInt
    file: str
    sha256: str
    bytes: NonNegativeInt
    table: str
    table_sha256: str
    table_bytes: NonNegativeInt
    folded: bool = False
    """Its arrays are in the running sum, and their file is gone; its rows of the table are there."""

    @model_validator(mode="after")
    def _plain_names(self) -> Self:
        # The names follow from the number, so no index can point outside shards/.
        if (self.file, self.table) != shard_names(self.number):
            raise ValueError(f"shard {self.number} has file names {self.file!r} and {self.table!r}")
        if self.start >= self.stop:
            raise ValueError(f"shard {self.number} has the prompts [{self.start}, {self.stop})")
        return self


def shard_names(number: int) -> tuple[str, str]:
    """File names of a shard's tensors and of its rows of the prompts table, inside shards/."""
    return f"shard-{number:05d}.safetensors", f"shard-{number:05d}.parquet"


def entry_name(number: int) -> str:
    """File name of a shard's entry, inside shards/."""
    return f"shard-{number:05d}.json"


def write_entry(folder: Path, entry: ShardEntry, mark: str) -> None:
    """Let a shard count as stored, for the run of this mark alone (`Index.mark`); its files have their names already.

    Raises:
        UserError: the folder cannot be written.
    """
    with replacing(folder / SHARD_FOLDER / entry_name(entry.number)) as file:
        file.write(json.dumps({"run": mark, **entry.model_dump()}).encode())


def read_entry(folder: Path, number: int, mark: str) -> ShardEntry | None:
    """The entry of a shard, or None: there is none, it is of another run, or it is damaged."""
    try:
        values = json.loads((folder / SHARD_FOLDER / entry_name(number)).read_bytes())
        if not isinstance(values, dict) or values.pop("run", None) != mark:
            return None
        entry = ShardEntry.model_validate(values)
    except (OSError, ValueError):  # ValidationError is a ValueError: what cannot be read is computed again
        return None
    return entry if entry.number == number else None


def read_entries(folder: Path, mark: str) -> list[ShardEntry]:
    """The entries that stand beside the shards of the run of this mark, in order."""
    try:
        names = [path.name for path in (folder / SHARD_FOLDER).iterdir()]
    except OSError:
        return []
    numbers = sorted(int(match[1]) for name in names if (match := _ENTRY_NAME.fullmatch(name)))
    return [entry for number in numbers if (entry := read_entry(folder, number, mark)) is not None]


def remove_entries(folder: Path, numbers: list[int]) -> None:
    """Remove the entries of these shards, where there are any.

    Raises:
        UserError: one cannot be removed.
    """
    with readable_write_errors(folder):
        for number in numbers:
            with suppress(FileNotFoundError):
                (folder / SHARD_FOLDER / entry_name(number)).unlink()


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
