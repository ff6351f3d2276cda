"""A .gguf file as an ordinary transformers folder: converted once, then read from the user's cache."""

import importlib.util
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError

from fisher_vmap.errors import UserError
from fisher_vmap.progress import step

log = logging.getLogger(__name__)

ABANDONED_AFTER_S = 24 * 3600.0
UNUSED_AFTER_S = 7 * 24 * 3600.0


def cache_folder() -> Path:
    """Where converted models are kept: `fisher_vmap` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fisher_vmap"


def converted(path: Path, sha256: str, dtype: torch.dtype) -> Path:
    """The folder that holds the model and the tokenizer of a .gguf file, with its weights unpacked to `dtype`.

    The conversion is kept for what the file holds, wherever it lies, the dtype, and the version of transformers, which
    makes the model of it. What another version has made of the same is removed when nobody has used it for a week.

    Args:
        path: the file.
        sha256: of the file.
        dtype: of the weights.

    Raises:
        UserError: the file cannot be read as GGUF, or the package `gguf` is missing.
    """
    content = f"gguf-{sha256[:16]}-{str(dtype).removeprefix('torch.')}-transformers-"
    folder = cache_folder() / f"{content}{transformers.__version__}"
    if folder.is_dir():
        with suppress(OSError):  # a cache that can only be read
            os.utime(folder)
            _remove_unused(folder, content)
        return folder
    log.info("converting %s once", path.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); set XDG_CACHE_HOME"
        ) from error
    try:
        with step(f"converting {path.name}"):
            _convert(path, dtype, scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first: its result is as good
                raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path.name} cannot be converted into {folder.parent} ({' '.join(str(error).split())[:160]}); make room "
            "there, or set XDG_CACHE_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    log.info("%s is kept, converted, in %s: %.0f MB", path.name, folder, size / 1e6)
    with suppress(OSError):
        _remove_unused(folder, content)
    return folder


def _remove_unused(folder: Path, content: str) -> None:
    """Remove what other versions of transformers have made of the same file and nobody has used for a week.

    A process that has opened such a copy keeps what it has mapped; one that is opening it has used it just now. The
    copy first gets another name, at once, so that nobody finds half of it.
    """
    for other in folder.parent.glob(f"{content}*"):
        if other != folder and time.time() - other.stat().st_mtime > UNUSED_AFTER_S:
            gone = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent)) / other.name
            other.rename(gone)
            shutil.rmtree(gone.parent, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove what conversions that were killed have left: as large as the models themselves."""
    for scratch in cache.glob(".converting-*"):
        with suppress(FileNotFoundError):  # it may just have been finished
            if time.time() - scratch.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _convert(path: Path, dtype: torch.dtype, folder: Path) -> None:
    for package in ("gguf", "accelerate"):  # transformers needs both and says so at length
        if importlib.util.find_spec(package) is None:
            raise UserError(f"reading {path.name} needs the package {package}: pip install 'fisher_vmap[gguf]'")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            **where,
            dtype=dtype,
            quantization_config=transformers.GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # whatever the readers of a damaged file stumble over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a GGUF language model ({reason}); fetch the file again") from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{path} lacks {len(missing)} weights ({missing[0]} ...): fetch it again; if it is one part of several, "
            "join them with llama-gguf-split --merge"
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
