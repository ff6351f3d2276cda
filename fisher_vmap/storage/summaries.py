"""What a folder says of all its prompts together: the table, the mean, the run in words.

A finished run has a file of each, and an unfinished one, or one that was asked for less, its shards: the same is made
from those.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.storage.checking import read_checked
from fisher_vmap.storage.index import MEAN_NAME, METADATA_NAME, TABLE_NAME, Index
from fisher_vmap.storage.mean import read_mean
from fisher_vmap.storage.metadata import describe_run, read_metadata
from fisher_vmap.storage.products import sum_over_all
from fisher_vmap.storage.reading import Float32
from fisher_vmap.storage.shard_readers import readers
from fisher_vmap.storage.table import common_schema, in_schema


def table_of(folder: Path, index: Index, verify: bool = True) -> pa.Table:
    """The prompts table, a row a prompt.

    Raises:
        UserError: the table, or a shard, is missing or damaged.
    """
    if entry := index.files.get(TABLE_NAME):
        data = read_checked(folder / TABLE_NAME, entry.bytes, entry.sha256, verify)
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    schema = common_schema((reader.table.schema for reader in readers(folder, index, verify)), index.layout)
    tables = [in_schema(reader.table, schema) for reader in readers(folder, index, verify)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def mean_of(folder: Path, index: Index, layer: str, verify: bool = True) -> Float32:
    """The mean matrix over all prompts at one layer, [D, D] float32; NaN of no prompts.

    Raises:
        UserError: the mean, or a shard, is missing or damaged.
    """
    width = index.layout.widths[layer]
    if entry := index.files.get(MEAN_NAME):
        return read_mean(folder / MEAN_NAME, entry, layer, width, verify)
    if not index.shards:
        return np.full((width, width), np.nan, np.float32)
    return sum_over_all(folder, index, layer, verify).mean().astype(np.float32)


def metadata_of(folder: Path, index: Index, verify: bool = True) -> dict[str, Any]:
    """What metadata.yaml holds; of an unfinished run, the same about what there is, without settings.

    Raises:
        UserError: metadata.yaml, or a shard, is missing or damaged.
    """
    if entry := index.files.get(METADATA_NAME):
        path = folder / METADATA_NAME
        return read_metadata(path, read_checked(path, entry.bytes, entry.sha256, verify))
    return describe_run(index, readers(folder, index, verify), {})
