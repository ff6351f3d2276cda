"""Reading shards, with every part checked when it is read; and choosing prompts by `where`."""

import sys
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
from fisher_vmap.results.kept import as_type, is_missing, several_of, wanted
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
    tensor_name,
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

    def top_probability(self) -> NDArray[np.float64]:
        """[n] the probability of each prompt's likeliest next token, out of the arrays; NaN without numbers."""
        log_probs = self._slice("log_probs", 0, self.entry.stop - self.entry.start)
        return np.exp(log_probs[:, 0].astype(np.float64))

    def record(self, index: int, layer: str) -> PromptRecord:
        """Prompt `index` at one layer."""
        row = index - self.entry.start
        token_ids, log_probs = self.tokens(index)
        start, stop = (int(offset) for offset in self._slice("position_offsets", row, row + 2))
        S, V, Q, norm = parts = [self._slice(name, row, row + 1) for name in self._names(layer)]
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
        S, V, Q, norm = (self._slice(name, 0, n) for name in self._names(layer))
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

    def _names(self, layer: str) -> list[str]:
        """The tensors of a layer that have a row a prompt."""
        return [tensor_name(layer, field, self.layout) for field in LAYER_TENSORS[:-1]]

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

    Args:
        where: a function of the table's row; {column: value}, with several values in a list, array or the like for any
            of them; one boolean for each stored prompt, in order, or as a pandas Series labelled by prompt; or
            prompt numbers.
        shards: gives the readers of all shards.

    Raises:
        UserError: a column that is not in the table, a value that is not of its type, a mask that does not fit the
            prompts, or what may be a mask as well as prompt numbers.
    """
    if where is None:
        return lambda reader: np.ones(reader.table.num_rows, bool)
    entries = [(reader.entry, reader.layout) for reader in shards()]
    if not entries:
        return lambda reader: np.zeros(reader.table.num_rows, bool)
    if not callable(where) and not isinstance(where, Mapping):
        return _by_array(where, [entry for entry, _ in entries], shards)
    schema = common_schema((reader.table.schema for reader in shards()), entries[0][1])
    if callable(where):
        return lambda reader: _by_function(where, in_schema(reader.table, schema).to_pylist())
    for column in where:
        if column not in schema.names:
            raise UserError(f"the prompts table has no column {column!r}; there is {several(schema.names)}")
    asked = {column: wanted(column, value, schema.field(column).type) for column, value in where.items()}

    def equal(reader: ShardReader) -> NDArray[np.bool_]:
        mask = np.ones(reader.table.num_rows, bool)
        for name, value in asked.items():
            mask &= np.array([value.holds(found) for found in _values(reader, name, schema)], bool)
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
    line = f"no prompt has {' and '.join(_condition(column, value) for column, value in where.items())}"
    for column, value in where.items():
        alone = chooser({column: value}, shards)
        if not any(alone(reader).any() for reader in shards()):
            there = {str(found) for reader in shards() for found in reader.table.column(column).to_pylist()}
            return f"{line}; there are {listed(sorted(there - {'None'}))}"
    return line


def _condition(column: str, value: Any) -> str:
    items = several_of(value)
    if len(items) == 1 and not isinstance(value, list | tuple | set | frozenset):
        return f"{column} == {value!r:.80}"
    return f"{column} in [{listed([repr(item) for item in items])}]"


def _values(reader: ShardReader, name: str, schema: pa.Schema) -> list[Any]:
    """A column of one shard, as the joined table has it."""
    return list(as_type(reader.table.column(name), schema.field(name).type).to_pylist())


def _by_function(where: Callable[[dict[str, Any]], Any], rows: list[dict[str, Any]]) -> NDArray[np.bool_]:
    mask = np.zeros(len(rows), bool)
    for i, row in enumerate(rows):
        prompt = row["prompt_index"]
        try:
            answer = where(row)
            unclear = answer is not None and is_missing(answer)
            mask[i] = not unclear and bool(answer)
        except Exception as error:  # whatever the user's function raises, with the prompt that it is about
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"the function given as where fails for prompt {prompt} ({what})") from error
        if unclear:
            raise UserError(f"the function given as where answers {answer!r} for prompt {prompt}; expected a boolean")
    return mask


def _by_array(where: Any, entries: list[ShardEntry], shards: Callable[[], Iterable[ShardReader]]) -> Chooser:
    """Of one boolean a prompt, or of prompt numbers."""
    stored = np.concatenate([np.arange(entry.start, entry.stop) for entry in entries])
    n, pandas = len(stored), sys.modules.get("pandas")
    if isinstance(where, str | bytes) or not isinstance(where, Iterable) or hasattr(where, "columns"):
        raise UserError(
            f"where is {type(where).__name__} {' '.join(repr(where).split()):.60}; expected {{column: value}}, a "
            f"function of the row, {n} booleans or a list of prompt numbers"
        )
    values = several_of(where)
    if gaps := sum(map(is_missing, values)):
        raise UserError(f"where has {gaps} missing of {len(values)} values; fill them, such as by .fillna(False)")
    of_booleans = str(getattr(where, "dtype", "")).removeprefix("torch.") in ("bool", "boolean")
    if all(isinstance(value, bool | np.bool_) for value in values) and (values or of_booleans):
        if pandas is not None and isinstance(where, pandas.Series):
            mask = _by_label(where.index, values, stored, shards)
        elif len(values) == n and not isinstance(where, set | frozenset):
            mask = np.array(values, bool)
        else:
            raise UserError(
                f"where is an array ({len(values)},) of bool; expected ({n},) booleans, one for each stored prompt"
            )
    elif all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        mask = _by_number([int(value) for value in values], stored)
    else:
        shape, dtype = _described(values)
        raise UserError(f"where is an array {shape} of {dtype}; expected ({n},) booleans or a list of prompt numbers")
    ends = dict(zip([entry.number for entry in entries], np.cumsum([e.stop - e.start for e in entries]), strict=True))
    return lambda reader: mask[ends[reader.entry.number] - reader.table.num_rows : ends[reader.entry.number]]


def _by_label(
    labels: Any, values: list[Any], stored: NDArray[np.int64], shards: Callable[[], Iterable[ShardReader]]
) -> NDArray[np.bool_]:
    """Of a Series: each value is about the prompt of its label. It may lack prompts without numbers alone."""
    place = {int(prompt): i for i, prompt in enumerate(stored)}
    names = list(labels)
    strange = [name for name in names if isinstance(name, bool | np.bool_) or name not in place]
    if strange or len(set(names)) < len(names):
        what = f"{strange[0]!r:.40} is no prompt number" if strange else "a label is there twice"
        raise UserError(
            f"the Series given as where is not labelled by prompt: {what}; keep the index of results.to_pandas(), or "
            f"give .to_numpy() if it has one boolean for each of the {len(stored)} prompts, in order"
        )
    mask, told = np.zeros(len(stored), bool), np.zeros(len(stored), bool)
    places = [place[name] for name in names]
    mask[places], told[places] = np.array(values, bool), True
    if not told.all():
        lacking = stored[~told & np.concatenate([is_ok(reader) for reader in shards()])]
        if len(lacking):
            raise UserError(
                f"the Series given as where has {len(names)} of {len(stored)} prompts and lacks prompt {lacking[0]}; "
                "say what the others are, such as by .reindex(results.to_pandas().index, fill_value=False)"
            )
    return mask


def _by_number(numbers: list[int], stored: NDArray[np.int64]) -> NDArray[np.bool_]:
    n = len(stored)
    if len(numbers) == n and set(numbers) <= {0, 1}:
        raise UserError(
            f"where has {n} integers 0 and 1, which may be a mask or prompt numbers; give a mask as booleans, such as "
            "by .astype(bool)"
        )
    unknown = sorted(set(numbers) - set(stored.tolist()))
    if unknown or len(set(numbers)) < len(numbers):
        what = f"prompt {unknown[0]} is not stored" if unknown else "a prompt is there twice"
        raise UserError(
            f"where has {len(numbers)} prompt numbers, and {what}; expected different ones of {stored[0]} to "
            f"{stored[-1]}, or {n} booleans"
        )
    return np.isin(stored, numbers)


def _described(values: list[Any]) -> tuple[tuple[int, ...], str]:
    try:
        array = np.asarray(values)
    except ValueError:  # entries of different lengths
        return (len(values),), "lists"
    kinds = {type(value).__name__ for value in values}
    return array.shape, str(array.dtype) if len(kinds) == 1 and array.dtype.kind not in "OUS" else " and ".join(
        sorted(kinds)
    )
