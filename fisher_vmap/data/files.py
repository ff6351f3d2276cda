"""Rows of local data files, read one by one, so that memory does not grow with the file (except for a JSON document).

Each reader yields rows as they are, usually dicts, and skips blank lines. Errors name the file and, if possible, the
line. A file's kind follows from its name, and whether a JSON file holds lines or one document from its content.
"""

from __future__ import annotations

import csv
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from fisher_vmap.data.local_files import (
    DELIMITERS,
    Tell,
    check_suffix,
    content_hash,
    lines_of,
    opened,
    readable_errors,
    rows_of_document,
)
from fisher_vmap.errors import UserError

_log = logging.getLogger(__name__)

_BATCH = 256  # rows that are made Python objects at a time
_COUNTED_JSON = 100 * 2**20  # bytes of a JSON document, at most, that is parsed only to count its rows
_COUNTED_AT_ONCE = 2**20  # bytes of lines
COUNT_S = 2.0  # how long rows are counted beyond those that are read


def spelt_as_path(name: str) -> bool:
    """Whether a name is spelt as a local path, which no name on the hub is."""
    return name.startswith((".", "/", "~"))


def _read_txt(path: Path) -> Iterator[object]:
    for _, line in lines_of(path):
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _read_json(path: Path, tell: Tell) -> Iterator[object]:
    is_document, lines = _begun_json(path)
    if is_document:
        yield from _document(path, lines, tell)
        return
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UserError(f"{path}: line {number} is not JSON ({reason}); write one JSON object a line") from error


def _begun_json(path: Path) -> tuple[bool, Iterator[tuple[int, str]]]:
    """Whether a JSON file is one document, not one value a line, and all its lines."""
    lines = lines_of(path)
    begun: list[tuple[int, str]] = []

    def next_line() -> str:
        """The next line that is not blank, without the space around it; an empty text at the end."""
        for numbered in lines:
            begun.append(numbered)
            if numbered[1].strip():
                return numbered[1].strip()
        return ""

    first = next_line()
    # Many files named .json hold JSON lines, and some of the others a list.
    starts = ("[", "{") if check_suffix(path).suffix == ".json" else ("[{",)
    is_document = first in ("[", "{") or (first.startswith(starts) and (_goes_on(first) or not next_line()))
    return is_document, chain(begun, lines)


def _document(path: Path, lines: Iterator[tuple[int, str]], tell: Tell) -> list[Any]:
    try:
        value = json.loads("".join(text for _, text in lines).rstrip())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno} is not JSON ({error.msg}); expected a list of objects, one object, or one "
            "JSON object a line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({type(error).__name__}); expected a list of objects") from error
    return rows_of_document(path, value, tell)


