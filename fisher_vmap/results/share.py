"""What may be shared of a results folder, sound in itself: a copy without the prompts' text, or with other settings.

Settings for other people's eyes: a path of this machine says nothing to them, and may hold its user's name.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.results.files import readable_write_errors, replacing, sha256_of
from fisher_vmap.results.index import (
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    FileEntry,
    Index,
    ShardEntry,
    sum_name,
    write_index,
)
from fisher_vmap.results.outputs import metadata_of, write_metadata, write_table
from fisher_vmap.results.shard_reader import ShardReader, readers

PATH_SETTINGS = ("model_path", "adapter_path", "dataset_name", "output_dir")


def without_local_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with paths of this machine cut to their last part."""
    return {name: Path(value).name if is_local_path(name, value) else value for name, value in settings.items()}


def is_local_path(setting: str, value: Any) -> bool:
    """Whether a setting is a path that leads out of the working folder; a hub id and a file beside it are none."""
    if setting not in PATH_SETTINGS or not isinstance(value, str):
        return False
    return Path(value).is_absolute() or value.startswith(("~", ".."))


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
