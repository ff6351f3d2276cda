"""The mean Fisher matrix: summed shard by shard, kept in mean.safetensors or, with `save: mean`, in a running sum.

A run with `save: mean` adds its shards to the sum in their order and removes their arrays (it folds them). The sum is a
file with a float64 matrix for each layer. The mean is the same to the bit as that of a run that keeps every shard.

A layer wider than `DENSE_WIDTH`, such as the unembedding, whose width is the vocabulary's size, has no dense mean: it
would take 4 D^2 bytes on the disk and five times as many in memory. Its directions, contrasts and traces come from the
prompts' factors (`algebra.mean_factors`).
"""

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.progress import readable
from fisher_vmap.results.files import check_sha256, check_size, damaged, passes, readable_write_errors, replacing
from fisher_vmap.results.index import (
    MEAN_NAME,
    SHARD_FOLDER,
    FileEntry,
    Index,
    ShardLayout,
    SumEntry,
    remove_entries,
    sum_name,
    write_index,
)
from fisher_vmap.results.record import Float32
from fisher_vmap.results.shard import TensorSpec, write_tensors
from fisher_vmap.results.shard_reader import Chooser, ShardReader, is_ok, readers

DENSE_WIDTH = 16_384  # up to here a layer's mean is kept as a matrix: 1.07 GB in float32, 5.4 GB while it is made

FOLD_SHARDS = 32  # folded at a time, since every time the sums of all layers are written again

PIECE_BYTES = 32 * 2**20  # of vectors whose products are taken at once

_GEMM_ROWS = 4096

logger = logging.getLogger(__name__)


def dense_layers(layout: ShardLayout) -> dict[str, int]:
    """The layers whose mean is kept as a matrix, with their widths."""
    return {layer: D for layer, D in layout.widths.items() if D <= DENSE_WIDTH}


def why_no_mean(layout: ShardLayout) -> list[str]:
    """A line for each layer that is too wide for a dense mean."""
    return [
        f"{layer} has the width {D:,}, and above {DENSE_WIDTH:,} no mean is written: results.directions() and "
        "contrast() work from the prompts' factors"
        for layer, D in layout.widths.items()
        if D > DENSE_WIDTH
    ]


def check_dense(layout: ShardLayout, layer: str) -> None:
    """Raise UserError if a layer is too wide for a dense mean."""
    if layer not in dense_layers(layout):
        D = layout.widths[layer]
        raise UserError(
            f"the mean at {layer} would be a matrix of {D:,} x {D:,} ({readable(4 * D * D)}), and above a width of "
            f"{DENSE_WIDTH:,} none is made; use results.directions(), contrast() or mean_factors(), which need no "
            "such matrix"
        )


def check_means_only(layout: ShardLayout) -> None:
    """Raise UserError if only means are to be kept, and a layer is too wide to have one."""
    wide = [layer for layer in layout.widths if layer not in dense_layers(layout)]
    if layout.means_only and wide:
        raise UserError(
            f"save is mean, but {wide[0]} has the width {layout.widths[wide[0]]:,}, and above {DENSE_WIDTH:,} no mean "
            "is made; set save: prompts, or hook another layer"
        )


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
    """Add the Fisher matrices F = V^T diag(S) V of the chosen prompts to the sum `before`.

    With W = diag(sqrt S) V, the rows of all prompts of a shard below one another, their sum is W^T W: one float64
    matrix product for each shard, in memory that does not grow with the number of prompts.

    Args:
        before: the sum so far, or None.
        readers: the shards; at least one if `before` is None.
        layer: the layer's name.
        chosen: gives a mask [n] of the prompts of a shard; None takes all. Prompts without numbers are left out.
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


def mean_of_group(
    shards: Callable[[], Iterable[ShardReader]], layout: ShardLayout, layer: str, chosen: Chooser
) -> tuple[Any, int]:
    """The mean over a group of prompts: a matrix [D, D], or its factors at a wide layer; and the number of prompts."""
    if layer not in dense_layers(layout):
        found = mean_by_factors(shards, layout, layer, chosen)
        return found, found.prompts
    total = add_shards(None, shards(), layer, chosen)
    return total.mean(), total.prompts


def mean_by_factors(
    shards: Callable[[], Iterable[ShardReader]], layout: ShardLayout, layer: str, chosen: Chooser
) -> algebra.MeanFactors:
    """The mean over a group of prompts by its eigenvalues and eigenvectors.

    Args:
        shards: gives the readers of all shards.
        layout: shapes and dtypes.
        layer: the layer's name.
        chosen: gives a mask [n] of the prompts of a shard.
    """
    D = layout.widths[layer]
    if layer in dense_layers(layout) and (total := add_shards(None, shards(), layer, chosen)).prompts:
        mean = total.mean()
        S, V = algebra.eigenvectors(mean, D)
        rank = int((algebra.NOISE * S[0] < S).sum())
        return algebra.MeanFactors(S[:rank], V[:rank], float(np.trace(mean)), total.prompts)
    found = algebra.mean_factors(_matrices(shards(), layer, chosen), D)
    if found.share < 1 - 1e-6:
        logger.info(
            "the mean at %s is kept as its %s leading directions, %.1f%% of its trace: those of all its %s prompts "
            "would not fit in memory", layer, f"{len(found.S):,}", 100 * found.share, f"{found.prompts:,}",
        )  # fmt: skip
    return found


def _matrices(readers: Iterable[ShardReader], layer: str, chosen: Chooser) -> Iterator[tuple[Float32, Float32]]:
    """S [n, R] and V [n, R, D] of the prompts that are chosen and have numbers, a few at a time."""
    for reader in readers:
        few = max(1, PIECE_BYTES // (4 * reader.layout.rank * reader.layout.widths[layer]))
        rows = np.flatnonzero(chosen(reader) & is_ok(reader))
        if len(rows):
            stack = reader.stack(layer)
            for start in range(0, len(rows), few):
                part = rows[start : start + few]
                yield stack.S[part], stack.V[part]


def write_mean(path: Path, widths: dict[str, int], sum_of: Callable[[str], RunningSum]) -> dict[str, int]:
    """Write each layer's mean, [D, D] float32, one layer in memory at a time; returns the CRC-32 of each."""
    return _write_matrices(path, widths, np.float32, lambda layer: sum_of(layer).mean())


