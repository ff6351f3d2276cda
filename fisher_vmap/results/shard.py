"""Writing a shard: `shard_size` prompts in one safetensors file, and their rows of the prompts table in a parquet file.

The safetensors files are written here, one tensor in memory at a time and with the same bytes for the same numbers.
The library's own writer needs all tensors at once, which for mean.safetensors is L x D x D, and may order equal
metadata differently from run to run. The format is a length, a JSON header and the little-endian numbers.

The prompts table: one row a prompt, stored beside each shard and joined into prompts.parquet at the end.

Columns of every prompt: prompt_index, source_row, text, the kept columns, status, reason, audit (what the audit changed
in how the prompt was computed, and why), tokens, truncated, mass (the total probability of the K tokens),
top_probability (that of the likeliest one), top_tokens and prompt_tokens (as text).

Columns of every layer, named "<layer>/...": trace, trace_norm2 (trace x residual_norm^2, comparable between layers,
residual_norm the median over the prompt's tokens, or the mean where the folder was begun with it), effective_rank, and
share_kept (sum of S / trace). If the whole vocabulary's matrix was estimated: trace_full,
trace_full_error (its standard error), share_full (sum of S / trace_full) and relative_error (of the stored matrix, in
the Frobenius norm). Where the prompts' own matrices are kept, attribution: a number a position, the shard's
position_energy (with `save: mean` these lists would be most of what is left on the disk, and are left out).

If the run asked for other targets than the last token: targets (their number), mean_entropy and mean_log_prob in nats,
a list for each of the other properties of a target and of the completions (`TARGET_COLUMNS`), and for every layer
target_trace and trace_error.

A shard's own table also has a CRC-32 of each row's arrays ("crc32" for the tokens, "<layer>/crc32"), so that a single
row can be read and checked without the rest of its shard.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fisher_vmap.results.files import Staged, check_size, folder_lock, passes, staged
from fisher_vmap.results.index import (
    SHARD_FOLDER,
    ShardEntry,
    ShardLayout,
    read_entry,
    shard_names,
    write_entry,
)
from fisher_vmap.results.kept import as_type, common_type, encodable, kept_column
from fisher_vmap.results.record import QUALITY, PromptResult, covered_mass, effective_rank, how_good, top_probability
from fisher_vmap.results.targets import table_columns


def rows_table(results: Sequence[PromptResult], layout: ShardLayout, checksums: dict[str, list[int]]) -> pa.Table:
    """One shard's rows. `checksums` has a list of CRC-32 for "crc32" and for each "<layer>/crc32"."""
    columns: dict[str, pa.Array] = {
        "prompt_index": pa.array([r.index for r in results], pa.int64()),
        "source_row": pa.array([r.source_row for r in results], pa.int64()),
        "text": pa.array([encodable(r.text) if layout.store_text else None for r in results], pa.string()),
    }
    for column in layout.keep_columns:
        columns[column] = kept_column([r.kept.get(column) for r in results])
    of_one = [r if r.status == "ok" and not layout.pairs else None for r in results]
    masses = [None if r is None else covered_mass(r.log_probs, r.token_ids) for r in of_one]
    likeliest = [None if r is None else top_probability(r.log_probs) for r in of_one]
    columns |= {
        "status": pa.array([r.status for r in results], pa.string()),
        "reason": pa.array([encodable(r.reason) for r in results], pa.string()),
        "audit": pa.array([encodable(r.audit) for r in results], pa.string()),
        "tokens": pa.array([r.num_tokens for r in results], pa.int64()),
        "truncated": pa.array([r.truncated for r in results], pa.bool_()),
        "mass": pa.array(masses, pa.float64()),
        "top_probability": pa.array(likeliest, pa.float64()),
        "top_tokens": _texts([r.top_tokens if r.status == "ok" else None for r in results]),
        "prompt_tokens": _texts([r.prompt_tokens if layout.store_text else None for r in results]),
    }
    if layout.pairs:
        columns |= table_columns([r.targets for r in results], layout.layers, layout.store_text)
    for layer in layout.layers:
        numbers = [_layer_numbers(r, layer) for r in results]
        for name in ("trace", "trace_norm2", "effective_rank", *QUALITY):
            columns[f"{layer}/{name}"] = pa.array([row.get(name) for row in numbers], pa.float64())
        if layout.attribution:
            energies = [r.layers[layer].position_energy if r.status == "ok" else None for r in results]
            lists = [None if energy is None else np.asarray(energy, np.float32) for energy in energies]
            columns[f"{layer}/attribution"] = pa.array(lists, pa.list_(pa.float32()))
    columns |= {name: pa.array(values, pa.int64()) for name, values in checksums.items()}
    return pa.table(columns)


