"""The contents of index.json: the run's settings, its shards, and whether the folder is finished.

Each shard of an unfinished run also has its own small entry file, shards/shard-00000.json. A shard counts as stored
once its entry file exists, which is the last of its files to be written. Processes that fill a folder together
therefore never write the same file for every shard. index.json takes the entries in from time to time. It is replaced
as a whole and holds a checksum of itself.
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
from fisher_vmap.results.files import readable_write_errors, replacing, sha256_of

INDEX_NAME = "index.json"
TABLE_NAME = "prompts.parquet"
MEAN_NAME = "mean.safetensors"
METADATA_NAME = "metadata.yaml"
SHARD_FOLDER = "shards"

PACKAGES = ("fisher_vmap", "torch", "transformers", "numpy", "safetensors", "pyarrow", "datasets")

# Columns that every prompts table has; a kept column may not take their names.
TABLE_COLUMNS = (
    *("prompt_index", "source_row", "text", "status", "reason", "audit", "tokens", "truncated", "mass", "crc32"),
    *("top_tokens", "prompt_tokens", "top_probability"),
)

# Fields of `ShardLayout` that folders made before do not have; where they say "not there", the mark leaves them out.
_LATER = ("pairs", "attribution", "median_norm")

_ENTRY_NAME = re.compile(r"shard-(\d{5,})\.json")
_NO_CHECKSUM = "0" * 64
_HEAD = re.compile(rb'\{\s*"checksum":\s*"([0-9a-f]{64})"')


def shard_names(number: int) -> tuple[str, str]:
    """File names of a shard's tensors and of its rows of the prompts table, inside shards/."""
    return f"shard-{number:05d}.safetensors", f"shard-{number:05d}.parquet"


def entry_name(number: int) -> str:
    """File name of a shard's entry, inside shards/."""
    return f"shard-{number:05d}.json"


def npz_name(layer: str, layers: Iterable[str]) -> str:
    """The npz of one layer: the plain name when it is the only layer."""
    return f"fisher_matrices_compressed{'' if len(list(layers)) == 1 else '.' + layer}.npz"


def sum_name(folded: int) -> str:
    """File name of the sum over the first `folded` shards. Each sum has a new name, so the old one stays valid."""
    return f"sum-{folded:05d}.safetensors"


