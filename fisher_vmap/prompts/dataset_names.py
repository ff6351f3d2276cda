"""Which data set a `dataset_name` names: a file or a folder of this machine, or one of the hub."""

from __future__ import annotations

import logging
import os.path
import re
from pathlib import Path

from fisher_vmap.errors import UserError
from fisher_vmap.prompts.local_files import SUFFIXES, check_suffix
from fisher_vmap.prompts.tables import Table, table_of_files
from fisher_vmap.settings.path_names import spelt_as_path

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # to the `datasets` library these are not names of data sets
_MISSPELT = {"lmsys/lm-sys-chat-1m": "lmsys/lmsys-chat-1m"}


def open_table(name: str, *, config: str | None, split: str, revision: str | None, shuffle_seed: int | None) -> Table:
    """Open the data set of this name.

    Args:
        name: a path, or a hub id.
        config: configuration (subset) of a hub data set or folder; None: the default one.
        split: split of a hub data set or folder.
        revision: branch, tag or commit of a hub data set.
        shuffle_seed: of a hub data set, whose rows are shuffled as they come.

    Raises:
        UserError: no such data set, one that cannot be read, or a choice that this kind of data set does not have.
    """
    path, exists = Path(name), os.path.exists(name)  # the function takes names that no path can have
    if exists or path.suffix.lower() in SUFFIXES or spelt_as_path(name):
        if not exists:
            raise UserError(f"{name}: no such file or folder; correct dataset_name")
        if revision is not None:
            raise UserError(f"{name}: a local data set has no revisions; leave dataset_revision at none")
        if path.is_dir():
            from fisher_vmap.prompts.hf_datasets import open_folder  # the library takes half a second to import

            return open_folder(path, config=config, split=split)
        if not path.is_file():
            raise UserError(f"{name}: neither a file nor a folder; correct dataset_name")
        if config is not None or split != "train":
            raise UserError(f"{name}: one file has no splits; leave dataset_config at none and dataset_split at train")
        check_suffix(path)
        return table_of_files(name, [path])
    if name in _FORMATS or not _HUB_ID.fullmatch(name):
        kinds = ", ".join(SUFFIXES)
        raise UserError(
            f"{name}: no data set; expected a hub id such as lmsys/lmsys-chat-1m, a folder, or a {kinds} file"
        )
    if name in _MISSPELT:
        _log.info("dataset_name %s is taken for %s", name, _MISSPELT[name])
        name = _MISSPELT[name]
    from fisher_vmap.prompts.hf_datasets import open_hub

    return open_hub(name, config=config, split=split, revision=revision, shuffle_seed=shuffle_seed)
