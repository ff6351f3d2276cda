"""Which files of a folder are ours: what may be resumed, what may be removed, and what is to be left alone."""

import re
from pathlib import Path

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import TEMPORARY_NAME, readable_write_errors, remove_stale_temporaries
from fisher_vmap.storage.entries import SHARD_FOLDER
from fisher_vmap.storage.fingerprint import compare_fingerprints
from fisher_vmap.storage.index import (
    INDEX_NAME,
    MEAN_NAME,
    METADATA_NAME,
    TABLE_NAME,
    Index,
    is_index,
    read_index,
    sum_name,
)
from fisher_vmap.storage.lock import LOCK_NAME

_TOP_NAMES = re.compile(
    "|".join(map(re.escape, (INDEX_NAME, MEAN_NAME, METADATA_NAME, TABLE_NAME, LOCK_NAME)))
    + r"|fisher_matrices_compressed(\..+)?\.npz|sum-\d{5,}\.safetensors"
)
_SHARD_NAMES = re.compile(r"shard-\d{5,}\.(safetensors|parquet|json)")


def inspect_folder(folder: Path, fingerprint: dict[str, object] | None = None, overwrite: bool = False) -> Index | None:
    """Look before anything heavy is loaded: may a run with this fingerprint use the folder?

    Args:
        folder: the results folder; it need not exist.
        fingerprint: every setting that changes results; None leaves the comparison out.
        overwrite: the run starts anew, so that an older run in the folder does not matter.

    Returns:
        The index of the run that is to be carried on, or None for a new one.

    Raises:
        UserError: the folder is a file, holds files that are not ours, has a damaged index, or holds results of other
            settings.
    """
    with readable_write_errors(folder):
        if not folder.exists() and not folder.is_symlink():
            return None
        if not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder; choose another --output_dir")
        if (folder / INDEX_NAME).exists():
            if overwrite and is_index(folder):
                return None
            index = read_index(folder)
            if fingerprint is not None:
                compare_fingerprints(folder, index.fingerprint, fingerprint)
            return index
        # Without an index.json nothing proves that files are ours, whatever their names: a run writes it first.
        ours, foreign = _contents(folder)
        begun_meanwhile = (folder / INDEX_NAME).exists()
    if begun_meanwhile:
        return inspect_folder(folder, fingerprint, overwrite)
    if found := foreign + ours:
        raise UserError(
            f"{folder} holds other files (such as {found[0]}) and no index.json; choose another --output_dir"
        )
    return None


def remove_leftovers(folder: Path, index: Index) -> None:
    """Remove files of ours that the index does not list, and temporary files of processes that are dead.

    Raises:
        UserError: a file cannot be removed.
    """
    listed = {INDEX_NAME, LOCK_NAME, *index.files}
    for shard in index.shards:
        listed |= {f"{SHARD_FOLDER}/{name}" for name in ((shard.table,) if shard.folded else (shard.file, shard.table))}
    if index.sum is not None:
        listed.add(sum_name(index.folded))
    with readable_write_errors(folder):
        for name in _contents(folder)[0]:
            if name not in listed:
                (folder / name).unlink(missing_ok=True)
        remove_stale_temporaries(folder)
        remove_stale_temporaries(folder / SHARD_FOLDER)


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Names of files of ours that hold results, and of files that are not ours, each sorted."""
    ours: list[str] = []
    foreign: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name == SHARD_FOLDER and path.is_dir():
            for shard in sorted(path.iterdir()):
                if not shard.name.startswith("."):
                    (ours if _SHARD_NAMES.fullmatch(shard.name) else foreign).append(f"{SHARD_FOLDER}/{shard.name}")
        elif path.name == LOCK_NAME or TEMPORARY_NAME.match(path.name):
            continue
        elif _TOP_NAMES.fullmatch(path.name) and not path.is_dir():
            ours.append(path.name)
        elif not path.name.startswith(".") and path.name != "lost+found":  # what file systems and desktops leave
            foreign.append(path.name)
    return ours, foreign
