"""Choosing prompts by `where`: a function of the table's row, a dict of column == value, or a mask.

And why a choice takes none.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fisher_vmap.errors import UserError, listed
from fisher_vmap.storage.name_lists import several
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.table import common_schema, in_schema

Where = Callable[[dict[str, Any]], bool] | Mapping[str, Any] | ArrayLike | None
Chooser = Callable[[ShardReader], NDArray[np.bool_]]


def chooser(where: Where, shards: Callable[[], Iterable[ShardReader]]) -> Chooser:
    """For each shard a mask, [n] booleans, of the prompts that `where` takes; None takes all.

    Rows are as in prompts.parquet: a kept column has one type in all shards.

    Raises:
        UserError: a column that is not in the table, or a mask that does not fit the prompts.
    """
    if where is None:
        return lambda reader: np.ones(reader.table.num_rows, bool)
    entries = [(reader.entry, reader.layout) for reader in shards()]
    if not callable(where) and not isinstance(where, Mapping):
        return _by_mask(np.asarray(where), {entry.number: entry.stop - entry.start for entry, _ in entries})
    schema = common_schema((reader.table.schema for reader in shards()), entries[0][1])
    if callable(where):
        return lambda reader: np.array([bool(where(row)) for row in in_schema(reader.table, schema).to_pylist()], bool)
    for column in where:
        if column not in schema.names:
            raise UserError(f"the prompts table has no column {column!r}; there is {several(schema.names)}")

    def equal(reader: ShardReader) -> NDArray[np.bool_]:
        table = in_schema(reader.table, schema)
        mask = np.ones(table.num_rows, bool)
        for name, value in where.items():
            mask &= np.array([found == value for found in table.column(name).to_pylist()], bool)
        return mask

    return equal


def others(chosen: Chooser) -> Chooser:
    """All prompts that another choice leaves out."""
    return lambda reader: ~chosen(reader)


def why_nobody(where: Where, shards: Callable[[], Iterable[ShardReader]]) -> str:
    """Why a choice takes no prompt that has numbers, in words that say what there is to choose from."""
    sizes = [reader.table.num_rows for reader in shards()]
    chosen = chooser(where, shards) if sizes else None
    if chosen and (count := sum(int(chosen(reader).sum()) for reader in shards())):
        return f"none of the {count} prompts that are chosen has numbers: they were skipped or have failed"
    if not isinstance(where, Mapping) or not sizes:
        return f"no prompt is chosen, of {sum(sizes)}"
    line = f"no prompt has {' and '.join(f'{column} == {value!r}' for column, value in where.items())}"
    for column, value in where.items():
        there = {found for reader in shards() for found in reader.table.column(column).to_pylist()}
        if value not in there:
            return f"{line}; there are {listed(sorted(map(str, there - {None})))}"
    return line


def _by_mask(mask: NDArray[Any], sizes: dict[int, int]) -> Chooser:
    n = sum(sizes.values())
    if mask.shape != (n,) or mask.dtype != np.bool_:
        raise UserError(f"where is an array {mask.shape} of {mask.dtype}; expected ({n},) booleans")
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
    return lambda reader: mask[ends[reader.entry.number] - sizes[reader.entry.number] : ends[reader.entry.number]]
