"""Shards of a run that keeps means only are folded into a running sum, and their arrays removed.

The sum is a file of its own, a float64 matrix a layer. Shards go in one by one, in their order, whatever the number
folded at a time, so the mean is to the bit that of a run which keeps everything.

The mean Fisher matrix of many prompts, shard by shard, and mean.safetensors.
"""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import check_sha256, check_size, damaged, readable_write_errors, replacing, sha256_of
from fisher_vmap.results.index import SHARD_FOLDER, FileEntry, Index, SumEntry, remove_entries, sum_name, write_index
from fisher_vmap.results.shard import TensorSpec, write_tensors
from fisher_vmap.results.shard_reader import Chooser, Float32, ShardReader

_GEMM_ROWS = 4096


class RunningSum(NamedTuple):
    """A sum of Fisher matrices: total [D, D] float64, and the number of prompts in it."""

    total: NDArray[np.float64]
    prompts: int

    def mean(self) -> NDArray[np.float64]:
        """The mean; NaN of no prompts."""
        return self.total / self.prompts if self.prompts else np.full_like(self.total, np.nan)


def add_shards(
    before: RunningSum | None, readers: Iterable[ShardReader], layer: str, chosen: Chooser | None = None
) -> RunningSum:
    """The sum over the chosen prompts of F = V^T diag(S) V, added to the sum `before`.

    With W = diag(sqrt S) V, the rows of all prompts of a shard below one another, the sum over them is W^T W: one
    matrix product a shard, in float64, in memory that does not grow with the number of prompts.

    Args:
        before: what is to be added to, or None.
        readers: the shards; at least one if there is nothing before.
        layer: the layer's name.
        chosen: for a shard, a mask [n] of the prompts to take; None takes all. Prompts without numbers are always left
            out.
    """
    total, count = (None, 0) if before is None else before
    for reader in readers:
        width = reader.layout.widths[layer]
        total = np.zeros((width, width)) if total is None else total
        mask = is_ok(reader) if chosen is None else chosen(reader) & is_ok(reader)
        if not mask.any():
            continue
        S, V, _ = reader.stack(layer)
        count += int(mask.sum())
        W = (np.sqrt(S[mask].astype(np.float64))[:, :, None] * V[mask]).reshape(-1, width)
        for start in range(0, len(W), _GEMM_ROWS):
            part = W[start : start + _GEMM_ROWS]
            total += part.T @ part
    if total is None:
        raise ValueError("a mean needs at least one shard")
    return RunningSum(total, count)


def is_ok(reader: ShardReader) -> NDArray[np.bool_]:
    """[n] which prompts of a shard have numbers."""
    return np.array([status == "ok" for status in reader.table.column("status").to_pylist()], bool)


def write_mean(path: Path, widths: dict[str, int], sum_of: Callable[[str], RunningSum]) -> dict[str, int]:
    """Write "<layer>": [D, D] float32, the mean over all prompts with numbers, one layer in memory at a time.

    Returns:
        The CRC-32 of each tensor, so that one can be read and checked without the others.
    """
    checksums: dict[str, int] = {}

    def tensor(layer: str) -> NDArray[Any]:
        stored = sum_of(layer).mean().astype(np.float32)
        checksums[layer] = zlib.crc32(stored.data)
        return stored

    with replacing(path) as file:
        write_tensors(file, {layer: TensorSpec("float32", (D, D)) for layer, D in widths.items()}, tensor)
    return checksums


def read_mean(path: Path, entry: FileEntry, layer: str, width: int, verify: bool = True) -> Float32:
    """Read one layer of mean.safetensors: [D, D] float32.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_matrix(path, entry, layer, width, np.float32, verify)


def read_matrix(
    path: Path, entry: FileEntry, layer: str, width: int, dtype: type[Any], verify: bool = True
) -> NDArray[Any]:
    """Read one layer's [D, D] of a file that has a matrix a layer.

    Raises:
        UserError: the file is missing or damaged.
    """
    check_size(path, entry.bytes)
    try:
        with safe_open(path, framework="np") as file:
            matrix: NDArray[Any] = file.get_tensor(layer)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error
    if matrix.shape != (width, width) or matrix.dtype != dtype:
        raise damaged(path, f"{layer} is {matrix.dtype} {matrix.shape}")
    if verify and zlib.crc32(np.ascontiguousarray(matrix).data) != entry.tensors.get(layer):
        raise damaged(path, f"the matrix of {layer} differs from its checksum")
    return matrix


FOLD_SHARDS = 32  # folded at a time: each time the sums of all layers are written anew


def running_sum(folder: Path, index: Index, layer: str, verify: bool = True) -> RunningSum | None:
    """The sum over the folded shards at one layer, or None where none has been folded.

    Raises:
        UserError: its file is missing or damaged.
    """
    if index.sum is None:
        return None
    width = index.layout.widths[layer]
    path = folder / sum_name(index.folded)
    return RunningSum(read_matrix(path, index.sum, layer, width, np.float64, verify), index.sum.prompts)


def sum_is_sound(folder: Path, index: Index) -> bool:
    """Is the file of the running sum what was written? Also where there is none and none is due."""
    if index.sum is None:
        return True
    try:
        check_sha256(folder / sum_name(index.folded), index.sum.bytes, index.sum.sha256)
    except UserError:
        return False
    return True


def fold(folder: Path, index: Index, least: int = FOLD_SHARDS) -> Index:
    """Fold the full shards that follow the folded ones, if there are at least `least`; returns the new index, written.

    The new sum has its own name and counts once index.json says so; a process that is killed in here loses nothing.

    Raises:
        UserError: a shard or the sum is damaged, or the folder cannot be written.
    """
    if not index.layout.means_only:
        return index
    done, ready = index.folded, 0
    for number, shard in enumerate(index.shards[done:], done):
        if shard.number != number or shard.stop - shard.start != index.shard_size:
            break
        ready += 1
    if not ready or ready < least:
        return index
    added = [ShardReader(folder, entry, index.layout) for entry in index.shards[done : done + ready]]
    checksums: dict[str, int] = {}

    def tensor(layer: str) -> NDArray[Any]:
        total = add_shards(running_sum(folder, index, layer), added, layer).total
        checksums[layer] = zlib.crc32(np.ascontiguousarray(total).data)
        return total

    path = folder / sum_name(done + ready)
    with replacing(path) as file:
        write_tensors(file, {layer: TensorSpec("float64", (D, D)) for layer, D in index.layout.widths.items()}, tensor)
    prompts = (index.sum.prompts if index.sum else 0) + sum(int(is_ok(reader).sum()) for reader in added)
    entry = SumEntry(sha256=sha256_of(path), bytes=path.stat().st_size, tensors=checksums, prompts=prompts)
    shards = tuple(
        shard.model_copy(update={"folded": True}) if number < done + ready else shard
        for number, shard in enumerate(index.shards)
    )
    changed = index.model_copy(update={"shards": shards, "sum": entry})
    write_index(folder, changed)
    remove_entries(folder, [reader.entry.number for reader in added])
    with readable_write_errors(folder):
        if done:
            (folder / sum_name(done)).unlink(missing_ok=True)
        for reader in added:
            (folder / SHARD_FOLDER / reader.entry.file).unlink(missing_ok=True)
    return changed