def _goes_on(line: str) -> bool:
    """Whether a line begins an object that ends on a later line."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line) - 1
    except (ValueError, RecursionError):
        return False
    return False


def _read_csv(path: Path, delimiter: str) -> Iterator[object]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # Python's own limit of 128 KiB is shorter than some prompts
    reader = csv.reader((line for _, line in lines_of(path)), strict=True, delimiter=delimiter)
    named, what = ("TSV", "tabs") if delimiter == "\t" else ("CSV", "commas")
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
                    f"put a text with {what} or quotes between quotation marks"
                )
            yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}: line {reader.line_num} is not {named} ({error}); check its quotation marks"
        ) from error


@contextmanager
def _arrow_source(path: Path) -> Iterator[Any]:
    """What pyarrow reads a file from: itself, or its decompressed bytes, since it seeks in them."""
    import pyarrow  # 40 MB, needed here only

    kind = check_suffix(path)
    with path.open("rb") as file:
        source: Any = file
        if kind.compression:
            with opened(path) as unpacked:
                source = pyarrow.BufferReader(unpacked.read())
        try:
            yield source
        except (pyarrow.ArrowException, OSError) as error:  # damaged metadata comes as an OSError
            reason, name = " ".join(str(error).split())[:200], kind.suffix[1:]
            raise UserError(
                f"{path}: not {'an' if name == 'arrow' else 'a'} {name} file that can be read ({reason}); write or "
                "fetch it again"
            ) from error


def _read_parquet(path: Path, columns: Sequence[str] | None) -> Iterator[object]:
    import pyarrow.parquet

    with _arrow_source(path) as source, pyarrow.parquet.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=None if columns is None else list(columns)):
            yield from batch.to_pylist()


def _read_arrow(path: Path, columns: Sequence[str] | None) -> Iterator[object]:
    with _arrow_source(path) as source:
        for batch in _arrow_batches(source):
            chosen = batch if columns is None else batch.select(list(columns))
            for start in range(0, chosen.num_rows, _BATCH):
                yield from chosen.slice(start, _BATCH).to_pylist()


def _arrow_batches(source: Any) -> Iterator[Any]:
    """The record batches of an Arrow file of either form, the one with an index at its end and the stream."""
    import pyarrow.ipc

    magic = source.read(6)
    source.seek(0)
    if magic != b"ARROW1":
        yield from pyarrow.ipc.open_stream(source)
        return
    reader = pyarrow.ipc.open_file(source)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def read_rows(
    paths: Sequence[Path], columns: Sequence[str] | None = None, tell: Tell = lambda line: None
) -> Iterator[object]:
    """Yield the rows of the files, one file after the other.

    Args:
        paths: files of the kinds of `SUFFIXES`, compressed or not.
        columns: the columns that a parquet or Arrow file is read for; None: all.
        tell: takes a line for each choice that was made about a file's form.

    Yields:
        One object a row: a dict, unless a JSON file holds something else.

    Raises:
        UserError: a file cannot be read, or its content does not fit its name.
    """
    for path in paths:
        suffix = check_suffix(path).suffix
        with readable_errors(path):
            if suffix == ".parquet":
                yield from _read_parquet(path, columns)
            elif suffix == ".arrow":
                yield from _read_arrow(path, columns)
            elif suffix == ".txt":
                yield from _read_txt(path)
            elif suffix in DELIMITERS:
                yield from _read_csv(path, DELIMITERS[suffix])
            else:
                yield from _read_json(path, tell)


class Count(NamedTuple):
    """How many rows there are; at least so many, unless it is exact."""

    rows: int
    exact: bool


def count_rows(paths: Sequence[Path], seconds: float = COUNT_S) -> Count:
    """Count the rows of files without parsing their lines, for about so many seconds at most."""
    end, total = time.monotonic() + seconds, 0
    try:
        for path in paths:
            for rows in _row_counts(path):
                total += rows or 0
                if rows is None or time.monotonic() > end:
                    return Count(total, False)
    except UserError:  # beyond the run's prompts a file may be damaged
        return Count(total, False)
    return Count(total, True)


def _row_counts(path: Path) -> Iterator[int | None]:
    """Numbers that add up to a file's rows; None: the others are not counted."""
    suffix = check_suffix(path).suffix
    with readable_errors(path):
        if suffix == ".parquet":
            import pyarrow.parquet

            with _arrow_source(path) as source, pyarrow.parquet.ParquetFile(source) as file:
                yield file.metadata.num_rows
            return
        if suffix == ".arrow":
            with _arrow_source(path) as source:
                yield from (batch.num_rows for batch in _arrow_batches(source))
            return
        if suffix not in (*DELIMITERS, ".txt"):
            is_document, begun = _begun_json(path)
            if is_document:
                small = path.stat().st_size <= _COUNTED_JSON
                yield len(_document(path, begun, lambda line: None)) if small else None
                return
        with opened(path) as lines:
            yield from _records(lines, delimited=suffix in DELIMITERS)


def _records(lines: IO[bytes], *, delimited: bool) -> Iterator[int]:
    """The lines that are not blank, some at a time; of a CSV file, the rows below its header."""
    inside, header = False, delimited  # inside quotation marks
    while batch := lines.readlines(_COUNTED_AT_ONCE):
        if not delimited:
            yield sum(b" " < line[:1] < b"\x80" or not _is_blank(line) for line in batch)
            continue
        rows = 0
        for line in batch:
            begins = not inside
            if b'"' in line:
                inside ^= line.count(b'"') % 2 == 1
            rows += begins and line not in (b"\n", b"\r\n")
        yield rows - (header and rows > 0)
        header = header and not rows


