"""Load a causal LM and its tokenizer: a hub id, a folder, or a .gguf file."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from fisher_vmap.errors import UserError
from fisher_vmap.gguf_model import converted

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer, and what identifies its weights."""

    model: Any
    tokenizer: Any
    identity: dict[str, Any]


def choose_device(device: str) -> torch.device:
    """The device of that name; for "auto" CUDA, else MPS, else the CPU.

    Raises:
        UserError: no such device, or torch cannot use it.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
            torch.empty(1, device=chosen)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"device {device!r} cannot be used ({reason}); expected auto, cpu, cuda, cuda:1 or mps"
            ) from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        log.warning(
            "an NVIDIA GPU seems to be there, but torch %s cannot use it: running on the CPU", torch.__version__
        )
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def load_model(
    model_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "bfloat16",
    device: str = "auto",
) -> Loaded:
    """Load a causal LM.

    Args:
        model_path: a hub id ("owner/name"), a folder as `save_pretrained` writes it, or a .gguf file.
        revision: of a hub model: branch, tag or commit.
        trust_remote_code: whether code that comes with the model may run.
        dtype: "bfloat16", "float32", "float16" or "float64".
        device: "auto", or a torch device.

    Raises:
        UserError: the model is missing, gated, damaged or not a causal LM; one line that says what to do.
    """
    place = choose_device(device)
    weights_dtype = getattr(torch, dtype)
    local = Path(model_path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model_path {model_path} is not a file; expected a hub id, a folder or a .gguf file")
        with quiet_progress():
            source, identity = str(converted(local, weights_dtype)), _file_identity(local)
    elif local.is_dir():
        if not (local / "config.json").is_file():
            ggufs = sorted(p.name for p in local.glob("*.gguf"))
            hint = f"give the file {local / ggufs[0]}" if ggufs else "expected a folder as save_pretrained writes it"
            raise UserError(f"model_path {model_path} has no config.json; {hint}")
        source, identity = str(local), _folder_identity(local)
    elif local.exists() or model_path.startswith((".", "/", "~")) or model_path.count("/") > 1:
        raise UserError(f"model_path {model_path} is not there; expected a hub id, a folder or a .gguf file")
    else:
        source, identity = model_path, {"hub": model_path, "revision": revision}

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_progress():
        model, tokenizer = _load(model_path, source, weights_dtype, options)
    if "hub" in identity:
        identity["commit"] = getattr(model.config, "_commit_hash", None)
    log.info("%s: %s, %s, on %s", model_path, type(model).__name__, dtype, place)
    return Loaded(model.to(place).eval(), tokenizer, identity)


def _load(model_path: str, source: str, weights_dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    config = _explained(model_path, "config", transformers.AutoConfig.from_pretrained, source, **options)
    _refuse_other_kinds(model_path, config)
    tokenizer = _explained(model_path, "tokenizer", transformers.AutoTokenizer.from_pretrained, source, **options)
    model = _explained(
        model_path, "model", transformers.AutoModelForCausalLM.from_pretrained, source, dtype=weights_dtype, **options
    )
    return model, tokenizer


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Without the progress bars of transformers: ours is the only one on the screen."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _refuse_other_kinds(model_path: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model_path} is an encoder-decoder ({config.model_type}); expected a decoder-only causal LM")
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    made_for = getattr(config, "architectures", None) or []
    if config.model_type not in known and not remote:
        raise UserError(
            f"{model_path} is a {config.model_type} model, which has no causal LM; expected a decoder-only causal LM"
        )
    if made_for and not remote and all(name.endswith("ForMaskedLM") for name in made_for):
        raise UserError(f"{model_path} is a masked LM ({made_for[0]}); expected a decoder-only causal LM")


def _explained(model_path: str, what: str, load: Any, source: str, **options: Any) -> Any:
    """Load a part; what can go wrong outside this package becomes one line."""
    try:
        return load(source, **options)
    except Exception as error:
        message = " ".join(str(error).split())
        if "gated" in message or "401" in message or "403" in message:
            todo = "it is gated: accept its terms on its page, then `hf auth login`"
        elif "trust_remote_code" in message:
            todo = "it brings code of its own: read that, then set trust_remote_code: true"
        elif isinstance(error, torch.OutOfMemoryError | MemoryError):
            todo = "it does not fit in memory: try another device or dtype"
        elif (
            "huggingface.co" in message
            or "is not a valid model identifier" in message
            or "not a local folder" in message
        ):
            todo = "the hub does not answer or has no such model: check the name, the network and `hf auth login`"
        elif what == "tokenizer":
            todo = "put the tokenizer's files beside the model's"
        else:
            todo = "fetch it again, or give another model"
        first = message[:160] + ("..." if len(message) > 160 else "")
        raise UserError(
            f"the {what} of {model_path} cannot be loaded: {todo} ({type(error).__name__}: {first})"
        ) from error


def _file_identity(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size}


def _folder_identity(folder: Path) -> dict[str, Any]:
    """The names and sizes of the files that make the model; not their times, which copying changes."""
    kinds = (".safetensors", ".json", ".bin", ".model", ".jinja", ".txt")
    return {"files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.suffix in kinds}}
