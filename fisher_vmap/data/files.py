"""Tables of local data files, read row by row, so that memory does not grow with the file (except for a .json array).

Each reader yields rows as they are, usually dicts, and skips blank lines. Errors name the file and, if possible, the
line.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fisher_vmap.errors import UserError


def spelt_as_path(name: str) -> bool:
    """Whether a name is spelt as a local path, which no name on the hub is."""
    return name.startswith((".", "/", "~"))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1; only a line feed ends a line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: line {number} is not UTF-8; convert the file to UTF-8") from error
            yield number, text


def _read_txt(path: Path) -> Iterator[object]:
    for _, line in _lines(path):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _read_jsonl(path: Path) -> Iterator[object]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UserError(f"{path}: line {number} is not JSON ({reason}); write one JSON object a line") from error


def _read_json(path: Path) -> Iterator[object]:
    first = next((line for _, line in _lines(path) if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _read_jsonl(path)  # many files of this name are JSON lines
        return
    try:
        yield from json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON ({error.msg}); expected a list of objects") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({type(error).__name__}); expected a list of objects") from error


def _read_csv(path: Path) -> Iterator[object]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Python's own limit of 128 KiB is shorter than some prompts
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next((row for row in reader if row), [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}: the header names a column twice; give each column a name of its own")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(row)} fields, the header {len(header)}; "
                    "put a text with commas or quotes between quotation marks"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} is not CSV ({error}); check its quotation marks") from error


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[object]:
    import pyarrow  # 40 MB, needed here only
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:  # damaged metadata comes as an OSError
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a parquet file that can be read ({reason}); write or fetch it again") from error


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error


def check_suffix(path: Path) -> None:
    """Raise a `UserError` unless the file's name ends in one of `SUFFIXES`."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: a file of unknown kind; expected one of {', '.join(SUFFIXES)}")


def read_rows(paths: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[object]:
    """Yield the rows of the files, one file after the other.

    Args:
        paths: files whose names end in one of `SUFFIXES`.
        columns: the columns that a parquet file is read for; None: all.

    Yields:
        One object a row: a dict, unless a JSON file holds something else.

    Raises:
        UserError: a file cannot be read, or its content does not fit its name.
    """
    for path in paths:
        check_suffix(path)
        with _readable(path):
            if path.suffix.lower() == ".parquet":
                yield from _read_parquet(path, columns)
            else:
                yield from _READERS[path.suffix.lower()](path)


def content_hash(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents, as hex digits; of several files, that of their hashes in order.

    Raises:
        UserError: a file cannot be read.
    """
    digests = []
    for path in paths:
        with _readable(path), path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


class Table(NamedTuple):
    """Rows that can be read from the start any number of times.

    Attributes:
        name: the data set in messages to the user.
        fingerprint: the same text for the same rows, another for others.
        columns: the names of the columns.
        read: reads the named columns (None: all) from the start; yields one row after the other, a dict unless a JSON
            file holds something else.
        local: whether reading it again is cheap, so that the rows can be checked and counted first.
    """

    name: str
    fingerprint: str
    columns: Sequence[str]
    read: Callable[[Sequence[str] | None], Iterator[object]]
    local: bool


def table_of_files(name: str, paths: Sequence[Path]) -> Table:
    """Make a table of local data files; its columns are the keys of the first 100 rows.

    Raises:
        UserError: a file cannot be read, holds no rows, or rows without named columns.
    """
    rows = list(islice(read_rows(paths), 100))
    if not rows:
        raise UserError(f"{name}: holds no rows; expected at least one prompt")
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if not columns:
        raise UserError(f'{name}: its rows have no named columns; expected objects such as {{"prompt": "..."}}')
    kinds = "+".join(sorted({path.suffix.lower() for path in paths}))
    fingerprint = f"{kinds} sha256:{content_hash(paths)}"
    return Table(name, fingerprint, list(columns), lambda chosen: read_rows(paths, chosen), local=True)
