"""Paths of this machine among a run's settings, which may hold a user's name: only their last part leaves the machine.

"owner/name" may be an id on the hub or a folder. The run knows which it was and writes it down (`found_here`), so that
nothing depends on what lies in the working folder of whoever exports the results.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from fisher_vmap.results.index import Index

RECORD = "local_paths"
"""The name under which `Index.resolved` holds what `found_here` gave."""

_PATHS_OR_IDS = ("model_path", "adapter_path", "dataset_name")
_PATHS = ("chat_template_file", "output_dir")
_WITH_PATHS_INSIDE = ("model_kwargs",)  # such as its cache_dir and offload_folder
_SPELT_AS_PATH = re.compile(r"[/\\~.]|[A-Za-z]:[\\/]|file:|.*\\")


def last_part(path: str) -> str:
    r"""The last part of a path of this or another system: "tiny" of /home/ada/tiny, ../tiny/ and C:\models\tiny."""
    stem = path.rstrip("/\\")
    name = re.split(r"[/\\]", stem)[-1]
    return "~" if name.startswith("~") and name == stem else name or path[:1]


def found_here(settings: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are paths of this machine, of those that may be ids of the hub as well.

    It looks from the working folder, as the run does.

    Args:
        settings: by name.
    """
    given = {name: settings[name] for name in _PATHS_OR_IDS if isinstance(settings.get(name), str)}
    return [n for n, value in given.items() if _SPELT_AS_PATH.match(value) or os.path.exists(os.path.expanduser(value))]


def was_local(name: str, value: Any, index: Index) -> bool:
    """Whether a setting was a path of the machine that ran, as far as its folder tells.

    A folder without a record (of version 0.1.0) tells it by what identifies the model and the data; where it does not,
    a name with one slash counts as an id on the hub.
    """
    if name not in (*_PATHS_OR_IDS, *_PATHS) or not isinstance(value, str):
        return False
    if name in _PATHS or _SPELT_AS_PATH.match(value):
        return True
    recorded = (index.resolved or {}).get(RECORD)
    if isinstance(recorded, list):
        return name in recorded
    model, data = index.fingerprint.get("model"), index.fingerprint.get("data")
    if name == "dataset_name" and isinstance(data, str):
        return not data.startswith("hub ")
    if name == "model_path" and isinstance(model, dict) and "adapter" not in model:
        return "files" in model
    return value.count("/") > 1 + value.endswith(".gguf")  # owner/name/file.gguf


def without_local_paths(values: Mapping[str, Any], index: Index) -> dict[str, Any]:
    """Settings, or a fingerprint that holds some, with every local path cut to its last part.

    Args:
        values: by name.
        index: of the folder that they are of.
    """

    def shared(name: str, value: Any) -> Any:
        if name in _WITH_PATHS_INSIDE:
            return _cut_inside(value)
        return last_part(value) if was_local(name, value, index) else value

    return {name: shared(name, value) for name, value in values.items()}


def _cut_inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _cut_inside(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_cut_inside(each) for each in value]
    return last_part(value) if isinstance(value, str) and _SPELT_AS_PATH.match(value) else value
