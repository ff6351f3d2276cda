"""What may be shared of a results folder, sound in itself: a copy without the prompts' text, or with other settings."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.storage.atomic import readable_write_errors, replacing, sha256_of
from fisher_vmap.storage.entries import SHARD_FOLDER, ShardEntry
from fisher_vmap.storage.index import METADATA_NAME, TABLE_NAME, FileEntry, Index, sum_name, write_index
from fisher_vmap.storage.metadata import write_metadata
from fisher_vmap.storage.products import write_table
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.shard_readers import readers
from fisher_vmap.storage.summaries import metadata_of


def copy_without_text(folder: Path, index: Index, target: Path) -> Index:
    """Copy a finished folder, leaving out the text, the prompts' tokens and the kept columns that hold text.

    The numbers are the same files, linked where the file system can.

    Args:
        folder: the finished folder.
        index: its index.
        target: the folder that is made.

    Returns:
        The index of the copy.

    Raises:
        UserError: the folder is damaged, or the copy cannot be written.
    """
    with readable_write_errors(target):
        (target / SHARD_FOLDER).mkdir(parents=True)
        for name in [*(name for name in index.files if name != TABLE_NAME), *_sums(index)]:
            _link(folder / name, target / name)
        shards = tuple(_copy_shard(reader, target) for reader in readers(folder, index))
    layout = index.layout.model_copy(update={"store_text": False})
    copied = index.model_copy(update={"shards": shards, "layout": layout})
    if TABLE_NAME in index.files:
        write_table(target / TABLE_NAME, lambda: readers(target, copied), copied)
        copied = _with_file(copied, target / TABLE_NAME)
    write_index(target, copied)
    return copied


def copy_descriptions(
    folder: Path, index: Index, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> Index:
    """Write metadata.yaml and index.json, which hold a run's settings, with the settings changed; nothing else.

    Args:
        folder: the finished folder.
        index: its index.
        target: the folder that is made, for these two files alone.
        change: gives the settings to write for those that were stored.

    Returns:
        The index that is written: of `folder`'s other files, and of the new metadata.yaml.

    Raises:
        UserError: metadata.yaml is damaged, or the files cannot be written.
    """
    metadata = metadata_of(folder, index)
    with readable_write_errors(target):
        target.mkdir(parents=True)
    write_metadata(target / METADATA_NAME, {**metadata, "settings": change(metadata["settings"])})
    settings = None if index.settings is None else change(index.settings)
    written = _with_file(index.model_copy(update={"settings": settings}), target / METADATA_NAME)
    write_index(target, written)
    return written


def _with_file(index: Index, path: Path) -> Index:
    entry = FileEntry(sha256=sha256_of(path), bytes=path.stat().st_size)
    return index.model_copy(update={"files": {**index.files, path.name: entry}})


def _sums(index: Index) -> Iterator[str]:
    if index.sum is not None:
        yield sum_name(index.folded)


def _copy_shard(reader: ShardReader, target: Path) -> ShardEntry:
    if not reader.entry.folded:
        _link(reader.path, target / SHARD_FOLDER / reader.entry.file)
    table = reader.table
    for name in ("text", "prompt_tokens", *reader.layout.keep_columns):
        if name not in table.schema.names or not _holds_text(table.schema.field(name).type):
            continue
        place = table.schema.get_field_index(name)
        table = table.set_column(
            place, table.schema.field(name), pa.nulls(table.num_rows, table.schema.field(name).type)
        )
    path = target / SHARD_FOLDER / reader.entry.table
    with replacing(path) as file:
        pq.write_table(table, file, compression="zstd")
    return reader.entry.model_copy(update={"table_sha256": sha256_of(path), "table_bytes": path.stat().st_size})


def _holds_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_list(kind))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
