"""Load a causal LM and its tokenizer: from a hub id, a folder, a .gguf file, or an adapter on one of these."""

import copy
import importlib.util
import inspect
import logging
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fisher_vmap.errors import UserError
from fisher_vmap.kernels.quantized import CannotDifferentiate, quantized_linears, quantized_pullbacks, unpack
from fisher_vmap.load.adapters import Base, adapter_files, base_of, find_adapter, with_adapter, without_adapter
from fisher_vmap.load.source import (
    explained,
    hashed,
    log_missing_local,
    quiet_progress,
    refuse_empty,
    source_of_model,
    tokenizer_files,
)
from fisher_vmap.model.layers import sees_ahead
from fisher_vmap.model.offload import FLOATS
from fisher_vmap.model.precision import Precision, choose_precision
from fisher_vmap.model.widening import in_float32, widen_for_good
from fisher_vmap.progress import step

log = logging.getLogger(__name__)


def choose_device(device: str) -> torch.device:
    """The device of this name; for "auto" CUDA, else MPS, else the CPU.

    Raises:
        UserError: torch cannot use this device.
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
            "this machine seems to have an NVIDIA GPU, but torch %s cannot use it: running on the CPU",
            torch.__version__,
        )
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def placement_options(
    model_path: str, config: Any, place: torch.device, device_map: Any, max_memory: dict[Any, Any] | None
) -> dict[str, Any]:
    """The device options of `from_pretrained`; none if the model is moved to its device afterwards."""
    if device_map is None:
        quantized = getattr(config, "quantization_config", None) is not None
        return {"device_map": {"": place}} if quantized else {}  # quantised weights are packed for their device
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device_map needs the package accelerate: pip install accelerate")
    if device_map == "auto" and max_memory is None and not torch.accelerator.is_available():
        log.warning("device_map is auto, but torch sees no GPU: all of %s goes to the CPU", model_path)
    return {"device_map": device_map} | ({"max_memory": max_memory} if max_memory else {})


def devices_in_words(model: Any, place: torch.device) -> str:
    """The devices of a model, in words."""
    placed = getattr(model, "hf_device_map", None) or {"": place}
    count = Counter(str(device) for device in placed.values())
    return " and ".join(device if len(count) == 1 else f"{device} ({n} parts)" for device, n in count.items())


def refuse_other_kinds(model_path: str, config: Any) -> None:
    """Raise UserError if the configuration is not that of a decoder-only causal LM."""
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


def refuse_foresight(model_path: str, model: Any) -> None:
    """Raise UserError if the model's attention looks ahead, or if it has no derivatives."""
    try:
        with quantized_pullbacks(model):
            ahead = sees_ahead(model)
    except CannotDifferentiate as error:
        raise UserError(f"{model_path}: {error}") from error
    if ahead:
        raise UserError(
            f"{model_path}: {type(model).__name__} sees later tokens from earlier ones; expected a causal LM, "
            "whose attention looks back only"
        )


def to_one_dtype(model: Any, dtype: torch.dtype) -> list[str]:
    """Convert every weight to the format that it has when an ordinary checkpoint is loaded in `dtype`.

    transformers leaves the embeddings, norms and biases of a quantised checkpoint in the format they were saved in.
    The model does not run with those next to unpacked matrices of another format. Packed tensors, and buffers that are
    computed and not saved, stay as they are.

    Args:
        model: of transformers, its linear layers unpacked.
        dtype: float32, bfloat16 or float16.

    Returns:
        The names of the converted weights.
    """
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    wanted = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    kept = _kept_in_float32(model, dtype)
    changed = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        to = torch.float32 if kept is not None and kept.search(name) else wanted.get(name)
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS
        if plain and to in FLOATS and tensor.dtype != to:
            tensor.data = tensor.data.to(to)
            changed.append(name)
    return changed


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The names that transformers keeps in float32: some only with float16, some with any narrow format."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer, the identity of its weights, and its precision."""

    model: Any
    tokenizer: Any
    identity: dict[str, Any]
    precision: Precision = Precision("model", "nothing else was asked for")


