"""The beginning of a run: a folder is made, or what an earlier process began in it is carried on."""

import logging
from pathlib import Path
from typing import Any

from fisher_vmap.settings.settings_input import RETIRED
from fisher_vmap.storage.atomic import readable_write_errors, remove_stale_temporaries
from fisher_vmap.storage.entries import SHARD_FOLDER
from fisher_vmap.storage.fingerprint import compare_fingerprints, plain_values
from fisher_vmap.storage.folder import inspect_folder, remove_leftovers
from fisher_vmap.storage.index import Index, write_index
from fisher_vmap.storage.lock import folder_lock
from fisher_vmap.storage.records import ShardLayout
from fisher_vmap.storage.versions import installed_versions

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
