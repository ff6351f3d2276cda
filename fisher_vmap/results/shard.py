"""A shard: the results of `shard_size` prompts in one safetensors file, and their rows of the prompts table beside it.

The rows stand in a parquet file of their own, shards/shard-00000.parquet: text of any length and kept columns of any
type fit there, and prompts.parquet is joined from them without computing anything again.

Writing safetensors as a stream: one tensor in memory at a time, and the same bytes for the same numbers.

The library's own writer wants every tensor at once, which for mean.safetensors is L x D x D, and it may order equal
metadata differently from run to run. The format is a length, a JSON header and the raw little-endian numbers; the tests
read what is written here with the library.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import Staged, check_size, folder_lock, staged
from fisher_vmap.results.index import SHARD_FOLDER, ShardEntry, read_entry, shard_names, write_entry
from fisher_vmap.results.table import PromptResult, ShardLayout, rows_table

_CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}


class TensorSpec(NamedTuple):
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def code_of(dtype: str) -> str:
    """The safetensors name of a numpy dtype, such as "F16"."""
    return _CODES[dtype]


def write_tensors(file: BinaryIO, specs: Mapping[str, TensorSpec], tensor: Callable[[str], NDArray[Any]]) -> None:
    """Write a safetensors file of the tensors in `specs`, asking `tensor(name)` for each just before it is written.

    Raises:
        ValueError: a tensor has not the shape that its spec announced.
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
    return 8 + len(text) + sum(_bytes(spec) for spec in specs.values())


def _header(specs: Mapping[str, TensorSpec]) -> tuple[list[str], bytes]:
    """The names in the order of the file, and its header."""
    # The widest numbers first keep every tensor aligned, which readers that map the file are glad of.
    names = sorted(specs, key=lambda name: -np.dtype(specs[name].dtype).itemsize)
    header: dict[str, dict[str, object]] = {}
    end = 0
    for name in names:
        dtype, shape = specs[name]
        start, end = end, end + _bytes(specs[name])
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return names, text + b" " * (-len(text) % 8)


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


Arrays = dict[str, NDArray[Any]]
LAYER_TENSORS = ("S", "V", "Q", "residual_norm", "position_energy")
TOKEN_TENSORS = ("token_ids", "log_probs")


class StagedShard(NamedTuple):
    """A shard written under temporary names, and the entry that it will have in the index."""

    entry: ShardEntry
    files: tuple[Staged, Staged]

    def commit(self, folder: Path, mark: str) -> ShardEntry:
        """Give the files their names and then write their entry, unless a whole shard is there already: in the lock.

        Returns the entry that counts.
        """
        there = read_entry(folder, self.entry.number, mark)
        if there is not None and there.stop >= self.entry.stop and _sizes(folder, there):
            return there
        for file in self.files:
            file.commit()
        write_entry(folder, self.entry, mark)
        return self.entry


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
        specs[f"{layer}/residual_norm"] = TensorSpec("float32", (n,))
        specs[f"{layer}/position_energy"] = TensorSpec("float32", (positions,))
    return specs


def shard_arrays(results: Sequence[PromptResult], layout: ShardLayout) -> Arrays:
    """Stack the prompts of a shard on dim 0; prompts without numbers are NaN, with token ids -1 and no positions.

    Raises:
        ValueError: a prompt that is "ok" lacks a layer, has another shape than the layout, or is not finite.
    """
    lengths = [_length(result, layout) for result in results]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    arrays: Arrays = {}
    for name, spec in tensor_specs(layout, len(results), int(offsets[-1])).items():
        arrays[name] = np.full(spec.shape, np.nan if spec.dtype.startswith("float") else -1, spec.dtype)
    arrays["position_offsets"][:] = offsets
    arrays["prompt_index"][:] = [result.index for result in results]
    for row, result in enumerate(results):
        if result.status != "ok":
            continue
        _put(arrays, "token_ids", row, result.token_ids, result)
        _put(arrays, "log_probs", row, result.log_probs, result)
        for layer in layout.layers:
            found = result.layers[layer]
            positions = slice(offsets[row], offsets[row + 1])
            _put(arrays, f"{layer}/position_energy", positions, found.position_energy, result)
            for field in ("S", "V", "Q", "residual_norm"):
                _put(arrays, f"{layer}/{field}", row, getattr(found, field), result)
    return arrays


def row_checksum(arrays: Sequence[NDArray[Any]]) -> int:
    """CRC-32 of the bytes of one prompt's arrays, in order."""
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


@contextmanager
def stage_shard(
    folder: Path, number: int, results: Sequence[PromptResult], layout: ShardLayout
) -> Iterator[StagedShard]:
    """Write a shard under temporary names; `commit` it inside the block, or it is removed.

    Args:
        folder: the results folder, whose shards/ exists.
        number: the shard's number, from 0.
        results: its prompts, at least one, with consecutive indices.
        layout: shapes and dtypes.

    Raises:
        ValueError: as `shard_arrays`, or the prompts are not consecutive.
        UserError: the folder cannot be written, or the disk is full.
    """
    start = results[0].index
    if [result.index for result in results] != list(range(start, start + len(results))):
        raise ValueError(f"shard {number}: its prompts are not consecutive")
    arrays = shard_arrays(results, layout)
    n = len(results)
    specs = tensor_specs(layout, n, int(arrays["position_offsets"][-1]))
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
    """Write a shard's files and its entry, and return it; arguments and errors as `stage_shard`.

    For workers of a run that others opened, whose `Index.mark` is given; index.json is left to another process. A shard
    that is there already, whole, stays: of two workers at the same one the first counts.
    """
    with stage_shard(folder, number, results, layout) as shard, folder_lock(folder):
        return shard.commit(folder, mark)


def _sizes(folder: Path, entry: ShardEntry) -> bool:
    """Are the files of an entry there, with its sizes?"""
    try:
        check_size(folder / SHARD_FOLDER / entry.file, entry.bytes)
        check_size(folder / SHARD_FOLDER / entry.table, entry.table_bytes)
    except UserError:
        return False
    return True


def _checksums(arrays: Arrays, layout: ShardLayout, n: int) -> dict[str, list[int]]:
    offsets = arrays["position_offsets"]
    sums = {"crc32": [row_checksum([arrays[name][row] for name in TOKEN_TENSORS]) for row in range(n)]}
    for layer in layout.layers:
        S, V, Q, norm, energy = (arrays[f"{layer}/{name}"] for name in LAYER_TENSORS)
        sums[f"{layer}/crc32"] = [
            row_checksum([S[row], V[row], Q[row], norm[row], energy[offsets[row] : offsets[row + 1]]])
            for row in range(n)
        ]
    return sums


def _length(result: PromptResult, layout: ShardLayout) -> int:
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
    with np.errstate(over="ignore"):  # what does not fit the stored dtype is caught as not finite
        stored = values.astype(target.dtype)
    if not np.isfinite(stored).all():
        raise ValueError(f"prompt {result.index}: {name} is not finite; record the prompt as failed instead")
    arrays[name][where] = stored
