"""The beginning of a run: a folder is made, or what an earlier process began in it is carried on.

Is a folder of this run? Settings as they are stored, and every difference between two of them in one line.

Which files of a folder are ours: what may be resumed, what may be removed, and what is to be left alone.

Which shards are as they were written. A checksum reads the whole shard, so a process compares each of them once.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import (
    LOCK_NAME,
    TEMPORARY_NAME,
    folder_lock,
    readable_write_errors,
    remove_stale_temporaries,
)
from fisher_vmap.results.index import (
    INDEX_NAME,
    MEAN_NAME,
    METADATA_NAME,
    SHARD_FOLDER,
    TABLE_NAME,
    Index,
    ShardEntry,
    installed_versions,
    is_index,
    read_index,
    sum_name,
    write_index,
)
from fisher_vmap.results.shard_reader import ShardReader
from fisher_vmap.results.table import ShardLayout
from fisher_vmap.run.cli_args import RETIRED

_SHOWN = 60  # characters of a setting's value in an error
# What is compared under a name that is no setting's: the setting that it comes from.
_SETTINGS = {"layers": "hook_layer_name", "column": "prompt_column", "top_k": "top_k_tokens",
             "rank": "num_singular_values", "device_type": "device"}  # fmt: skip


def plain_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back, so that stored and new ones compare equal: tuples become lists, paths text."""
    text = json.dumps(dict(settings), default=str, ensure_ascii=False)
    # A file name that is not UTF-8 comes from the command line as half surrogates, which no file here could hold.
    plain: dict[str, Any] = json.loads(text.encode("utf-8", "replace"))
    return plain


def compare_fingerprints(folder: Path, stored: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to mix results of different settings in one folder.

    Raises:
        UserError: naming every setting that differs, in one line.
    """
    here, there = _flat(plain_values(new)), _flat(plain_values(stored))
    different = [key for key in {**here, **there} if key not in RETIRED and here.get(key) != there.get(key)]
    if different:
        parts = [f"{_SETTINGS.get(key, key)} is {_shown(here, key)} here but {_shown(there, key)}" for key in different]
        raise UserError(f"{', '.join(parts)} in {folder}; use another --output_dir or --overwrite")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value})
    return flat


def _shown(settings: Mapping[str, Any], key: str) -> str:
    text = " ".join(str(settings[key]).split()) if key in settings else "not set"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


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


class Soundness:
    """What this process knows of the shards of one run: those that it wrote, read or compared are known to be sound."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder, self._layout = folder, layout
        self._sound: set[ShardEntry] = set()

    def know(self, entries: Iterable[ShardEntry]) -> None:
        """Take the word of whoever has just written these shards, or read them whole."""
        self._sound.update(entries)

    def is_sound(self, entry: ShardEntry) -> bool:
        """Whether the shard is what its entry says, to the bit; of a known one, whether it is still there."""
        if entry in self._sound:
            return self.is_there(entry)
        sound = self._reader(entry).is_sound()
        if sound:
            self._sound.add(entry)
        return sound

    def is_there(self, entry: ShardEntry) -> bool:
        """Whether the shard's files are there, with the sizes that its entry has."""
        return self._reader(entry).is_there()

    def check_sizes(self, entry: ShardEntry) -> None:
        """Raise UserError, naming the file, where `is_there` says no."""
        self._reader(entry).check_sizes()

    def _reader(self, entry: ShardEntry) -> ShardReader:
        return ShardReader(self._folder, entry, self._layout)


logger = logging.getLogger(__name__)


def begin_folder(
    folder: Path,
    *,
    layout: ShardLayout,
    shard_size: int,
    fingerprint: dict[str, Any],
    resolved: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Index:
    """The index of the run in `folder`, on the disk: a new one, or that of the same run begun before.

    Arguments and errors are those of `ResultsWriter.open`; `resolved` is for a new run alone.
    """
    layout.check()
    fingerprint = plain_values(fingerprint)
    inspect_folder(folder, fingerprint, overwrite)
    with readable_write_errors(folder):
        (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
    with folder_lock(folder):
        # Looked at again, since another process may have begun the same run a moment ago.
        index = inspect_folder(folder, fingerprint, overwrite)
        if index is None:
            index = Index(
                shard_size=shard_size,
                layout=layout,
                fingerprint=fingerprint,
                resolved=None if resolved is None else plain_values(resolved),
                versions=installed_versions(),
                settings=None if settings is None else plain_values(settings),
            )
            write_index(folder, index)
        else:
            compare_fingerprints(folder, _shape(index.shard_size, index.layout), _shape(shard_size, layout))
            if settings is not None and plain_values(settings) != index.settings:
                index = index.model_copy(update={"settings": plain_values(settings)})
                write_index(folder, index)
        if overwrite:
            remove_leftovers(folder, index)
        else:  # shards without an entry stay: a worker may have stored them a moment ago
            with readable_write_errors(folder):
                remove_stale_temporaries(folder)
                remove_stale_temporaries(folder / SHARD_FOLDER)
    _tell_versions(folder, index.versions)
    for name in RETIRED:
        if name in index.fingerprint:
            what = "may differ in their last digits" if (index.resolved or {}).get(name) is True else "are the same"
            logger.warning("%s was begun with the setting %s, which is gone: numbers %s", folder, name, what)
    return index


def _shape(shard_size: int, layout: ShardLayout) -> dict[str, Any]:
    """What the shards look like, as settings: compared like the fingerprint, so that a difference is named alike."""
    shape = layout.model_dump()
    return {"shard_size": shard_size, "save": "mean" if shape.pop("means_only") else "both or prompts", **shape}


def _tell_versions(folder: Path, stored: dict[str, str]) -> None:
    here = installed_versions()
    if other := [f"{name} {stored[name]} (now {here.get(name)})" for name in stored if here.get(name) != stored[name]]:
        logger.warning("%s was begun with %s: numbers may differ in their last digits", folder, ", ".join(other))
