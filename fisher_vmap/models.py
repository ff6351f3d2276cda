"""Load a causal LM and its tokenizer: a hub id, a folder, or a .gguf file."""

import hashlib
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    identity: dict[str, Any]
    weights_dtype = getattr(torch, dtype)
    local = Path(model_path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise UserError(f"model_path {model_path} is not a file; expected a hub id, a folder or a .gguf file")
        with quiet_progress():
            source, identity = str(converted(local, weights_dtype)), {"gguf": _hashed([local])[local.name]}
    elif local.is_dir():
        if not (local / "config.json").is_file():
            ggufs = sorted(p.name for p in local.glob("*.gguf"))
            hint = f"give the file {local / ggufs[0]}" if ggufs else "expected a folder as save_pretrained writes it"
            raise UserError(f"model_path {model_path} has no config.json; {hint}")
        source, identity = str(local), {"files": _hashed(_model_files(local))}
    elif local.exists() or model_path.startswith((".", "/", "~")) or model_path.count("/") > 1:
        raise UserError(f"model_path {model_path} is not there; expected a hub id, a folder or a .gguf file")
    else:
        source, identity = model_path, {"hub": model_path}

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_progress():
        model, tokenizer = _load(model_path, source, weights_dtype, options)
    if "hub" in identity:
        identity["commit"] = getattr(model.config, "_commit_hash", None) or revision
    model = _explained(model_path, "model", model.to, place).eval()
    _refuse_foresight(model_path, model)
    log.info("%s: %s, %s, on %s", model_path, type(model).__name__, dtype, place)
    return Loaded(model, tokenizer, identity)


def most_positions(model: Any) -> int | None:
    """The number of positions that a model was made for, or None where it has no such number.

    Where positions are embedded one by one there are no others; elsewhere what stands further on is noise.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _load(model_path: str, source: str, weights_dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any]:
    config = _explained(model_path, "config", transformers.AutoConfig.from_pretrained, source, **options)
    _refuse_other_kinds(model_path, config)
    tokenizer = _explained(model_path, "tokenizer", transformers.AutoTokenizer.from_pretrained, source, **options)
    model, found = _explained(
        model_path,
        "model",
        transformers.AutoModelForCausalLM.from_pretrained,
        source,
        dtype=weights_dtype,
        output_loading_info=True,
        **options,
    )
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, and goes on
        raise UserError(
            f"the model of {model_path} lacks {len(missing)} weights ({missing[0]} ...): it is damaged, or no causal "
            "LM; fetch it again, or give another model"
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


def _explained(model_path: str, what: str, load: Any, source: Any, **options: Any) -> Any:
    """Load a part; what can go wrong outside this package becomes one line."""
    try:
        return load(source, **options)
    except Exception as error:
        message = " ".join(str(error).split())
        if re.search(r"gated repo|is restricted|\b40[13] Client Error", message):
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


def _refuse_foresight(model_path: str, model: Any) -> None:
    """The first of two tokens must not depend on the second: all of the package rests on it.

    Told by the gradient, which is zero to the bit where there is no path; an encoder's may be small, but is there.
    """
    embedded: list[torch.Tensor] = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _args, output: embedded.append(output))
    try:
        with torch.enable_grad():
            logits = model(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, 0].float().square().sum(), embedded[0])
    finally:
        handle.remove()
    if bool((gradient[0, 1].abs() > 0).any()):  # false for NaN, which is each prompt's own matter
        raise UserError(
            f"{model_path}: {type(model).__name__} sees later tokens from earlier ones; expected a causal LM, "
            "whose attention looks back only"
        )


def _model_files(folder: Path) -> list[Path]:
    """The files that make a model and its tokenizer; not what a trainer leaves beside them."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    others = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt")
    found = {path for pattern in (*others, "*.model", "*.jinja", "*.py") for path in folder.glob(pattern)}
    return sorted(path for path in {*weights, *found} if path.is_file())


def _hashed(paths: Sequence[Path]) -> dict[str, str]:
    """The SHA-256 of each file by its name. Two fine-tuned models may differ in nothing but their weights."""

    def sha256(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as threads:  # which hashing leaves to one another
        return dict(zip([path.name for path in paths], threads.map(sha256, paths), strict=True))