def _is_blank(line: bytes) -> bool:
    text = line.decode("utf-8", "replace").lstrip("\ufeff")
    return not text.strip()


class Table(NamedTuple):
    """Rows that can be read from the start any number of times.

    Attributes:
        name: the data set in messages to the user.
        fingerprint: the same text for the same rows, another for others.
        columns: the names of the columns.
        read: reads the named columns (None: all) from the start; yields one row after the other, a dict unless a JSON
            file holds something else.
        local: whether reading it again is cheap, so that the rows can be checked and counted first.
        counted: counts the rows in a few seconds at most; None: they are not known.
    """

    name: str
    fingerprint: str
    columns: Sequence[str]
    read: Callable[[Sequence[str] | None], Iterator[object]]
    local: bool
    counted: Callable[[], Count | None]


def table_of_files(name: str, paths: Sequence[Path]) -> Table:
    """Make a table of local data files; its columns are the keys of the first 100 rows.

    Raises:
        UserError: a file cannot be read, holds no rows, or rows without named columns.
    """
    rows = list(islice(read_rows(paths, tell=_log.info), 100))
    if not rows:
        empty = " (the file is empty)" if len(paths) == 1 and not paths[0].stat().st_size else ""
        raise UserError(f"{name}: holds no rows{empty}; expected at least one prompt")
    columns = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if not columns:
        raise UserError(f'{name}: its rows have no named columns; expected objects such as {{"prompt": "..."}}')
    kinds = "+".join(sorted({"".join(check_suffix(path)) for path in paths}))
    fingerprint = f"{kinds} sha256:{content_hash(paths)}"

    def read(chosen: Sequence[str] | None) -> Iterator[object]:
        return read_rows(paths, chosen)

    return Table(name, fingerprint, list(columns), read, local=True, counted=lambda: count_rows(paths))


class Extent(NamedTuple):
    """Which part of a data set a run takes.

    Attributes:
        taken: how many prompts; None: not known before the end of the data.
        data: the rows of the data set; None: not known.
        offset: rows that are skipped first.
        shuffled: whether the rows are in a random order.
        limited: whether `num_prompts` is what ends the run, as far as is known.
    """

    taken: int | None
    data: Count | None
    offset: int
    shuffled: bool
    limited: bool

    def stored(self) -> dict[str, int | bool] | None:
        """The count of the data set's rows, as JSON can hold it."""
        return None if self.data is None else self.data._asdict()

    @property
    def is_whole(self) -> bool:
        """Whether nothing says that the data set has more."""
        if self._known is None:
            return self.taken is None or not (self.limited or self.offset)
        return self._known.exact and self._known.rows == self.taken

    @property
    def can_grow(self) -> bool:
        """Whether a higher `num_prompts` may take more."""
        known = self._known
        return self.limited and not (
            known is not None and known.exact and known.rows <= self.offset + (self.taken or 0)
        )

    @property
    def _known(self) -> Count | None:
        # What the hub says about a data set may be out of date.
        enough = self.data is not None and self.data.rows >= self.offset + (self.taken or 0)
        return self.data if enough else None

    def __str__(self) -> str:
        """Such as "100 of 1,500 prompts (num_prompts)"."""
        if self.taken is None:
            return "all prompts"
        if self.is_whole:
            return f"{self.taken:,} prompts"
        known = self._known
        to_the_end = known is not None and known.exact and known.rows == self.offset + self.taken
        settings = {
            "num_prompts": self.limited and not to_the_end,
            "offset": self.offset,
            "shuffle_seed": self.shuffled,
        }
        names = [name for name, matters in settings.items() if matters]
        why = f" ({', '.join(names)})" if names else ""
        if known is None:
            first = "" if self.offset or self.shuffled else "the first "
            return f"{first}{self.taken:,} prompts{why}"
        least = "" if known.exact else "at least "
        return f"{self.taken:,} of {least}{known.rows:,} prompts{why}"
