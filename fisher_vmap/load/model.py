"""Load a causal LM and its tokenizer: from a hub id, a folder, a .gguf file, or an adapter on one of these."""

import copy
import importlib.util
import inspect
import logging
import re
import shutil
from collections import Counter
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fisher_vmap.errors import UserError
from fisher_vmap.kernels.hf_attention import attention_of
from fisher_vmap.kernels.quantized import CannotDifferentiate, quantized_linears, quantized_pullbacks, unpack
from fisher_vmap.load.adapters import Base, adapter_files, base_of, find_adapter, with_adapter, without_adapter
from fisher_vmap.load.options import LoadOptions, attention_argument, quantization_argument
from fisher_vmap.load.overrides import changed_config
from fisher_vmap.load.source import (
    explained,
    hashed,
    local_source,
    log_missing_local,
    quiet_progress,
    read_tokenizer,
    refuse_empty,
    source_of_model,
    tokenizer_files,
    without_slash,
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


def placement_options(model_path: str, config: Any, place: torch.device, options: LoadOptions) -> dict[str, Any]:
    """The device options of `from_pretrained`; none if the model is moved to its device afterwards."""
    if options.device_map is None:
        quantized = options.quantization is not None or getattr(config, "quantization_config", None) is not None
        return {"device_map": {"": place}} if quantized else {}  # quantised weights are packed for their device
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device_map needs the package accelerate: pip install accelerate")
    if options.device_map == "auto" and options.max_memory is None and not torch.accelerator.is_available():
        log.warning("device_map is auto, but torch sees no GPU: all of %s goes to the CPU", model_path)
    return {"device_map": options.device_map} | ({"max_memory": options.max_memory} if options.max_memory else {})


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


def saved_without_head(config: Any) -> str | None:
    """The class that a checkpoint was saved from, if that has no language model's head; else None."""
    names = [str(name) for name in getattr(config, "architectures", None) or []]
    with_head = any(re.search("CausalLM|LMHead|DoubleHeads|ConditionalGeneration|PreTraining", name) for name in names)
    return None if with_head or not names or getattr(config, "auto_map", None) else names[0]


def refuse_foresight(model_path: str, model: Any, attention: str | None) -> None:
    """Raise UserError if the model's attention looks ahead or does not run here, or if it has no derivatives."""
    try:
        with quantized_pullbacks(model):
            ahead = sees_ahead(model)
    except CannotDifferentiate as error:
        raise UserError(f"{model_path}: {error}") from error
    except Exception as error:
        if attention is None:
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{model_path} does not run with attn_implementation {attention} here ({type(error).__name__}: {reason}); "
            "give sdpa or eager"
        ) from error
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
def load_model(model_path: str, **options: Any) -> Loaded:
    """Load a causal LM.

    Args:
        model_path: a hub id ("owner/name"), a folder as `save_pretrained` writes it, a .gguf file (a path, or
            "owner/name/file.gguf" on the hub), or a PEFT adapter (hub id or folder), which is merged into its base.
        options: the fields of `LoadOptions`, by name.

    Returns:
        A named tuple: the model in evaluation mode on its device, its tokenizer, the identity of its weights, and its
        precision with the reason.

    Raises:
        UserError: the model is missing, gated, damaged or not a causal LM, or options do not fit it or each other; one
            line that says what to do.
    """
    how = LoadOptions(**options)
    place = choose_device(how.device)
    model_path, adapter_path = without_slash(model_path), how.adapter_path and without_slash(how.adapter_path)
    attention = attention_argument(how, place)
    quantization_argument(model_path, None, how)  # its checks, before anything is downloaded
    for path in filter(None, (model_path, adapter_path)):
        log_missing_local(path)
    named, revision = (adapter_path, how.adapter_revision) if adapter_path else (model_path, how.revision)
    with quiet_progress():
        adapter = explained(named, "adapter", find_adapter, named, revision=revision, **how.hub)
    if adapter_path and adapter is None:
        raise UserError(
            f"adapter_path {adapter_path} has no adapter_config.json; expected a PEFT adapter, hub id or folder"
        )
    base = Base(model_path, how.revision)
    if adapter is not None and not adapter_path:
        base = base_of(adapter)
        log.info("%s is an adapter on %s", model_path, base.model_path)
    source, identity = source_of_model(base.model_path, base.revision, how)
    with quiet_progress(), without_adapter(source) as folder:
        config = read_config(base, folder, how)
        placed = placement_options(base.model_path, config, place, how)
        model, tokenizer = _load(base, folder, config, how, attention | placed)
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
    if how.dequantize:
        identity["dequantized"] = True
    if not placed:
        model = explained(model_path, "model", model.to, place)
    model = model.eval()
    kind, where = type(model).__name__, devices_in_words(model, place)
    log.info("%s: %s, %s, attention %s, on %s", model_path, kind, how.dtype, attention_of(model), where)
    try:
        chosen = choose_precision(model, how.precision)
    except ValueError as error:
        raise UserError(f"{model_path}: {error}") from error
    with in_float32(model) if chosen.name == "float32" and not widen_for_good(model) else nullcontext():
        refuse_foresight(model_path, model, how.attn_implementation)
    return Loaded(model, tokenizer, identity, chosen)


