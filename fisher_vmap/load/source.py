"""Find a model's files: on the hub, in a folder, or in a .gguf file, which is converted once into the user's cache."""

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from fisher_vmap.data.files import spelt_as_path
from fisher_vmap.errors import UserError
from fisher_vmap.load.folders import check_configured, check_whole
from fisher_vmap.load.options import LoadOptions
from fisher_vmap.progress import step

log = logging.getLogger(__name__)

ABANDONED_AFTER_S = 24 * 3600.0
UNUSED_AFTER_S = 7 * 24 * 3600.0


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide the progress bars of transformers within the context."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def refuse_empty(model_path: str, tokenizer: Any) -> None:
    """Raise UserError if the tokenizer has only special tokens; transformers makes such a one if files are missing."""
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"the tokenizer of {model_path} gives no tokens for any text; save its tokenizer into the folder "
            "(tokenizer.save_pretrained)"
        )


def explained(model_path: str, what: str, load: Any, *source: Any, hint: str = "", **options: Any) -> Any:
    """Call another library's loader; any error becomes a UserError with one line, which ends on `hint` if given."""
    try:
        return load(*source, **options)
    except UserError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        if isinstance(token := options.get("token"), str):
            message = message.replace(token, "the token")
        if re.search(r"gated repo|is restricted|\b40[13] Client Error", message):
            todo = "it is gated: accept its terms on its page, then `hf auth login`"
        elif "trust_remote_code" in message:
            todo = "it brings code of its own: read that, then set trust_remote_code: true"
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            todo = "it does not fit in memory: try device_map auto, another device or dtype"
        elif isinstance(error, ImportError):
            todo = "it needs a package that is not installed: install it"
        elif (
            "huggingface.co" in message
            or "is not a valid model identifier" in message
            or "not a local folder" in message
            or "Repo id must" in message
        ):
            todo = "the hub does not answer or has no such model: check the name, the network and `hf auth login`"
        elif what == "tokenizer":
            todo = "put the tokenizer's files next to the model's"
        else:
            todo = hint or "fetch it again, or give another model"
        first = message[:160] + ("..." if len(message) > 160 else "")
        raise UserError(
            f"the {what} of {model_path} cannot be loaded: {todo} ({type(error).__name__}: {first})"
        ) from error


def model_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The files of a model and its tokenizer, without other files that a trainer leaves in the folder.

    Args:
        folder: of the model.
        pickled: whether its .bin files are read even if there are .safetensors files.
    """
    safe = [] if pickled else [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_")]
    weights = safe or list(folder.glob("pytorch_model*.bin"))
    others = {path for pattern in ("config.json", "*.py") for path in folder.glob(pattern)}
    return sorted(path for path in {*weights, *others, *tokenizer_files(folder)} if path.is_file())


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer, including its chat template."""
    patterns = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"]
    patterns += ["*.model", "*.jinja"]
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def hashed(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file by name. Two fine-tuned models may differ only in their weights."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as threads:  # hashing releases the GIL
        return dict(zip([path.name for path in paths], threads.map(sha256, paths), strict=True))


def cache_folder() -> Path:
    """Where converted models are kept: `fisher_vmap` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fisher_vmap"


def converted(path: Path, sha256: str, dtype: torch.dtype) -> Path:
    """The folder that holds the model and the tokenizer of a .gguf file, with its weights unpacked to `dtype`.

    The conversion is kept in the cache by the file's content, the dtype and the version of transformers. Those of
    other versions are removed when they were not used for a week.

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
    """Remove conversions of the same file by other versions of transformers that were not used for a week.

    A process that has opened a copy keeps its mapping. The copy is renamed first, so that no process finds half of it.
    """
    for other in folder.parent.glob(f"{content}*"):
        if other != folder and time.time() - other.stat().st_mtime > UNUSED_AFTER_S:
            gone = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent)) / other.name
            other.rename(gone)
            shutil.rmtree(gone.parent, ignore_errors=True)


def _remove_abandoned(cache: Path) -> None:
    """Remove the files of conversions that were killed; they are as large as the models."""
    for scratch in cache.glob(".converting-*"):
        with suppress(FileNotFoundError):  # it may just have been finished
            if time.time() - scratch.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _convert(path: Path, dtype: torch.dtype, folder: Path) -> None:
    for package in ("gguf", "accelerate"):  # transformers needs both; this message is shorter
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
    except Exception as error:  # reading a damaged file may raise anything
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