def read_mean(path: Path, entry: FileEntry, layer: str, width: int, verify: bool = True) -> Float32:
    """Read one layer of mean.safetensors: [D, D] float32."""
    return _read_matrix(path, entry, layer, width, np.float32, verify)


def running_sum(folder: Path, index: Index, layer: str, verify: bool = True) -> RunningSum | None:
    """The sum over the folded shards at one layer, or None if none is folded."""
    if index.sum is None:
        return None
    path, width = folder / sum_name(index.folded), index.layout.widths[layer]
    return RunningSum(_read_matrix(path, index.sum, layer, width, np.float64, verify), index.sum.prompts)


def sum_is_intact(folder: Path, index: Index) -> bool:
    """Whether the file of the sum is unchanged, or the index has none."""
    entry = index.sum
    return entry is None or passes(check_sha256, folder / sum_name(index.folded), entry.bytes, entry.sha256)


def fold(folder: Path, index: Index, least: int = FOLD_SHARDS) -> Index:
    """Fold the full shards that follow the folded ones, if there are at least `least` of them.

    The new sum has its own file name and counts once index.json lists it, so a kill at any moment loses nothing.

    Returns:
        The new index, which is written; the same object if nothing was folded.

    Raises:
        UserError: a shard or the sum is damaged, or the folder cannot be written.
    """
    if not index.layout.means_only:
        return index
    done = stop = index.folded
    for shard in index.shards[done:]:
        if shard.number != stop or shard.stop - shard.start != index.shard_size:
            break
        stop += 1
    if stop == done or stop - done < least:
        return index
    added = [ShardReader(folder, entry, index.layout) for entry in index.shards[done:stop]]
    path = folder / sum_name(stop)
    checksums = _write_matrices(
        path,
        index.layout.widths,
        np.float64,
        lambda layer: add_shards(running_sum(folder, index, layer), added, layer).total,
    )
    prompts = (index.sum.prompts if index.sum else 0) + sum(int(is_ok(reader).sum()) for reader in added)
    folded = tuple(shard.model_copy(update={"folded": True}) for shard in index.shards[:stop])
    entry = SumEntry.of(path, tensors=checksums, prompts=prompts)
    changed = index.model_copy(update={"shards": (*folded, *index.shards[stop:]), "sum": entry})
    write_index(folder, changed)
    remove_entries(folder, range(done, stop))
    with readable_write_errors(folder):
        if done:
            (folder / sum_name(done)).unlink(missing_ok=True)
        for reader in added:
            (folder / SHARD_FOLDER / reader.entry.file).unlink(missing_ok=True)
    return changed


def _write_matrices(
    path: Path, widths: dict[str, int], dtype: type[Any], matrix: Callable[[str], NDArray[Any]]
) -> dict[str, int]:
    """Write "<layer>": [D, D] for each layer; returns their CRC-32, so that one can be checked without the others."""
    checksums: dict[str, int] = {}

    def tensor(layer: str) -> NDArray[Any]:
        stored = np.ascontiguousarray(matrix(layer), dtype)
        checksums[layer] = zlib.crc32(stored.data)
        return stored

    with replacing(path) as file:
        write_tensors(file, {name: TensorSpec(np.dtype(dtype).name, (D, D)) for name, D in widths.items()}, tensor)
    return checksums


def _read_matrix(
    path: Path, entry: FileEntry, layer: str, width: int, dtype: type[Any], verify: bool = True
) -> NDArray[Any]:
    """Read one layer's matrix [D, D]; raise UserError if the file is missing or damaged."""
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


def mean_of(folder: Path, index: Index, layer: str, verify: bool = True) -> Float32:
    """The mean matrix over all prompts at one layer, [D, D] float32, from mean.safetensors or the shards.

    Raises:
        UserError: the layer is too wide for a dense mean, or a file is damaged.
    """
    width = index.layout.widths[layer]
    if (entry := index.files.get(MEAN_NAME)) and layer in entry.tensors:
        return read_mean(folder / MEAN_NAME, entry, layer, width, verify)
    check_dense(index.layout, layer)
    if not index.shards:
        return np.full((width, width), np.nan, np.float32)
    return sum_of(folder, index, layer, readers(folder, index, verify), verify).mean().astype(np.float32)


def sum_of(folder: Path, index: Index, layer: str, shards: Iterable[ShardReader], verify: bool = True) -> RunningSum:
    """The sum over all shards at one layer, folded ones included."""
    single = (reader for reader in shards if not reader.entry.folded)
    return add_shards(running_sum(folder, index, layer, verify), single, layer)
