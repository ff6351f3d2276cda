"""Settings for other people's eyes: a path of this machine says nothing to them, and may hold its user's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATH_SETTINGS = ("model_path", "adapter_path", "dataset_name", "output_dir")


def without_local_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with paths of this machine cut to their last part."""
    return {name: Path(value).name if is_local_path(name, value) else value for name, value in settings.items()}


def is_local_path(setting: str, value: Any) -> bool:
    """Whether a setting is a path that leads out of the working folder; a hub id and a file beside it are none."""
    if setting not in PATH_SETTINGS or not isinstance(value, str):
        return False
    return Path(value).is_absolute() or value.startswith(("~", ".."))