class Stored(BaseModel):
    """A record that is kept as JSON: frozen, with exactly these fields and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardLayout(Stored):
    """The shapes and types of a run's arrays, the same for every shard."""

    widths: dict[str, PositiveInt]
    """Layer name -> D, in the order of the layers."""
    top_k: PositiveInt
    """K."""
    rank: PositiveInt
    """R; matrices of lower rank are filled with zeros."""
    include_rest: bool = False
    """Whether "any other token" is one more outcome, the last, with token id -1."""
    pairs: NonNegativeInt = 0
    """How many (target, token) pairs a prompt has, of several targets; 0: the last token is the only target."""
    vectors_dtype: Literal["float32", "float16"] = "float32"
    store_text: bool = True
    keep_columns: tuple[str, ...] = ()
    means_only: bool = False
    """Whether shards lose their arrays once they are in the sum, so that only the table and the mean remain."""
    attribution: bool = False
    """Whether the table has "<layer>/attribution", a number a position; folders made before have it in shards alone."""
    median_norm: bool = False
    """Whether `residual_norm` is the median over a prompt's tokens; in folders made before it is the mean."""

    @property
    def outcomes(self) -> int:
        """How many token ids, log-probabilities and rows of Q a prompt has: K, or K + 1 with `include_rest`."""
        return self.pairs or self.top_k + self.include_rest

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, in order."""
        return tuple(self.widths)

    def check(self) -> None:
        """Raise UserError for names that cannot be stored, or without layers."""
        if not self.widths:
            raise UserError("no layer is hooked; name at least one in hook_layer_name")
        for layer in self.widths:
            # The name becomes part of a file name (the npz of each layer) and of tensor names ("<layer>/S").
            if not layer or layer.startswith("__") or any(character in layer for character in "/\\:\0\n"):
                raise UserError(f"layer name {layer!r} cannot be part of a file name; hook a module with a plain name")
        from fisher_vmap.results.targets import TARGET_COLUMNS  # pyarrow, which settings do without

        for column in self.keep_columns:
            if column in TABLE_COLUMNS or "/" in column or (self.pairs and column in TARGET_COLUMNS):
                raise UserError(f"keep_columns has {column!r}, a name that prompts.parquet uses; rename it in the data")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise UserError(f"keep_columns names a column twice: {', '.join(self.keep_columns)}")


class ShardEntry(Stored):
    """One stored shard: its prompts [start, stop), and its two files with their SHA-256 and sizes in bytes."""

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
    """Its arrays were added to the sum and their file was removed; its rows of the table remain."""

    @model_validator(mode="after")
    def _plain_names(self) -> Self:
        # The names follow from the number, so no index can point outside shards/.
        if (self.file, self.table) != shard_names(self.number):
            raise ValueError(f"shard {self.number} has file names {self.file!r} and {self.table!r}")
        if self.start >= self.stop:
            raise ValueError(f"shard {self.number} has the prompts [{self.start}, {self.stop})")
        return self


class FileEntry(Stored):
    """A file made from the shards at the end of a run; `tensors` holds the CRC-32 of each tensor in it."""

    sha256: str
    bytes: NonNegativeInt
    tensors: dict[str, int] = Field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, **fields: Any) -> Self:
        """The entry of a file as it is on the disk."""
        return cls(sha256=sha256_of(path), bytes=path.stat().st_size, **fields)


class SumEntry(FileEntry):
    """The sum over the folded shards; `prompts` counts the prompts with numbers."""

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
    """The settings of the run that filled the folder last."""
    shards: tuple[ShardEntry, ...] = ()
    sum: SumEntry | None = None
    """The entry of the file `sum_name(folded)`, if any shards are folded."""
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
        allowed = {TABLE_NAME, MEAN_NAME, METADATA_NAME, *(npz_name(name, self.layers) for name in self.layers)}
        if strange := set(self.files) - allowed:
            raise ValueError(f"it lists the file {min(strange)!r}")
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, in order."""
        return self.layout.layers

    @property
    def mark(self) -> str:
        """A hash of the settings and shapes. It is written into the run's entry files to tell runs apart."""
        shapes = {name: x for name, x in self.layout.model_dump().items() if x or name not in _LATER}
        what = [self.shard_size, shapes, self.fingerprint]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def folded(self) -> int:
        """How many shards are in the sum; they are the first ones, and full."""
        return bisect_left(self.shards, True, key=lambda shard: not shard.folded)

    @property
    def prompts(self) -> int:
        """How many prompts are stored."""
        return sum(shard.stop - shard.start for shard in self.shards)

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
        """The index with changed shards: unfinished, since the files made from the shards are out of date."""
        kept = {shard.number: shard for shard in self.shards}
        for number in removed:
            kept.pop(number, None)
        kept.update((shard.number, shard) for shard in added)
        shards = tuple(kept[number] for number in sorted(kept))
        return self.model_copy(update={"shards": shards, "complete": False, "files": {}})

    def lacks(self, entry: ShardEntry) -> bool:
        """Whether a shard that fits this run is not listed with this entry; folded shards stay as they are."""
        first, listed = entry.number * self.shard_size, self.find(entry.number)
        fits = entry.start == first and entry.stop <= first + self.shard_size and not entry.folded
        return fits and listed != entry and not (listed is not None and listed.folded)

    def with_entries(self, entries: Iterable[ShardEntry]) -> "Index":
        """The index with the shards of these entry files; the same object if it lists them already."""
        new = [entry for entry in entries if self.lacks(entry)]
        return self.with_shards(new) if new else self

    def expecting(self, num_prompts: int) -> "Index":
        """The index of a run of so many prompts, or of those stored if they are more: unfinished if any are missing."""
        total = max(num_prompts, self.stop)
        unfinished = {"complete": False, "files": {}} if self.missing(total) else {}
        return self.model_copy(update={"num_prompts": total, **unfinished})

    def unfolded(self) -> "Index":
        """The index without its folded shards and their sum, which are to be computed again."""
        shards = tuple(shard for shard in self.shards if not shard.folded)
        return self.model_copy(update={"shards": shards, "sum": None, "complete": False, "files": {}})


