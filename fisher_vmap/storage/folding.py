"""Shards of a run that keeps means only are folded into a running sum, and their arrays removed.

The sum is a file of its own, a float64 matrix a layer. Shards go in one by one, in their order, whatever the number
folded at a time, so the mean is to the bit that of a run which keeps everything.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import readable_write_errors, replacing, sha256_of
from fisher_vmap.storage.checking import check_sha256
from fisher_vmap.storage.entries import SHARD_FOLDER, remove_entries
from fisher_vmap.storage.index import Index, SumEntry, sum_name, write_index
from fisher_vmap.storage.mean import RunningSum, add_shards, is_ok, read_matrix
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.tensors import TensorSpec, write_tensors

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
