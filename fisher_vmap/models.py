"""Load a causal LM and its tokenizer: a hub id, a folder, a .gguf file, or an adapter on one of these."""

import inspect
import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import transformers

from fisher_vmap.anatomy.precision import Precision, choose_precision
from fisher_vmap.anatomy.widening import in_float32, widen_for_good
from fisher_vmap.errors import UserError
from fisher_vmap.loading.adapters import Base, adapter_files, base_of, find_adapter, with_adapter
from fisher_vmap.loading.causal_lm import refuse_foresight, refuse_other_kinds
from fisher_vmap.loading.devices import choose_device, placement_options, places_of
from fisher_vmap.loading.loader_errors import explained, quiet_progress, refuse_empty
from fisher_vmap.loading.model_files import hashed, tokenizer_files
from fisher_vmap.loading.model_source import say_if_it_looks_local, source_of_model, without_adapter_inside
from fisher_vmap.loading.one_dtype import to_one_dtype
from fisher_vmap.progress import step
from fisher_vmap.pullbacks.quantized import CannotDifferentiate, quantized_linears, unpack

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """A model in evaluation mode on its device, its tokenizer, what identifies its weights, and what it computes in."""

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
            "owner/name/file.gguf" on the hub), or a PEFT adapter (hub id or folder), which is put on the base it names.
        revision: of a hub model: branch, tag or commit.
        trust_remote_code: whether code that comes with the model may run.
        dtype: "bfloat16", "float32", "float16" or "float64".
        device: "auto", or a torch device.
        device_map: the blocks' devices, as `from_pretrained` takes it; None: all of the model on `device`.
        max_memory: the most that `device_map` may put on each device.
        adapter_path: a PEFT adapter, hub id or folder, to put on the model.
        adapter_revision: of an adapter on the hub.
        dequantize: whether quantised weights are unpacked to `dtype`.
        precision: what it will be computed in, as for `fisher_scores`; where that is float32 and memory has room for
            it, the weights are widened from `dtype`.

    Returns:
        A named tuple: the model in evaluation mode on its device, its tokenizer, what identifies its weights, and its
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
        say_if_it_looks_local(path)
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
    with quiet_progress(), without_adapter_inside(source) as folder:
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
    log.info("%s: %s, %s, on %s", model_path, type(model).__name__, dtype, places_of(model, place))
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
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random, and goes on
        raise UserError(
            f"the model of {model_path} lacks {len(missing)} weights ({missing[0]} ...): it is damaged, or no causal "
            "LM; fetch it again, or give another model"
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
    """Whether a format unpacks its weights at the first call anyway: compressed-tensors does, under hooks of its own.

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
    """Have the loader unpack quantised weights, for the formats whose loader can; `unpack` does it for the others."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):
        kinds = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        kind = kinds.get(quantization.get("quant_method"))
        if kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters:
            quantization["dequantize"] = True
    elif quantization is not None and hasattr(quantization, "dequantize"):
        quantization.dequantize = True
