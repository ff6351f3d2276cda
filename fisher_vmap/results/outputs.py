"""The files made from all shards: prompts.parquet, mean.safetensors, the npz and metadata.yaml.

The same contents can be computed from the shards where a run is unfinished, or did not write the file; the means by
`fisher_vmap.results.means`.

The npz holds, for each prompt index i, U_{i} [D, R], S_{i} [R] and V_{i} [R, D], float32, with F = U @ np.diag(S) @ V.
It is written one array at a time; only its table of contents, about a kilobyte a prompt, is held until the end. It
needs no pickle: `np.load(path)` reads it with its defaults.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from fisher_vmap.errors import UserError
from fisher_vmap.progress import bar, passing
from fisher_vmap.results.files import damaged, read_checked, replacing
from fisher_vmap.results.folder import plain_values
from fisher_vmap.results.index import (
    MEAN_NAME,
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    FileEntry,
    Index,
    ShardLayout,
    npz_name,
)
from fisher_vmap.results.means import dense_layers, sum_of, write_mean
from fisher_vmap.results.shard import common_schema, in_schema, rows_table
from fisher_vmap.results.shard_reader import ShardReader, readers
from fisher_vmap.results.targets import note_of

Save = Literal["both", "prompts", "mean"]
NPZ_PROMPTS = 10_000  # up to here `export_npz: auto` writes the npz
GROUP_SHARDS, GROUP_BYTES = 100, 8 * 2**20  # most shards in a row group of prompts.parquet, and most bytes

_ZIP64_FROM = 2**31 - 4096


def wants_npz(export_npz: bool | Literal["auto"], save: Save, num_prompts: int) -> bool:
    """Whether a run writes the npz. With "auto" it does if it keeps the prompts' matrices and they are not too many."""
    return (save != "mean" and num_prompts <= NPZ_PROMPTS) if export_npz == "auto" else export_npz


def product_names(index: Index, save: Save, export_npz: bool) -> list[str]:
    """Names of the files that a finished run has beside its shards.

    Raises:
        UserError: `save` is not one of the three, or not the one that the run began with.
    """
    if save not in ("both", "prompts", "mean"):
        raise UserError(f"save is {save!r}, expected 'both' (each prompt and the mean), 'prompts' or 'mean'")
    if (save == "mean") != index.layout.means_only:
        raise UserError(f"save is {save!r}, but the run was begun {'with' if save != 'mean' else 'without'} 'mean'")
    if export_npz and save == "mean":
        raise UserError("export_npz needs each prompt's matrix, and save: mean keeps none; leave one of the two out")
    names = [TABLE_NAME]
    if save != "prompts" and index.shards and dense_layers(index.layout):
        names.append(MEAN_NAME)
    if export_npz:
        names += [npz_name(layer, index.layers) for layer in index.layers]
    return [*names, METADATA_NAME]


def write_product(folder: Path, name: str, index: Index, settings: dict[str, Any]) -> FileEntry:
    """Write one of `product_names`, with one shard in memory at a time."""
    path = folder / name
    tensors: dict[str, int] = {}
    dense = dense_layers(index.layout)
    times = {TABLE_NAME: 2, MEAN_NAME: len(dense)}.get(name, 1)  # that each shard is read
    with bar(times * len(index.shards), "shards", f"writing {name}") as advance:

        def shards() -> Iterator[ShardReader]:
            return passing(readers(folder, index), advance)

        if name == TABLE_NAME:
            write_table(path, shards, index)
        elif name == MEAN_NAME:
            tensors = write_mean(path, dense, lambda layer: sum_of(folder, index, layer, shards()))
        elif name == METADATA_NAME:
            write_metadata(path, _describe_run(index, shards(), settings))
        else:
            layer = next(layer for layer in index.layers if npz_name(layer, index.layers) == name)
            write_npz(path, shards(), layer)
    return FileEntry.of(path, tensors=tensors)


