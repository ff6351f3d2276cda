"""A copy of a results folder without the prompts' text, sound in itself: for sharing what may be shared."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.storage.atomic import readable_write_errors, replacing, sha256_of
from fisher_vmap.storage.entries import SHARD_FOLDER, ShardEntry
from fisher_vmap.storage.index import TABLE_NAME, FileEntry, Index, sum_name, write_index
from fisher_vmap.storage.products import write_table
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.shard_readers import readers


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
        entry = FileEntry(sha256=sha256_of(target / TABLE_NAME), bytes=(target / TABLE_NAME).stat().st_size)
        copied = copied.model_copy(update={"files": {**copied.files, TABLE_NAME: entry}})
    write_index(target, copied)
    return copied


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
