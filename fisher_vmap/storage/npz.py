"""The npz export: U_{i} [D, R], S_{i} [R], V_{i} [R, D], float32, for each prompt index i; F = U @ np.diag(S) @ V.

It is written as a stream, one array at a time. Only the archive's table of contents, about a kilobyte a prompt, is held
until the end, as the zip format has it. No pickle is involved: `np.load(path)` reads it with its defaults.
"""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.storage.atomic import replacing
from fisher_vmap.storage.reading import ShardReader

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
