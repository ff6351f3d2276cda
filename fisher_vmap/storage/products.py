"""The files made from the shards when a run ends: prompts.parquet, mean.safetensors, the npz and metadata.yaml."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import replacing, sha256_of
from fisher_vmap.storage.checking import check_sha256
from fisher_vmap.storage.index import MEAN_NAME, METADATA_NAME, TABLE_NAME, FileEntry, Index, npz_name
from fisher_vmap.storage.mean import write_mean
from fisher_vmap.storage.metadata import describe_run, write_metadata
from fisher_vmap.storage.npz import write_npz
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.table import common_schema, in_schema

Save = Literal["both", "prompts"]
GROUP_SHARDS, GROUP_BYTES = 100, 8 * 2**20


def readers(folder: Path, index: Index, verify: bool = True) -> Iterator[ShardReader]:
    """The shards of an index in order, each opened when its turn comes and not kept."""
    return (ShardReader(folder, entry, index.layout, verify) for entry in index.shards)


def product_names(index: Index, save: Save, export_npz: bool) -> list[str]:
    """Names of the files that a finished run has beside its shards.

    Raises:
        UserError: `save` is not "both" or "prompts".
    """
    if save not in ("both", "prompts"):
        raise UserError(f"save is {save!r}, expected 'both' (each prompt and the mean) or 'prompts'")
    names = [TABLE_NAME]
    if save == "both" and index.shards:
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
    if name == TABLE_NAME:
        write_table(path, lambda: readers(folder, index), index)
    elif name == MEAN_NAME:
        tensors = write_mean(path, lambda: readers(folder, index), index.layout.widths)
    elif name == METADATA_NAME:
        write_metadata(path, describe_run(index, readers(folder, index), settings))
    else:
        layer = next(layer for layer in index.layers if npz_name(layer, index.layers) == name)
        write_npz(path, readers(folder, index), layer)
    return FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size, tensors=tensors)


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
