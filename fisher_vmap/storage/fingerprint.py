"""Is a folder of this run? Settings as they are stored, and every difference between two of them in one line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.settings.settings_input import RETIRED

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
