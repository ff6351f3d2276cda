"""Which folders a run may use: the comparison of settings, and the names of our files."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import is_stream, readable_write_errors, remove_stale_temporaries
from fisher_vmap.results.index import (
    INDEX_NAME,
    MEAN_NAME,
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    Index,
    is_index,
    read_index,
    sum_name,
)

# Settings of earlier versions that no longer do anything. Files, command lines and folders with them still work.
RETIRED = {"compile": "torch.compile is no longer used"}

_SHOWN = 60  # characters of a setting's value in an error
# The settings behind values that are compared under other names.
_SETTINGS = {"layers": "hook_layer_name", "column": "prompt_column", "top_k": "top_k_tokens",
             "rank": "num_singular_values", "device_type": "device"}  # fmt: skip
_TOP_NAMES = re.compile(
    "|".join(map(re.escape, (INDEX_NAME, MEAN_NAME, METADATA_NAME, TABLE_NAME)))
    + r"|fisher_matrices_compressed(\..+)?\.npz|sum-\d{5,}\.safetensors"
)
_SHARD_NAMES = re.compile(r"shard-\d{5,}\.(safetensors|parquet|json)")
_LENS_INDEX = "lens.json"
_LENS_NAMES = re.compile(r"lens\.json|jacobian_lens\.(pt|safetensors)|readouts\.json|part-.+\.safetensors")


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read back from JSON: tuples become lists, and paths text."""
    text = json.dumps(dict(settings), default=str, ensure_ascii=False)
    # A file name on the command line that is not UTF-8 holds half surrogates, which cannot be stored.
    plain: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
    return plain


def compare_fingerprints(folder: Path, stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UserError, naming every setting that differs, unless both are the same run's."""
    here, there = _flat(plain_values(new)), _flat(plain_values(stored))
    different = [key for key in {**here, **there} if key not in RETIRED and here.get(key) != there.get(key)]
    if different:
        parts = [f"{_SETTINGS.get(key, key)} is {_shown(here, key)} here but {_shown(there, key)}" for key in different]
        raise UserError(f"{', '.join(parts)} in {folder}; use another --output_dir or --overwrite")


def inspect_folder(folder: Path, fingerprint: dict[str, object] | None = None, overwrite: bool = False) -> Index | None:
    """Check, before anything large is loaded, whether a run may use the folder.

    Args:
        folder: the results folder; it need not exist.
        fingerprint: every setting that changes results; None: do not compare them.
        overwrite: start anew, so that an older run in the folder does not matter.

    Returns:
        The index of the run to resume, or None for a new run.

    Raises:
        UserError: the folder is a file, holds files that are not ours, has a damaged index, or holds results of other
            settings.
    """
    with readable_write_errors(folder, "choose another --output_dir"):
        if not folder.exists() and not folder.is_symlink():
            return None
        if not folder.is_dir():
            raise UserError(f"{folder} is a file, not a folder; choose another --output_dir")
        if not (folder / INDEX_NAME).exists():
            # A run writes index.json first, so without it no file is ours, whatever its name.
            ours, others = _contents(folder)
            if not (folder / INDEX_NAME).exists():  # another process may have begun the run during the listing
                if not (found := others + ours):
                    return None
                named = f"other files (such as {found[0]}) and no index.json"
                raise UserError(f"{folder} holds {named}; choose another --output_dir")
        if overwrite and is_index(folder):
            return None
        index = read_index(folder)
        if fingerprint is not None:
            compare_fingerprints(folder, index.fingerprint, fingerprint)
        return index


def check_writable(folder: Path) -> None:
    """Make and remove a folder where a run's first files would go: in `folder`, or in the parent that is there.

    Trying is the only sure way. Permissions do not bind root, and mounts and network file systems have their own rules.

    Raises:
        UserError: nothing can be written there.
    """
    with readable_write_errors(folder, "choose another --output_dir"):
        for place in (folder / SHARD_FOLDER, folder, *folder.parents):
            if place.exists() or place.is_symlink():
                os.rmdir(tempfile.mkdtemp(prefix=".fisher_vmap~", dir=place))
                return


def check_output(path: Path, flag: str = "--output") -> None:
    """Check, before anything is computed for it, that a file can be written and is none of a results folder's own.

    Args:
        path: the file.
        flag: what names it on the command line.

    Raises:
        UserError: it is a folder or a file that holds results, or nothing can be written there.
    """
    check_not_ours(path, flag)
    if not is_stream(path):
        with readable_write_errors(path, f"choose another {flag}"):
            os.rmdir(tempfile.mkdtemp(prefix=".fisher_vmap~", dir=Path(os.path.realpath(path)).parent))


def check_not_ours(path: Path, flag: str) -> None:
    """Raise UserError for a folder, and for a file of a results folder."""
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a file; choose another {flag}")
    target = Path(os.path.realpath(path))
    in_shards = target.parent.name == SHARD_FOLDER
    folder = target.parent.parent if in_shards else target.parent
    names = _SHARD_NAMES if in_shards else _TOP_NAMES
    for what, index, ours in (("results", INDEX_NAME, names), ("lens", _LENS_INDEX, _LENS_NAMES)):
        if ours.fullmatch(target.name) and (folder / index).exists():
            raise UserError(f"{path} is a file of the {what} in {folder}; choose another {flag}")


def remove_leftovers(folder: Path, index: Index) -> None:
    """Remove our files that the index does not list, and temporary files of processes that have died."""
    listed = {INDEX_NAME, *index.files}
    for shard in index.shards:
        listed |= {f"{SHARD_FOLDER}/{name}" for name in ((shard.table,) if shard.folded else (shard.file, shard.table))}
    if index.sum is not None:
        listed.add(sum_name(index.folded))
    with readable_write_errors(folder):
        for name in _contents(folder)[0]:
            if name not in listed:
                (folder / name).unlink(missing_ok=True)
    remove_stale(folder)


def remove_stale(folder: Path) -> None:
    """Remove temporary files of processes that have died."""
    with readable_write_errors(folder):
        remove_stale_temporaries(folder)
        remove_stale_temporaries(folder / SHARD_FOLDER)


def _contents(folder: Path) -> tuple[list[str], list[str]]:
    """Names of our files that hold results, and of all other files, each sorted."""
    ours: list[str] = []
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name == SHARD_FOLDER and path.is_dir():
            for shard in sorted(path.iterdir()):
                if not shard.name.startswith("."):
                    (ours if _SHARD_NAMES.fullmatch(shard.name) else others).append(f"{SHARD_FOLDER}/{shard.name}")
        elif _TOP_NAMES.fullmatch(path.name) and not path.is_dir():
            ours.append(path.name)
        elif not path.name.startswith(".") and path.name != "lost+found":  # made by file systems and desktops
            others.append(path.name)
    return ours, others


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return flat


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = " ".join(str(settings[key]).split()) if key in settings else "not set"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
