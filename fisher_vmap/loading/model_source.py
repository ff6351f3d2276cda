"""Where a model's files are: on the hub, in a folder, or in a .gguf file, which is unpacked into a folder."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from fisher_vmap.errors import UserError
from fisher_vmap.loading.adapters import without_adapter
from fisher_vmap.loading.gguf_model import converted
from fisher_vmap.loading.loader_errors import explained, quiet_progress
from fisher_vmap.loading.model_files import hashed, model_files
from fisher_vmap.settings.path_names import spelt_as_path

log = logging.getLogger(__name__)


def source_of_model(model_path: str, revision: str | None, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is given for a model, and what identifies it.

    Args:
        model_path: a hub id, a folder, or a .gguf file, here or on the hub.
        revision: of what is on the hub.
        dtype: that a .gguf file is unpacked to.

    Returns:
        A hub id or a folder, and {"hub": id}, or the hashes of the files.

    Raises:
        UserError: there is no such model.
    """
    local = Path(model_path).expanduser()
    if local.suffix == ".gguf":
        if not local.exists() and model_path.count("/") == 2 and not spelt_as_path(model_path):
            repository, _, name = model_path.rpartition("/")
            local = Path(explained(model_path, "file", hf_hub_download, repository, name, revision=revision))
        if not local.is_file():
            raise UserError(f"model_path {model_path} is not a file; expected a hub id, a folder or a .gguf file")
        sha256 = hashed([local])[local.name]
        with quiet_progress():
            return str(converted(local, sha256, dtype)), {"gguf": sha256}
    if local.is_dir():
        if not (local / "config.json").is_file():
            ggufs = sorted(p.name for p in local.glob("*.gguf"))
            hint = f"give the file {local / ggufs[0]}" if ggufs else "expected a folder as save_pretrained writes it"
            raise UserError(f"model_path {model_path} has no config.json; {hint}")
        return str(local), {"files": hashed(model_files(local))}
    if local.is_file():
        todo = "expected a hub id, a folder or a .gguf file"
        if (local.parent / "config.json").is_file():
            todo = f"give the folder that it lies in, {Path(model_path).parent}"
        raise UserError(f"model_path {model_path} is a single file; {todo}")
    if local.exists() or spelt_as_path(model_path) or model_path.count("/") > 1:
        raise UserError(f"model_path {model_path} is not there; expected a hub id, a folder or a .gguf file")
    return model_path, {"hub": model_path}


def say_if_it_looks_local(model_path: str) -> None:
    """Tell who gives a folder that is not there, in one that is, that the hub is asked, which may take a while."""
    path = Path(model_path)
    if len(path.parts) == 2 and path.parent.is_dir() and not path.exists():
        log.info("%s is no folder here (%s is one); looking on the hub", model_path, path.parent)


@contextmanager
def without_adapter_inside(source: str) -> Iterator[str]:
    """The same for `from_pretrained`, but for an adapter that lies in the model's folder; see `without_adapter`."""
    if not Path(source).is_dir():
        yield source
        return
    with without_adapter(Path(source)) as folder:
        yield str(folder)