@step("loading the model")
def load_model(
    model_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "bfloat16",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[Any, Any] | None = None,
    adapter_path: str | None = None,
    adapter_revision: str | None = None,
    dequantize: bool = False,
    precision: str = "model",
) -> Loaded:
    """Load a causal LM.

    Args:
        model_path: a hub id ("owner/name"), a folder as `save_pretrained` writes it, a .gguf file (a path, or
            "owner/name/file.gguf" on the hub), or a PEFT adapter (hub id or folder), which is merged into its base.
        revision: of a hub model: branch, tag or commit.
        trust_remote_code: whether code that comes with the model may run.
        dtype: "bfloat16", "float32", "float16" or "float64".
        device: "auto", or a torch device.
        device_map: the blocks' devices, as for `from_pretrained`; None: the whole model on `device`.
        max_memory: most memory that `device_map` may use of each device.
        adapter_path: a PEFT adapter, hub id or folder, to merge into the model.
        adapter_revision: of an adapter on the hub.
        dequantize: whether quantised weights are unpacked to `dtype`.
        precision: as for `fisher_scores`; for float32 the weights are widened from `dtype` if memory allows.

    Returns:
        A named tuple: the model in evaluation mode on its device, its tokenizer, the identity of its weights, and its
        precision with the reason.

    Raises:
        UserError: the model is missing, gated, damaged or not a causal LM; one line that says what to do.
    """
    if device_map is not None and device != "auto":
        raise UserError(f"device is {device!r} and device_map is {device_map!r}; give one of the two")
    if max_memory is not None and device_map is None:
        raise UserError("max_memory is for device_map; give device_map: auto as well")
    place = choose_device(device)
    for path in filter(None, (model_path, adapter_path)):
        log_missing_local(path)
    with quiet_progress():
        adapter = explained(
            adapter_path or model_path,
            "adapter",
            find_adapter,
            adapter_path or model_path,
            revision=adapter_revision if adapter_path else revision,
        )
    if adapter_path and adapter is None:
        raise UserError(
            f"adapter_path {adapter_path} has no adapter_config.json; expected a PEFT adapter, hub id or folder"
        )
    base = Base(model_path, revision)
    if adapter is not None and not adapter_path:
        base = base_of(adapter)
        log.info("%s is an adapter on %s", model_path, base.model_path)
    source, identity = source_of_model(base.model_path, base.revision, getattr(torch, dtype))
    options: dict[str, Any] = {"revision": base.revision, "trust_remote_code": trust_remote_code}
    with quiet_progress(), without_adapter(source) as folder:
        config = explained(base.model_path, "config", transformers.AutoConfig.from_pretrained, folder, **options)
        refuse_other_kinds(base.model_path, config)
        placed = placement_options(base.model_path, config, place, device_map, max_memory)
        model, tokenizer = _load(base.model_path, folder, getattr(torch, dtype), config, dequantize, options, placed)
        if adapter is not None:
            model = with_adapter(model, adapter)
            if (adapter / "tokenizer_config.json").is_file():
                tokenizer = explained(
                    str(adapter), "tokenizer", transformers.AutoTokenizer.from_pretrained, str(adapter)
                )
            identity["adapter"] = hashed([*adapter_files(adapter), *tokenizer_files(adapter)])
    refuse_empty(model_path, tokenizer)
    if "hub" in identity:
        identity["commit"] = getattr(model.config, "_commit_hash", None) or base.revision
    if dequantize:
        identity["dequantized"] = True
    if not placed:
        model = explained(model_path, "model", model.to, place)
    model = model.eval()
    log.info("%s: %s, %s, on %s", model_path, type(model).__name__, dtype, devices_in_words(model, place))
    try:
        chosen = choose_precision(model, precision)
    except ValueError as error:
        raise UserError(f"{model_path}: {error}") from error
    with in_float32(model) if chosen.name == "float32" and not widen_for_good(model) else nullcontext():
        refuse_foresight(model_path, model)
    return Loaded(model, tokenizer, identity, chosen)


def _load(
    model_path: str,
    source: str,
    weights_dtype: torch.dtype,
    config: Any,
    dequantize: bool,
    options: dict[str, Any],
    placed: dict[str, Any],
) -> tuple[Any, Any]:
    tokenizer = explained(model_path, "tokenizer", transformers.AutoTokenizer.from_pretrained, source, **options)
    if dequantize or _unpacks_itself(model_path, config):
        _ask_for_floats(config)
    model, found = explained(
        model_path,
        "model",
        transformers.AutoModelForCausalLM.from_pretrained,
        source,
        config=config,
        dtype=weights_dtype,
        output_loading_info=True,
        **options,
        **placed,
    )
    if missing := sorted(found["missing_keys"]):  # transformers initialises them at random
        raise UserError(
            f"the model of {model_path} lacks {len(missing)} weights ({missing[0]} ...): it is damaged, or not a "
            "causal LM; fetch it again, or give another model"
        )
    if dequantize:
        quantizer = getattr(model, "hf_quantizer", None)
        try:
            own_way = getattr(type(quantizer), "_dequantize", None)
            if quantized_linears(model) and own_way not in (None, transformers.quantizers.HfQuantizer._dequantize):
                model = explained(model_path, "model", model.dequantize, dtype=weights_dtype)
            unpacked = unpack(model, weights_dtype)
        except CannotDifferentiate as error:
            raise UserError(f"{model_path}: {error}") from error
        log.info("%s: %d quantised layers unpacked to %s", model_path, len(unpacked), weights_dtype)
        to_one_dtype(model, weights_dtype)
    return model, tokenizer


def _unpacks_itself(model_path: str, config: Any) -> bool:
    """Whether a format unpacks its weights at the first call, as compressed-tensors does with its own hooks.

    Raises:
        UserError: it is compressed-tensors with rounded inputs, which have no gradient.
    """
    quantization = getattr(config, "quantization_config", None)
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return False
    groups = quantization.get("config_groups") or {}
    if any(isinstance(group, dict) and group.get("input_activations") for group in groups.values()):
        raise UserError(
            f"{model_path} rounds the inputs of its layers (compressed-tensors with input_activations), so that they "
            "have no gradient; load it with its weights unpacked (dequantize: true)"
        )
    return True


def _ask_for_floats(config: Any) -> None:
    """Have transformers unpack quantised weights if it can for this format; `unpack` does it for the others."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        kinds = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        kind = kinds.get(quantization.get("quant_method"))
        if kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters:
            quantization["dequantize"] = True
    elif quantization is not None and hasattr(quantization, "dequantize"):
        quantization.dequantize = True
