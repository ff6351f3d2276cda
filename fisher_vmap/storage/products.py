"""The files made from the shards when a run ends: prompts.parquet, mean.safetensors, the npz and metadata.yaml."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.errors import UserError
from fisher_vmap.progress import bar, passing
from fisher_vmap.storage.atomic import replacing, sha256_of
from fisher_vmap.storage.checking import check_sha256
from fisher_vmap.storage.folding import running_sum
from fisher_vmap.storage.index import MEAN_NAME, METADATA_NAME, TABLE_NAME, FileEntry, Index, npz_name
from fisher_vmap.storage.mean import RunningSum, add_shards, write_mean
from fisher_vmap.storage.metadata import describe_run, write_metadata
from fisher_vmap.storage.npz import write_npz
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.shard_readers import readers
from fisher_vmap.storage.table import common_schema, in_schema

Save = Literal["both", "prompts", "mean"]
NPZ_PROMPTS = 10_000  # up to here `export_npz: auto` writes the npz
GROUP_SHARDS, GROUP_BYTES = 100, 8 * 2**20


def wants_npz(export_npz: bool | Literal["auto"], save: Save, num_prompts: int) -> bool:
    """Whether a run writes the npz: what its setting says; auto: unless the mean alone is kept or the prompts many."""
    return (save != "mean" and num_prompts <= NPZ_PROMPTS) if export_npz == "auto" else export_npz


def product_names(index: Index, save: Save, export_npz: bool) -> list[str]:
    """Names of the files that a finished run has beside its shards.

    Raises:
        UserError: `save` is not one of the three, or is not how the run was begun.
    """
    if save not in ("both", "prompts", "mean"):
        raise UserError(f"save is {save!r}, expected 'both' (each prompt and the mean), 'prompts' or 'mean'")
    if (save == "mean") != index.layout.means_only:
        raise UserError(f"save is {save!r}, but the run was begun {'with' if save != 'mean' else 'without'} 'mean'")
    if export_npz and save == "mean":
        raise UserError("export_npz needs each prompt's matrix, and save: mean keeps none; leave one of the two out")
    names = [TABLE_NAME]
    if save != "prompts" and index.shards:
        names.append(MEAN_NAME)
    if export_npz:
        names += [npz_name(layer, index.layers) for layer in index.layers]
    return [*names, METADATA_NAME]


def is_whole(folder: Path, name: str, entry: FileEntry | None) -> bool:
    """Is the file there, as the index has it?"""
    if entry is None:
        return False
    try:
        check_sha256(folder / name, entry.bytes, entry.sha256)
    except UserError:
        return False
    return True


def write_product(folder: Path, name: str, index: Index, settings: dict[str, Any]) -> FileEntry:
    """Write one of `product_names` from the shards, reading each shard once or twice and holding one at a time.

    Raises:
        UserError: a shard is damaged, or the folder cannot be written.
    """
    path = folder / name
    tensors: dict[str, int] = {}
    times = {TABLE_NAME: 2, MEAN_NAME: len(index.layers)}.get(name, 1)  # that each shard is read
    with bar(times * len(index.shards), "shards", f"writing {name}") as advance:

        def shards() -> Iterator[ShardReader]:
            return passing(readers(folder, index), advance)

        if name == TABLE_NAME:
            write_table(path, shards, index)
        elif name == MEAN_NAME:
            tensors = write_mean(path, index.layout.widths, lambda layer: _sum(folder, index, layer, shards()))
        elif name == METADATA_NAME:
            write_metadata(path, describe_run(index, shards(), settings))
        else:
            layer = next(layer for layer in index.layers if npz_name(layer, index.layers) == name)
            write_npz(path, shards(), layer)
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size, tensors=tensors)


def sum_over_all(folder: Path, index: Index, layer: str, verify: bool = True) -> RunningSum:
    """The sum over all prompts with numbers at one layer: what has been folded, and the other shards."""
    return _sum(folder, index, layer, readers(folder, index, verify), verify)


def _sum(folder: Path, index: Index, layer: str, shards: Iterator[ShardReader], verify: bool = True) -> RunningSum:
    single = (reader for reader in shards if not reader.entry.folded)
    return add_shards(running_sum(folder, index, layer, verify), single, layer)


def write_table(path: Path, shards: Callable[[], Iterator[ShardReader]], index: Index) -> None:
    """Join the shards' rows into prompts.parquet, in row groups of `GROUP_SHARDS` shards, or fewer if they are large.

    Each row group costs its description, a kilobyte a column, in the memory of whoever writes or reads the file.
    """
    schema = common_schema((reader.table.schema for reader in shards()), index.layout)
    with replacing(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        group, size = list[pa.Table](), 0
        for reader in shards():
            group.append(in_schema(reader.table, schema))
            size += group[-1].nbytes
            if len(group) == GROUP_SHARDS or size >= GROUP_BYTES:
                writer.write_table(pa.concat_tables(group))
                group, size = [], 0
        if group:
            writer.write_table(pa.concat_tables(group))
