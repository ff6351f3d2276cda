"""The entry of a stored shard, in a small file beside it: shards/shard-00000.json, until the run is finished.

A shard counts as stored once its entry stands there, which is the last of its files to get its name. So processes that
fill one folder have no file in common that they would have to write, and storing a shard costs the same however many
there are; index.json takes the entries in now and then, and all of them at the end, when these files go.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from fisher_vmap.storage.atomic import readable_write_errors, replacing

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