def read_config(base: Base, source: str, options: LoadOptions, **where: Any) -> Any:
    """The configuration of a causal LM, with the values that `model_kwargs` changes.

    Args:
        base: as the user or an adapter names the model.
        source: a hub id or a folder.
        options: of the model.
        where: further arguments of `from_pretrained`.

    Raises:
        UserError: it is missing, or of another kind of model, or `model_kwargs` do not fit it.
    """
    where |= {"revision": base.revision, **_at_hub(source, options)}
    load = transformers.AutoConfig.from_pretrained
    config = explained(base.model_path, "config", load, source, **where, **options.files)
    refuse_other_kinds(base.model_path, config)
    quantization_argument(base.model_path, config, options)  # its check of stored weights
    if not options.overrides:
        return config
    stored, _ = explained(base.model_path, "config", type(config).get_config_dict, source, **where, **options.hub)
    return changed_config(base.model_path, config, stored, options.overrides)


def without_weights(model_path: str, options: LoadOptions) -> tuple[str, Any, Any]:
    """The name, the configuration and the tokenizer of the model that `load_model` would load; errors as there."""
    base = Base(without_slash(model_path), options.revision)
    with quiet_progress():
        if options.adapter_path is None:
            found = explained(base.model_path, "adapter", find_adapter, *base, **options.hub)
            base = base if found is None else base_of(found)
        local, where = local_source(base.model_path, options.subfolder), {}
        source = base.model_path if local is None else str(local)
        if local is not None and local.is_file():
            source, where = str(local.parent), {"gguf_file": local.name}
        config = read_config(base, source, options, **where)
        return base.model_path, config, read_tokenizer(base.model_path, source, base.revision, options, **where)


def _at_hub(source: str, options: LoadOptions) -> dict[str, Any]:
    """The subfolder as an argument; a local source is that folder itself."""
    return {"subfolder": options.subfolder} if options.subfolder and not Path(source).exists() else {}


def _load(base: Base, source: str, config: Any, options: LoadOptions, placed: dict[str, Any]) -> tuple[Any, Any]:
    model_path, dtype = base.model_path, getattr(torch, options.dtype)
    tokenizer = read_tokenizer(model_path, source, base.revision, options)
    if options.dequantize or _unpacks_itself(model_path, config):
        _ask_for_floats(config)
    model, found = explained(
        model_path,
        "model",
        transformers.AutoModelForCausalLM.from_pretrained,
        source,
        hint=options.to_check,
        config=config,
        revision=base.revision,
        dtype=dtype,
        output_loading_info=True,
        **options.files,
        **options.loading,
        **_at_hub(source, options),
        **quantization_argument(model_path, config, options),
        **placed,
    )
    headless = saved_without_head(config)
    if missing := sorted(found["missing_keys"]):  # transformers initialises them at random
        why = f"it was saved as {headless}, without a language model's head" if headless else "it is damaged"
        todo = options.to_check or "fetch it again, or give another model"
        raise UserError(
            f"the model of {model_path} lacks {len(missing)} weights ({missing[0]} ...): {why}, or not a causal LM; "
            f"{todo}"
        )
    if headless:
        log.warning("%s was saved as %s: its token embeddings are taken as the unembedding", model_path, headless)
    if options.quantization:
        count, library = len(quantized_linears(model)), version("bitsandbytes")
        log.info("%s: %d layers quantised to %s, by bitsandbytes %s", model_path, count, options.quantization, library)
    if options.dequantize:
        model = _unpacked(model_path, model, dtype)
    return model, tokenizer


def _unpacked(model_path: str, model: Any, dtype: torch.dtype) -> Any:
    """The model with ordinary linear layers in place of its quantised ones."""
    quantizer = getattr(model, "hf_quantizer", None)
    try:
        own_way = getattr(type(quantizer), "_dequantize", None)
        if quantized_linears(model) and own_way not in (None, transformers.quantizers.HfQuantizer._dequantize):
            model = explained(model_path, "model", model.dequantize, dtype=dtype)
        unpacked = unpack(model, dtype)
    except CannotDifferentiate as error:
        raise UserError(f"{model_path}: {error}") from error
    log.info("%s: %d quantised layers unpacked to %s", model_path, len(unpacked), dtype)
    to_one_dtype(model, dtype)
    return model


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