def common_schema(schemas: Iterable[pa.Schema], layout: ShardLayout) -> pa.Schema:
    """The columns of prompts.parquet: the shards' without checksums, each kept column of a type that holds all.

    Shards of an earlier version may lack a column of others; it is left out.
    """
    first: pa.Schema | None = None
    kept: dict[str, set[pa.DataType]] = {column: set() for column in layout.keep_columns}
    everywhere: set[str] = set()
    for schema in schemas:
        everywhere = set(schema.names) if first is None else everywhere & set(schema.names)
        first = first or schema
        for column, types in kept.items():
            types.add(schema.field(column).type)
    if first is None:
        first = rows_table([], layout, {}).schema
        everywhere = set(first.names)
    fields = [
        pa.field(field.name, common_type(kept[field.name]) if field.name in kept else field.type)
        for field in first
        if field.name in everywhere and not is_checksum(field.name)
    ]
    return pa.schema(fields)


def is_checksum(column: str) -> bool:
    """Whether a column holds checksums; names of kept columns have no "/"."""
    return column == "crc32" or column.endswith("/crc32")


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A shard's rows with the columns and types of prompts.parquet."""
    columns = [as_type(table.column(field.name), field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _layer_numbers(result: PromptResult, layer: str) -> dict[str, float | None]:
    if result.status != "ok":
        return {}
    found = result.layers[layer]
    trace = float(found.trace)
    trace_norm2 = trace * float(found.residual_norm) ** 2
    return {"trace": trace, "trace_norm2": trace_norm2, "effective_rank": effective_rank(found.S), **how_good(found)}


def _texts(values: list[list[str] | None]) -> pa.Array:
    return pa.array([v if v is None else [encodable(text) for text in v] for v in values], pa.list_(pa.string()))


Arrays = dict[str, NDArray[Any]]

LAYER_TENSORS = ("S", "V", "Q", "residual_norm", "position_energy")  # fields of a `LayerResult`
TOKEN_TENSORS = ("token_ids", "log_probs")
SAFETENSORS_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


def tensor_name(layer: str, field: str, layout: ShardLayout) -> str:
    """The name of the tensor that holds one of `LAYER_TENSORS`: that of a norm says that it is the median."""
    return f"{layer}/{field}{'_median' if field == 'residual_norm' and layout.median_norm else ''}"


class TensorSpec(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the numbers."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(file: BinaryIO, specs: Mapping[str, TensorSpec], tensor: Callable[[str], NDArray[Any]]) -> None:
    """Write a safetensors file of the tensors in `specs`, calling `tensor(name)` for each just before it is written.

    Raises:
        ValueError: a tensor does not have the shape in its spec.
    """
    names, text = _header(specs)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        dtype, shape = specs[name]
        array = np.ascontiguousarray(tensor(name), dtype=np.dtype(dtype).newbyteorder("<"))
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, not {shape} as announced")
        file.write(array.data)


def size_of(specs: Mapping[str, TensorSpec]) -> int:
    """Bytes of the file that `write_tensors` makes."""
    _, text = _header(specs)
    return 8 + len(text) + sum(spec.bytes for spec in specs.values())


def _header(specs: Mapping[str, TensorSpec]) -> tuple[list[str], bytes]:
    """The names in the order of the file, and its header."""
    # With the widest numbers first, every tensor is aligned in a file that is mapped into memory.
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + specs[name].bytes
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return names, text + b" " * (-len(text) % 8)


def tensor_specs(layout: ShardLayout, n: int, positions: int) -> dict[str, TensorSpec]:
    """Names, dtypes and shapes of a shard of n prompts with `positions` real positions in all."""
    K, R = layout.outcomes, layout.rank
    specs = {
        "prompt_index": TensorSpec("int64", (n,)),
        "position_offsets": TensorSpec("int64", (n + 1,)),
        "token_ids": TensorSpec("int64", (n, K)),
        "log_probs": TensorSpec("float32", (n, K)),
    }
    for layer, D in layout.widths.items():
        specs[f"{layer}/S"] = TensorSpec("float32", (n, R))
        specs[f"{layer}/V"] = TensorSpec(layout.vectors_dtype, (n, R, D))
        specs[f"{layer}/Q"] = TensorSpec("float32", (n, K, R))
        specs[tensor_name(layer, "residual_norm", layout)] = TensorSpec("float32", (n,))
        specs[f"{layer}/position_energy"] = TensorSpec("float32", (positions,))
    return specs


class StagedShard(NamedTuple):
    """A shard written under temporary names, and its entry."""

    entry: ShardEntry
    files: tuple[Staged, Staged]

    def commit(self, folder: Path, mark: str) -> ShardEntry:
        """Rename the files and write the entry file, unless an intact shard is there already.

        The caller holds the folder's lock. Returns the entry of the shard that is stored.
        """
        there = read_entry(folder, self.entry.number, mark)
        if there is not None and there.stop >= self.entry.stop and passes(check_sizes, folder, there):
            return there
        for file in self.files:
            file.commit()
        write_entry(folder, self.entry, mark)
        return self.entry


@contextmanager
def stage_shard(
    folder: Path, number: int, results: Sequence[PromptResult], layout: ShardLayout
) -> Iterator[StagedShard]:
    """Write a shard under temporary names. If the block ends without a `commit`, the files are removed.

    Raises:
        ValueError: the prompts are not consecutive, or an array does not fit the layout or is not finite.
        UserError: the folder cannot be written, or the disk is full.
    """
    n, start = len(results), results[0].index
    if [result.index for result in results] != list(range(start, start + n)):
        raise ValueError(f"shard {number}: its prompts are not consecutive")
    specs, arrays = _stacked(results, layout)
    table = rows_table(results, layout, _checksums(arrays, layout, n))
    names = shard_names(number)
    shards = folder / SHARD_FOLDER
    with staged(shards / names[0]) as tensors, staged(shards / names[1]) as rows:
        write_tensors(tensors.file, specs, arrays.__getitem__)
        pq.write_table(table, rows.file, compression="zstd")
        (sha256, size), (table_sha256, table_size) = tensors.digest(), rows.digest()
        entry = ShardEntry(
            number=number, start=start, stop=start + n, file=names[0], sha256=sha256, bytes=size,
            table=names[1], table_sha256=table_sha256, table_bytes=table_size,
        )  # fmt: skip
        yield StagedShard(entry, (tensors, rows))


def write_shard(
    folder: Path, number: int, results: Sequence[PromptResult], layout: ShardLayout, mark: str
) -> ShardEntry:
    """Write a shard and its entry file, for a worker; another process lists it in index.json.

    If another worker has stored the same shard, that one is kept. Returns its entry; errors as `stage_shard`.
    """
    with stage_shard(folder, number, results, layout) as shard, folder_lock(folder):
        return shard.commit(folder, mark)


def check_sizes(folder: Path, entry: ShardEntry) -> None:
    """Raise UserError unless a shard's files exist with the sizes in its entry; a folded shard has its table alone."""
    if not entry.folded:
        check_size(folder / SHARD_FOLDER / entry.file, entry.bytes)
    check_size(folder / SHARD_FOLDER / entry.table, entry.table_bytes)


def row_checksum(arrays: Sequence[NDArray[Any]]) -> int:
    """CRC-32 of the bytes of one prompt's arrays, in order."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


def _stacked(results: Sequence[PromptResult], layout: ShardLayout) -> tuple[dict[str, TensorSpec], Arrays]:
    """The prompts stacked on dim 0. Prompts without numbers are NaN, with token ids -1 and no positions."""
    offsets = np.cumsum([0, *(_length(result, layout) for result in results)], dtype=np.int64)
    specs = tensor_specs(layout, len(results), int(offsets[-1]))
    arrays = {
        name: np.full(spec.shape, np.nan if spec.dtype.startswith("float") else -1, spec.dtype)
        for name, spec in specs.items()
    }
    arrays["position_offsets"][:] = offsets
    arrays["prompt_index"][:] = [result.index for result in results]
    for row, result in enumerate(results):
        if result.status != "ok":
            continue
        for name in TOKEN_TENSORS:
            _put(arrays, name, row, getattr(result, name), result)
        for layer in layout.layers:
            for name in LAYER_TENSORS:
                where = slice(offsets[row], offsets[row + 1]) if name == "position_energy" else row
                _put(arrays, tensor_name(layer, name, layout), where, getattr(result.layers[layer], name), result)
    return specs, arrays


def _length(result: PromptResult, layout: ShardLayout) -> int:
    """The prompt's number of positions; 0 without numbers."""
    if result.status != "ok":
        return 0
    if missing := [layer for layer in layout.layers if layer not in result.layers]:
        raise ValueError(f"prompt {result.index} has no result for layer {missing[0]}")
    lengths = {len(result.layers[layer].position_energy) for layer in layout.layers}
    if len(lengths) > 1:
        raise ValueError(f"prompt {result.index} has position energies of different lengths: {sorted(lengths)}")
    return lengths.pop()


def _put(arrays: Arrays, name: str, where: int | slice, values: Any, result: PromptResult) -> None:
    values = np.asarray(values)
    target = arrays[name][where]
    if values.shape != target.shape:
        raise ValueError(f"prompt {result.index}: {name} has shape {values.shape}, not {target.shape}")
    with np.errstate(over="ignore"):  # a number too large for the stored dtype becomes infinite, and is refused below
        stored = values.astype(target.dtype)
    if not np.isfinite(stored).all():
        raise ValueError(f"prompt {result.index}: {name} is not finite; record the prompt as failed instead")
    arrays[name][where] = stored


def _checksums(arrays: Arrays, layout: ShardLayout, n: int) -> dict[str, list[int]]:
    offsets = arrays["position_offsets"]
    sums = {"crc32": [row_checksum([arrays[name][row] for name in TOKEN_TENSORS]) for row in range(n)]}
    for layer in layout.layers:
        S, V, Q, norm, energy = (arrays[tensor_name(layer, name, layout)] for name in LAYER_TENSORS)
        sums[f"{layer}/crc32"] = [
            row_checksum([S[row], V[row], Q[row], norm[row], energy[offsets[row] : offsets[row + 1]]])
            for row in range(n)
        ]
    return sums