def without_slash(name: str) -> str:
    """A model's name without a slash at its end, which a hub id must not have.

    Raises:
        UserError: it is a web address.
    """
    if address := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)|https?://", name):
        todo = f"give the model's id, {address[1]}" if address[1] else "give a hub id or a folder"
        raise UserError(f"{name} is a web address; {todo}")
    return name.rstrip("/") or name


def local_source(model_path: str, subfolder: str = "") -> Path | None:
    """The .gguf file or the folder that holds a local model's configuration; None: the model is on the hub.

    Raises:
        UserError: there is no such model, or it is of another kind.
    """
    local = Path(model_path).expanduser()
    hub_gguf = local.suffix == ".gguf" and not local.exists() and model_path.count("/") == 2
    if hub_gguf and not spelt_as_path(model_path):
        return None
    if local.suffix == ".gguf" and not local.is_dir():
        if not local.is_file():
            raise UserError(f"model_path {model_path} is not a file; expected a hub id, a folder or a .gguf file")
        return local
    if local.is_dir():
        if not (local / subfolder).is_dir():
            raise UserError(f"model_path {model_path} has no folder {subfolder}, the subfolder in model_kwargs")
        check_configured(str(Path(model_path) / subfolder), local / subfolder)
        return local / subfolder
    if local.is_file():
        todo = "expected a hub id, a folder or a .gguf file"
        if (local.parent / "config.json").is_file():
            todo = f"give the folder that it lies in, {Path(model_path).parent}"
        raise UserError(f"model_path {model_path} is a single file; {todo}")
    if local.exists() or spelt_as_path(model_path) or model_path.count("/") > 1:
        raise UserError(f"model_path {model_path} is not there; expected a hub id, a folder or a .gguf file")
    return None


def source_of_model(model_path: str, revision: str | None, options: LoadOptions) -> tuple[str, dict[str, Any]]:
    """Find what `from_pretrained` takes for a model, and what identifies it.

    Args:
        model_path: a hub id, a folder, or a .gguf file, here or on the hub.
        revision: of what is on the hub.
        options: dtype: that a .gguf file is unpacked to; model_kwargs: a subfolder, the hub's cache.

    Returns:
        A hub id or a folder, and {"hub": id}, or the hashes of the files.

    Raises:
        UserError: there is no such model.
    """
    local = local_source(model_path, options.subfolder)
    if local is None and model_path.endswith(".gguf"):
        repository, _, name = model_path.rpartition("/")
        fetch = partial(hf_hub_download, repository, name, revision=revision)
        local = Path(explained(model_path, "file", fetch, **options.hub))
    if local is None:
        return model_path, {"hub": model_path}
    if local.is_file():
        sha256 = hashed([local])[local.name]
        with quiet_progress():
            return str(converted(local, sha256, getattr(torch, options.dtype))), {"gguf": sha256}
    files = model_files(local, pickled=options.loading.get("use_safetensors") is False)
    if options.subfolder and not tokenizer_files(local):
        files += tokenizer_files(Path(model_path).expanduser())
    check_whole(model_path, local, files, usual=not {"variant", "use_safetensors"} & set(options.loading))
    return str(local), {"files": hashed(files)}


def read_tokenizer(model_path: str, source: str, revision: str | None, options: LoadOptions, **where: Any) -> Any:
    """The tokenizer of a model: the one in its subfolder, else that of the folder or repository.

    Args:
        model_path: as it was given.
        source: a hub id, or the folder that the model's files are in.
        revision: of a hub model.
        options: of the model.
        where: further arguments of `from_pretrained`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if options.subfolder:
        at_hub = {"revision": revision, "subfolder": options.subfolder, **options.hub}
        if Path(source).is_dir():
            inside = bool(tokenizer_files(Path(source)))
            source = source if inside else str(Path(model_path).expanduser())
        else:
            found = partial(transformers.utils.cached_file, _raise_exceptions_for_missing_entries=False)
            inside = explained(model_path, "tokenizer", found, source, "tokenizer_config.json", **at_hub) is not None
            where |= {"subfolder": options.subfolder} if inside else {}
        if not inside:
            log.info("%s: the subfolder %s has no tokenizer: that of the model's top is taken", model_path,
                     options.subfolder)  # fmt: skip
    load = transformers.AutoTokenizer.from_pretrained
    return explained(model_path, "tokenizer", load, source, revision=revision, **options.files, **where)


def log_missing_local(model_path: str) -> None:
    """Log that a missing path that looks local is looked up on the hub, which may take a while."""
    path = Path(model_path)
    if len(path.parts) == 2 and path.parent.is_dir() and not path.exists():
        log.info("there is no folder %s (but there is %s); looking on the hub", model_path, path.parent)