def write_index(folder: Path, index: Index) -> None:
    """Replace index.json."""
    text = index.model_copy(update={"checksum": _NO_CHECKSUM}).model_dump_json(indent=1).encode()
    digits = hashlib.sha256(text).hexdigest().encode()
    with replacing(folder / INDEX_NAME) as file:
        file.write(text.replace(_NO_CHECKSUM.encode(), digits, 1))


def is_index(folder: Path) -> bool:
    """Whether index.json starts like one of ours; it may be damaged further on."""
    with open(folder / INDEX_NAME, "rb") as file:
        return _HEAD.match(file.read(200)) is not None


def read_index(folder: Path) -> Index:
    """Read index.json and, of an unfinished run, the entry files; errors as `read_index_file`."""
    index = read_index_file(folder)
    return index if index.complete else index.with_entries(read_entries(folder, index.mark))


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
        raise UserError(f"{path} is damaged, or of something else: it has no checksum; name another folder")
    if hashlib.sha256(text.replace(match[1], _NO_CHECKSUM.encode(), 1)).hexdigest().encode() != match[1]:
        raise UserError(
            f"{path} is damaged or was changed by hand (its checksum differs); fisher-vmap run --overwrite starts anew"
        )
    try:
        return Index.model_validate_json(text)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Another version may differ in other fields too, but only this message tells what to do.
        first = next((found for found in errors if found["loc"] == ("version",)), errors[0])
        if first["loc"] == ("version",):
            raise UserError(
                f"{path} has format version {first['input']}, this package reads 1; install a newer one"
            ) from error
        where = ".".join(map(str, first["loc"])) or "index"
        raise UserError(
            f"{path} is not valid: {where}: {first['msg']}; fisher-vmap run --overwrite starts anew"
        ) from error


def stored_precision(folder: Path) -> str | None:
    """The precision of the run in a folder; None if there is no run, or it cannot be read."""
    try:
        precision = read_index_file(folder).fingerprint.get("precision")
    except UserError:
        return None
    return precision if isinstance(precision, str) else None


def write_entry(folder: Path, entry: ShardEntry, mark: str) -> None:
    """Make a shard count as stored for the run with this mark. Its other files are already there."""
    with replacing(folder / SHARD_FOLDER / entry_name(entry.number)) as file:
        file.write(json.dumps({"run": mark, **entry.model_dump()}).encode())


def read_entry(folder: Path, number: int, mark: str) -> ShardEntry | None:
    """The entry of a shard; None if it is absent, damaged, or of another run."""
    try:
        values = json.loads((folder / SHARD_FOLDER / entry_name(number)).read_bytes())
        if not isinstance(values, dict) or values.pop("run", None) != mark:
            return None
        entry = ShardEntry.model_validate(values)
    except (OSError, ValueError):  # pydantic's ValidationError is a ValueError
        return None
    return entry if entry.number == number else None


def read_entries(folder: Path, mark: str) -> list[ShardEntry]:
    """The entries of all shards of the run with this mark, in order."""
    try:
        names = [path.name for path in (folder / SHARD_FOLDER).iterdir()]
    except OSError:
        return []
    numbers = sorted(int(match[1]) for name in names if (match := _ENTRY_NAME.fullmatch(name)))
    return [entry for number in numbers if (entry := read_entry(folder, number, mark)) is not None]


def remove_entries(folder: Path, numbers: Iterable[int]) -> None:
    """Remove the entries of these shards, if they exist."""
    with readable_write_errors(folder):
        for number in numbers:
            with suppress(FileNotFoundError):
                (folder / SHARD_FOLDER / entry_name(number)).unlink()


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