def write_table(path: Path, shards: Callable[[], Iterator[ShardReader]], index: Index) -> None:
    """Join the shards' rows into prompts.parquet, in row groups of `GROUP_SHARDS` shards, or fewer if they are large.

    The description of each row group takes about a kilobyte a column in the memory of the writer and every reader.
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


def table_of(folder: Path, index: Index, verify: bool = True) -> pa.Table:
    """The prompts table, from prompts.parquet or the shards."""
    if entry := index.files.get(TABLE_NAME):
        data = read_checked(folder / TABLE_NAME, entry.bytes, entry.sha256, verify)
        return pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
    schema = common_schema((reader.table.schema for reader in readers(folder, index, verify)), index.layout)
    tables = [in_schema(reader.table, schema) for reader in readers(folder, index, verify)]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def columns_of(folder: Path, index: Index, names: Sequence[str]) -> pa.Table:
    """Some columns of the prompts table, those that it has, without reading the others.

    Raises:
        UserError: a table is missing or damaged.
    """
    tables = [folder / SHARD_FOLDER / entry.table for entry in index.shards]
    found = []
    for path in [folder / TABLE_NAME] if TABLE_NAME in index.files else tables:
        try:
            with pq.ParquetFile(path) as file:  # `read_table` would look for columns in the path
                found.append(file.read(columns=[name for name in names if name in file.schema_arrow.names]))
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from error
    if not found:
        return rows_table([], index.layout, {}).select(names)
    there = [name for name in names if all(name in table.schema.names for table in found)]
    return pa.concat_tables([table.select(there) for table in found])


def note_on_targets(folder: Path, index: Index) -> str | None:
    """A line if the last token is the only target, and what follows it is certain in most prompts; else None.

    Raises:
        UserError: the folder is damaged.
    """
    if index.layout.pairs:
        return None
    table = columns_of(folder, index, ("status", "mass", "top_probability"))
    table = table.filter(pc.field("status") == "ok")
    if "top_probability" in table.schema.names:
        return note_of(table.column("top_probability").to_numpy())
    # A folder of before. No token is likelier than all K are together, so that most folders end here.
    if note_of(table.column("mass").to_numpy()) is None or index.folded:
        return None
    p = np.concatenate([reader.top_probability() for reader in readers(folder, index)])
    return note_of(p[np.isfinite(p)])


def metadata_of(folder: Path, index: Index, verify: bool = True) -> dict[str, Any]:
    """The contents of metadata.yaml, or the same from the shards, without settings."""
    entry = index.files.get(METADATA_NAME)
    if entry is None:
        return _describe_run(index, readers(folder, index, verify), {})
    path = folder / METADATA_NAME
    try:
        metadata = yaml.safe_load(read_checked(path, entry.bytes, entry.sha256, verify))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a metadata.yaml of a results folder")
    return metadata


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata.yaml."""
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as file:
        file.write(text.encode())


def _describe_run(index: Index, shards: Iterable[ShardReader], settings: dict[str, Any]) -> dict[str, Any]:
    """The contents of metadata.yaml. `bias_dim` is D, or {layer: D} if the layers differ."""
    without: dict[str, list[dict[str, Any]]] = {"failed": [], "skipped": []}
    for reader in shards:
        columns = (reader.table.column(name).to_pylist() for name in ("prompt_index", "status", "reason"))
        for prompt, status, reason in zip(*columns, strict=True):
            if status in without:
                without[status].append({"index": prompt, "reason": reason})
    widths = index.layout.widths
    left_out = [layer for layer in widths if layer not in dense_layers(index.layout)]
    return {
        "num_prompts": index.stop,
        "num_singular_values": index.layout.rank,
        "top_k_tokens": index.layout.top_k,
        "layers": list(widths),
        "bias_dim": dict(widths) if len(set(widths.values())) > 1 else next(iter(widths.values())),
        "vectors_dtype": index.layout.vectors_dtype,
        **({"mean_left_out": left_out} if left_out else {}),
        "failed_prompts": without["failed"],
        "skipped_prompts": without["skipped"],
        "settings": plain_values(settings),
        "resolved": index.resolved,
        "versions": index.versions,
    }


def npz_arrays(readers: Iterable[ShardReader], layer: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and arrays of the npz in the order of the file; NaN for prompts without numbers."""
    for reader in readers:
        S, V, _ = reader.stack(layer)
        for row, index in enumerate(range(reader.entry.start, reader.entry.stop)):
            yield f"U_{index}", np.ascontiguousarray(V[row].T)  # F is symmetric
            yield f"S_{index}", S[row]
            yield f"V_{index}", V[row]


def write_npz(path: Path, readers: Iterable[ShardReader], layer: str) -> None:
    """Write one layer's npz."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in npz_arrays(readers, layer):
            info = zipfile.ZipInfo(
                f"{name}.npy"
            )  # without the time of day, so that the same results give the same bytes
            with archive.open(info, "w", force_zip64=array.nbytes >= _ZIP64_FROM) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def finish_memory(layout: ShardLayout, shard_size: int, prompts: int, save: Save, export_npz: bool) -> dict[str, int]:
    """Bytes that the largest files made at the end take in memory: the mean of the widest layer, and the npz."""
    dense, n = list(dense_layers(layout).values()), min(shard_size, prompts)
    parts = {}
    if save != "prompts" and dense:
        D = max(dense)
        # The sum, a shard's product and its rows; then the sum, the mean, and the mean in float32.
        parts["mean"] = max(16 * D * D + 16 * n * layout.rank * D, 20 * D * D)
    if export_npz:
        # A shard's vectors as read and in float32 beside those of the shard before; and the table of contents.
        parts["npz"] = 12 * n * layout.rank * max(layout.widths.values()) + 3 * 500 * prompts
    return parts


def npz_size(prompts: int, rank: int, width: int) -> int:
    """Bytes of the npz of so many prompts, R and D."""
    total = 22  # the end of the table of contents
    for digits in range(1, len(str(max(prompts - 1, 0))) + 1):
        count = min(prompts, 10**digits) - (10 ** (digits - 1) if digits > 1 else 0)
        name = len("U_.npy") + digits
        # Of each array: its header in the archive, numpy's own, the numbers, and its line in the table of contents.
        arrays = sum(30 + name + 128 + 4 * size + 46 + name for size in (width * rank, rank, rank * width))
        total += count * arrays
    return total
