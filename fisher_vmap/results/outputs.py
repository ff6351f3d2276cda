"""The files made from all shards: prompts.parquet, mean.safetensors, the npz and metadata.yaml.

The same contents can be computed from the shards where a run is unfinished, or did not write the file.

The npz holds, for each prompt index i, U_{i} [D, R], S_{i} [R] and V_{i} [R, D], float32, with F = U @ np.diag(S) @ V.
It is written one array at a time; only its table of contents, about a kilobyte a prompt, is held until the end. It
needs no pickle: `np.load(path)` reads it with its defaults.

The mean Fisher matrix: summed shard by shard, kept in mean.safetensors or, with `save: mean`, in a running sum.

A run with `save: mean` adds its shards to the sum in their order and removes their arrays (it folds them). The sum is a
file with a float64 matrix for each layer. The mean is the same to the bit as that of a run that keeps every shard.
"""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fisher_vmap.errors import UserError
from fisher_vmap.progress import bar, passing
from fisher_vmap.results.files import (
    check_sha256,
    check_size,
    damaged,
    passes,
    read_checked,
    readable_write_errors,
    replacing,
)
from fisher_vmap.results.folder import plain_values
from fisher_vmap.results.index import (
    MEAN_NAME,
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    FileEntry,
    Index,
    SumEntry,
    npz_name,
    remove_entries,
    sum_name,
    write_index,
)
from fisher_vmap.results.record import Float32
from fisher_vmap.results.shard import TensorSpec, common_schema, in_schema, write_tensors
from fisher_vmap.results.shard_reader import Chooser, ShardReader, is_ok, readers

FOLD_SHARDS = 32  # folded at a time, since every time the sums of all layers are written again

_GEMM_ROWS = 4096


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
    if save != "prompts" and index.shards:
        names.append(MEAN_NAME)
    if export_npz:
        names += [npz_name(layer, index.layers) for layer in index.layers]
    return [*names, METADATA_NAME]


def write_product(folder: Path, name: str, index: Index, settings: dict[str, Any]) -> FileEntry:
    """Write one of `product_names`, with one shard in memory at a time."""
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


def mean_of(folder: Path, index: Index, layer: str, verify: bool = True) -> Float32:
    """The mean matrix over all prompts at one layer, [D, D] float32, from mean.safetensors or the shards."""
    width = index.layout.widths[layer]
    if entry := index.files.get(MEAN_NAME):
        return read_mean(folder / MEAN_NAME, entry, layer, width, verify)
    if not index.shards:
        return np.full((width, width), np.nan, np.float32)
    return _sum(folder, index, layer, readers(folder, index, verify), verify).mean().astype(np.float32)


def _sum(folder: Path, index: Index, layer: str, shards: Iterator[ShardReader], verify: bool = True) -> RunningSum:
    single = (reader for reader in shards if not reader.entry.folded)
    return add_shards(running_sum(folder, index, layer, verify), single, layer)


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
    return {
        "num_prompts": index.stop,
        "num_singular_values": index.layout.rank,
        "top_k_tokens": index.layout.top_k,
        "layers": list(widths),
        "bias_dim": dict(widths) if len(set(widths.values())) > 1 else next(iter(widths.values())),
        "vectors_dtype": index.layout.vectors_dtype,
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
