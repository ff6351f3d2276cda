"""A lens's folder: lens.json, what the fit is and what came of it; sums in shards/; and at the end the lens."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.lens.flags import PT_NAME, SAFETENSORS_NAME, LensSettings
from fisher_vmap.lens.sums import part_files
from fisher_vmap.results.files import readable_write_errors, replacing
from fisher_vmap.results.local_paths import found_here, last_part

INFO_NAME = "lens.json"
READOUTS = "readouts.json"
NEEDED = ("fingerprint", "shard_size", "threads", "model", "data", "versions", "precision")  # in lens.json


def read_info(folder: Path) -> dict[str, Any] | None:
    """The contents of lens.json; None: there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        info = json.loads((folder / INFO_NAME).read_text("utf-8"))
        if missing := [name for name in NEEDED if name not in info]:
            raise ValueError(f"{missing[0]} is missing")
        return dict(info, fingerprint={"precision": "auto"} | dict(info["fingerprint"]))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INFO_NAME} cannot be read ({error}); use another --output_dir") from error


def inspect(settings: LensSettings) -> dict[str, Any] | None:
    """What is stored in the folder, before anything large is loaded; None: a new fit.

    Raises:
        UserError: the folder holds something else.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder; choose another --output_dir")
    # Listed before lens.json is looked for, which another process may write meanwhile, and always writes first.
    others = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")] if folder.is_dir() else []
    if not (folder / INFO_NAME).exists():
        if others:
            raise UserError(
                f"{folder} holds other files (such as {others[0].name}) and no {INFO_NAME}; choose another --output_dir"
            )
        return None
    return None if settings.overwrite else read_info(folder)


def told(settings: LensSettings, name: str) -> str:
    """A setting for others to read: of paths of this machine the last part alone."""
    value = str(getattr(settings, name))
    return last_part(value) if name in found_here({name: value}) else value


def remove(folder: Path) -> None:
    """Remove the files of a fit."""
    for path in [*part_files(folder), *(folder / name for name in (PT_NAME, SAFETENSORS_NAME, READOUTS, INFO_NAME))]:
        with readable_write_errors(path):
            path.unlink(missing_ok=True)


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Replace lens.json."""
    with replacing(folder / INFO_NAME) as file:
        file.write((json.dumps(dict(info), indent=1, ensure_ascii=False) + "\n").encode())
