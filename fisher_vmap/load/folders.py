"""What is wrong with a model's folder, in one line, before anything of it is loaded."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fisher_vmap.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
POINTER = b"version https://git-lfs"


def check_configured(model_path: str, folder: Path) -> None:
    """Raise UserError unless the folder holds the configuration of a language model of transformers."""
    if (folder / "modules.json").is_file():
        raise UserError(
            f"model_path {model_path} is a sentence-transformers model (it has a modules.json), which makes vectors of "
            "sentences; expected a decoder-only causal LM"
        )
    if (folder / "config.json").is_file():
        return
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    snapshots = sorted(folder.glob("snapshots/*/config.json"))
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if ggufs:
        hint = f"give the file {folder / ggufs[0]}"
    elif (folder / "model_index.json").is_file():
        hint = "it is a pipeline of diffusers (it has a model_index.json); expected a causal LM"
    elif snapshots:
        hint = f"it is a folder of the hub's cache; give {snapshots[-1].parent}"
    elif (folder / "params.json").is_file() or any(folder.glob("consolidated*")):
        hint = "its weights are in their maker's own format; convert them, or fetch the model for transformers"
    elif inside:
        more = f" ({len(inside)} have one)" if len(inside) > 1 else ""
        hint = f"give a folder in it that has one, such as {folder / inside[-1]}{more}"
    else:
        hint = "expected a folder as save_pretrained writes it"
    raise UserError(f"model_path {model_path} has no config.json; {hint}")


def check_whole(model_path: str, folder: Path, files: Iterable[Path], *, usual: bool) -> None:
    """Raise UserError for files that are missing, damaged, or pointers to what was not downloaded.

    Args:
        model_path: for messages.
        folder: of the model.
        files: that are read.
        usual: whether the weights have their usual names, so that it is known which files they are.
    """
    failed = f"the model of {model_path} cannot be loaded"
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"{failed}: {path.name} is only a pointer of Git LFS; run `git lfs pull` in {folder}, or fetch the "
                    "model with `hf download`"
                )
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if not usual or weights is None:
        return
    parts = [weights]
    if weights.suffix == ".json":
        try:
            parts = [folder / name for name in sorted({*json.loads(weights.read_bytes())["weight_map"].values()})]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{failed}: {weights.name} is damaged; fetch it again") from error
    if missing := [path.name for path in parts if not path.is_file()]:
        raise UserError(
            f"{failed}: {len(missing)} of the {len(parts)} files that {weights.name} names are not there "
            f"({missing[0]}{' ...' if len(missing) > 1 else ''}); fetch it again"
        )
    for path in parts:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{failed}: {path.name} is damaged ({reason}); fetch it again") from error
