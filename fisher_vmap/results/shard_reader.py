"""Reading shards, with every part checked when it is read; and choosing prompts by `where`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap.errors import UserError, listed
from fisher_vmap.results.files import check_sha256, check_size, damaged, read_checked
from fisher_vmap.results.index import SHARD_FOLDER, Index, ShardEntry, ShardLayout
from fisher_vmap.results.record import Float32, PromptRecord, Stack, several
from fisher_vmap.results.shard import (
    LAYER_TENSORS,
    SAFETENSORS_DTYPES,
    TOKEN_TENSORS,
    check_sizes,
    common_schema,
    in_schema,
    is_checksum,
    row_checksum,
    tensor_specs,
)

Where = Callable[[dict[str, Any]], bool] | Mapping[str, Any] | ArrayLike | None


class ShardReader:
    """Reads the shard of one index entry.

    Args:
        folder: the results folder.
        entry: the shard's entry in the index.
        layout: shapes and dtypes.
        verify: compare the checksums of what is read, of single rows too. Sizes and shapes are always checked.

    Every method raises UserError, naming the file, if it is missing or damaged.
    """

    def __init__(self, folder: Path, entry: ShardEntry, layout: ShardLayout, verify: bool = True) -> None:
        self.folder, self.entry, self.layout, self.verify = folder, entry, layout, verify
        self.path = folder / SHARD_FOLDER / entry.file
        self.table_path = folder / SHARD_FOLDER / entry.table

    def check_sizes(self) -> None:
        """Check that the files exist with the sizes in the index."""
        check_sizes(self.folder, self.entry)

    def check_sha256(self) -> None:
        """Check that the files have the SHA-256 in the index."""
        if not self.entry.folded:
            check_sha256(self.path, self.entry.bytes, self.entry.sha256)
        check_sha256(self.table_path, self.entry.table_bytes, self.entry.table_sha256)

    @cached_property
    def table(self) -> pa.Table:
        """The shard's rows of the prompts table, with their checksums."""
        data = read_checked(self.table_path, self.entry.table_bytes, self.entry.table_sha256, self.verify)
        try:
            table = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.table_path, str(error)) from error
        if table.num_rows != self.entry.stop - self.entry.start:
            raise damaged(self.table_path, f"it has {table.num_rows} rows")
        return table

    def tokens(self, index: int) -> tuple[NDArray[np.int64], Float32]:
        """token_ids [K] and log_probs [K] of prompt `index`."""
        row = index - self.entry.start
        token_ids, log_probs = parts = [self._slice(name, row, row + 1) for name in TOKEN_TENSORS]
        self._compare("crc32", row, parts)
        return token_ids[0], log_probs[0]

    def record(self, index: int, layer: str) -> PromptRecord:
        """Prompt `index` at one layer."""
        row = index - self.entry.start
        token_ids, log_probs = self.tokens(index)
        start, stop = (int(offset) for offset in self._slice("position_offsets", row, row + 2))
        S, V, Q, norm = parts = [self._slice(f"{layer}/{name}", row, row + 1) for name in LAYER_TENSORS[:-1]]
        energy = self._slice(f"{layer}/position_energy", start, stop)
        self._compare(f"{layer}/crc32", row, [*parts, energy])
        values = self.table.slice(row, 1).to_pylist()[0]
        return PromptRecord(
            index=index,
            layer=layer,
            S=S[0],
            V=V[0].astype(np.float32),
            Q=Q[0],
            residual_norm=float(norm[0]),
            position_energy=energy,
            token_ids=token_ids,
            log_probs=log_probs,
            row={name: value for name, value in values.items() if not is_checksum(name)},
        )

    def stack(self, layer: str) -> Stack:
        """All prompts of the shard at one layer."""
        n = self.entry.stop - self.entry.start
        offsets = self._slice("position_offsets", 0, n + 1)
        S, V, Q, norm = (self._slice(f"{layer}/{name}", 0, n) for name in LAYER_TENSORS[:-1])
        energy = self._slice(f"{layer}/position_energy", 0, int(offsets[-1]))
        for row in range(n if self.verify else 0):
            positions = slice(offsets[row], offsets[row + 1])
            self._compare(f"{layer}/crc32", row, [S[row], V[row], Q[row], norm[row], energy[positions]])
        return Stack(S, V.astype(np.float32), Q)

    @cached_property
    def _file(self) -> Any:
        if self.entry.folded:
            raise UserError(
                f"{self.folder} keeps the mean alone (save: mean): single prompts have their row of the table, but no "
                "matrix; run with save: both in another --output_dir to have them"
            )
        # Checked first, because reading a shortened file through a memory map would kill the process.
        check_size(self.path, self.entry.bytes)
        try:
            return safe_open(self.path, framework="np")
        except (SafetensorError, OSError) as error:
            raise damaged(self.path, str(error)) from error

    def _slice(self, name: str, start: int, stop: int) -> NDArray[Any]:
        spec = tensor_specs(self.layout, self.entry.stop - self.entry.start, 0)[name]
        try:
            tensor = self._file.get_slice(name)
            dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
            # The number of positions is not in the layout; the offsets are checked against it below.
            expected = shape[:1] if name.endswith("/position_energy") else spec.shape
            if dtype != SAFETENSORS_DTYPES[spec.dtype] or shape != expected:
                raise damaged(self.path, f"{name} is {dtype} {shape}")
            if not 0 <= start <= stop <= shape[0]:
                raise damaged(self.path, f"{name} has {shape[0]} entries, not {stop}")
            if start == stop:  # the library refuses empty slices
                return np.zeros((0, *shape[1:]), spec.dtype)
            values: NDArray[Any] = tensor[start:stop]
        except SafetensorError as error:
            raise damaged(self.path, str(error)) from error
        return values

    def _compare(self, column: str, row: int, arrays: list[NDArray[Any]]) -> None:
        if self.verify and self.table.column(column)[row].as_py() != row_checksum(arrays):
            raise damaged(self.path, f"the numbers of prompt {self.entry.start + row} differ from their checksum")


def is_ok(reader: ShardReader) -> NDArray[np.bool_]:
    """[n] which prompts of a shard have numbers."""
    return np.array([status == "ok" for status in reader.table.column("status").to_pylist()], bool)


def readers(folder: Path, index: Index, verify: bool = True) -> Iterator[ShardReader]:
    """A reader of each shard in order, created when its turn comes."""
    return (ShardReader(folder, entry, index.layout, verify) for entry in index.shards)


Chooser = Callable[[ShardReader], NDArray[np.bool_]]


def chooser(where: Where, shards: Callable[[], Iterable[ShardReader]]) -> Chooser:
    """A function that gives, for each shard, a mask [n] of the prompts that `where` chooses; None chooses all.

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


def why_none(where: Where, shards: Callable[[], Iterable[ShardReader]]) -> str:
    """Why `where` chooses no prompt with numbers, and what there is to choose from."""
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
