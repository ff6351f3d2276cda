"""What a folder says of all its prompts together: the table, the mean, the run in words.

A finished run has a file of each, and an unfinished one, or one that was asked for less, its shards: the same is made
from those.

metadata.yaml: the run in words, for people and for readers that know nothing of index.json.

The npz export: U_{i} [D, R], S_{i} [R], V_{i} [R, D], float32, for each prompt index i; F = U @ np.diag(S) @ V.

It is written as a stream, one array at a time. Only the archive's table of contents, about a kilobyte a prompt, is held
until the end, as the zip format has it. No pickle is involved: `np.load(path)` reads it with its defaults.

The files made from the shards when a run ends: prompts.parquet, mean.safetensors, the npz and metadata.yaml.

The end of a run: the files made from all shards are written, then the index says complete.
"""

import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from fisher_vmap.errors import UserError
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.files import check_sha256, folder_lock, read_checked, replacing, sha256_of
from fisher_vmap.results.folder import compare_fingerprints, plain_values, remove_leftovers
from fisher_vmap.results.index import (
    MEAN_NAME,
    METADATA_NAME,
    TABLE_NAME,
    FileEntry,
    Index,
    npz_name,
    read_index,
    write_index,
)
from fisher_vmap.results.mean import RunningSum, add_shards, fold, read_mean, running_sum, write_mean
from fisher_vmap.results.shard_reader import Float32, ShardReader, readers
from fisher_vmap.results.table import common_schema, in_schema


def describe_run(index: Index, readers: Iterable[ShardReader], settings: dict[str, Any]) -> dict[str, Any]:
    """Number of prompts, shapes, failed and skipped prompts with their reasons, settings and versions.

    `bias_dim` is D, or {layer: D} where the layers differ.
    """
    without: dict[str, list[dict[str, Any]]] = {"failed": [], "skipped": []}
    for reader in readers:
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


def write_metadata(path: Path, metadata: dict[str, Any]) -> None:
    """Write metadata.yaml.

    Raises:
        UserError: the folder cannot be written.
    """
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=120)
    with replacing(path) as file:
        file.write(text.encode())


def read_metadata(path: Path, text: bytes) -> dict[str, Any]:
    """Parse metadata.yaml.

    Raises:
        UserError: it is not what `write_metadata` writes.
    """
    try:
        metadata = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a metadata.yaml of a results folder")
    return metadata


_ZIP64_FROM = 2**31 - 4096


def npz_arrays(readers: Iterable[ShardReader], layer: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and arrays of the export in the order of the file; NaN for prompts without numbers."""
    for reader in readers:
        S, V, _ = reader.stack(layer)
        for row, index in enumerate(range(reader.entry.start, reader.entry.stop)):
            yield f"U_{index}", np.ascontiguousarray(V[row].T)  # F is symmetric
            yield f"S_{index}", S[row]
            yield f"V_{index}", V[row]


def write_npz(path: Path, readers: Iterable[ShardReader], layer: str) -> None:
    """Write one layer's npz.

    Raises:
        UserError: a shard is damaged, or the folder cannot be written.
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in npz_arrays(readers, layer):
            _add(archive, name, array)


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


def _add(archive: zipfile.ZipFile, name: str, array: NDArray[Any]) -> None:
    # A ZipInfo of our own has no time of day in it: the same results give the same bytes.
    info = zipfile.ZipInfo(f"{name}.npy")
    with archive.open(info, "w", force_zip64=array.nbytes >= _ZIP64_FROM) as entry:
        np.lib.format.write_array(entry, array, allow_pickle=False)


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


def finish_folder(
    folder: Path,
    fingerprint: dict[str, Any],
    num_prompts: int | None = None,
    *,
    settings: dict[str, Any] | None = None,
    save: Save = "both",
    export_npz: bool = True,
) -> Index:
    """Make prompts.parquet, mean.safetensors, the npz and metadata.yaml, and mark the folder complete.

    A folder that has all of it already is left alone. Whoever is killed in here can be followed by anyone: what is
    whole is kept, the rest is done again.

    Args:
        folder: a results folder with all its shards.
        fingerprint: that of the run that finishes it.
        num_prompts: by default the number that `ResultsWriter.missing_shards` was asked for.
        settings: the settings used, for metadata.yaml; None: those that the index has.
        save: "both", "prompts" to leave the mean out, or "mean" to leave the prompts' matrices out.
        export_npz: write the npz, about twice as large as the shards.

    Returns:
        The index of the finished folder.

    Raises:
        UserError: a shard is missing or damaged, the disk is full, or the folder is of another run.
    """
    with step("finishing the folder"), folder_lock(folder):
        index = read_index(folder)
        compare_fingerprints(folder, index.fingerprint, fingerprint)
        total = max(index.num_prompts or 0 if num_prompts is None else num_prompts, index.stop)
        if missing := index.missing(total):
            numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise UserError(
                f"{folder} lacks {len(missing)} shards ({numbers}) of its {total} prompts; run the same command again, "
                f"with num_prompts {total} or more"
            )
        settings = (index.settings or {}) if settings is None else settings
        names = product_names(index, save, export_npz)
        index = fold(folder, index, least=1)
        whole = {name: index.files[name] for name in names if is_whole(folder, name, index.files.get(name))}
        if not (index.complete and set(whole) == set(names) == set(index.files)):
            # metadata.yaml, the last, is written anew with any other file: the settings may have changed with it.
            files = {name: entry for name, entry in whole.items() if name != names[-1]}
            index = index.model_copy(update={"complete": False, "num_prompts": total, "files": files})
            write_index(folder, index)
            for name in names:
                if name not in files:
                    files = dict(sorted({**files, name: write_product(folder, name, index, settings)}.items()))
                    index = index.model_copy(update={"files": files, "complete": len(files) == len(names)})
                    write_index(folder, index)
        remove_leftovers(folder, index)
    return index


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
