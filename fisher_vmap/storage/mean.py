"""The mean Fisher matrix of many prompts, shard by shard, and mean.safetensors."""

import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap.storage.atomic import replacing
from fisher_vmap.storage.checking import check_size, damaged
from fisher_vmap.storage.index import FileEntry
from fisher_vmap.storage.reading import Float32, ShardReader
from fisher_vmap.storage.tensors import TensorSpec, write_tensors

_GEMM_ROWS = 4096


def mean_matrix(
    readers: Iterable[ShardReader], layer: str, chosen: Callable[[ShardReader], NDArray[np.bool_]]
) -> NDArray[np.float64]:
    """Mean over the chosen prompts of F = V^T diag(S) V.

    With W = diag(sqrt S) V, the rows of all prompts of a shard below one another, the sum over them is W^T W: one
    matrix product a shard, in float64, in memory that does not grow with the number of prompts.

    Args:
        readers: the shards.
        layer: the layer's name.
        chosen: for a shard, a mask [n] of the prompts to take; prompts without numbers are always left out.

    Returns:
        [D, D] float64, symmetric; NaN where no prompt is chosen.
    """
    total: NDArray[np.float64] | None = None
    count = 0
    for reader in readers:
        width = reader.layout.widths[layer]
        total = np.zeros((width, width)) if total is None else total
        mask = chosen(reader) & is_ok(reader)
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
    return total / count if count else np.full_like(total, np.nan)


def is_ok(reader: ShardReader) -> NDArray[np.bool_]:
    """[n] which prompts of a shard have numbers."""
    return np.array([status == "ok" for status in reader.table.column("status").to_pylist()], bool)


def write_mean(path: Path, readers: Callable[[], Iterable[ShardReader]], widths: dict[str, int]) -> dict[str, int]:
    """Write "<layer>": [D, D] float32, the mean over all prompts with numbers, one layer in memory at a time.

    Returns:
        The CRC-32 of each tensor, so that one can be read and checked without the others.
    """
    checksums: dict[str, int] = {}

    def tensor(layer: str) -> NDArray[Any]:
        matrix = mean_matrix(readers(), layer, lambda reader: np.ones(reader.entry.stop - reader.entry.start, bool))
        stored = matrix.astype(np.float32)
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
    check_size(path, entry.bytes)
    try:
        with safe_open(path, framework="np") as file:
            matrix: Float32 = file.get_tensor(layer)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error
    if matrix.shape != (width, width) or matrix.dtype != np.float32:
        raise damaged(path, f"{layer} is {matrix.dtype} {matrix.shape}")
    if verify and zlib.crc32(np.ascontiguousarray(matrix).data) != entry.tensors.get(layer):
        raise damaged(path, f"the mean of {layer} differs from its checksum")
    return matrix
