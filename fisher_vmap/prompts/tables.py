"""A table: what a data set is to the rest of the package, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fisher_vmap.errors import UserError
from fisher_vmap.prompts.local_files import content_hash, read_rows


class Table(NamedTuple):
    """Rows that can be read from the start any number of times.

    Attributes:
        name: the data set in messages to the user.
        fingerprint: the same text for the same rows, another for others.
        columns: the names of the columns.
        read: starts a new reading of the columns named, or of all for None; yields one row after the other, a dict
            unless a JSON file holds something else.
        local: whether reading it once more costs little, so that it may be checked and counted beforehand.
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
