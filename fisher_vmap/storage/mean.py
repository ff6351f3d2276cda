"""The mean Fisher matrix of many prompts, shard by shard, and mean.safetensors."""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap.storage.atomic import replacing
from fisher_vmap.storage.checking import check_size, damaged
from fisher_vmap.storage.index import FileEntry
from fisher_vmap.storage.reading import Float32, ShardReader
from fisher_vmap.storage.selection import Chooser
from fisher_vmap.storage.tensors import TensorSpec, write_tensors

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
