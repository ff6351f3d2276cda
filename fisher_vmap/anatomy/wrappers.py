"""The transformers model inside what others wrap around it: PEFT, nnsight, TransformerLens, torch.compile, DDP.

What a wrapper has done to the model stays in force: an adapter's layers, TransformerLens' own attention. Only its
calling convention is left aside, since the kernel calls the model as transformers does.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fisher_vmap.anatomy.arguments import listed_layers

Layers = str | int | Sequence[str | int]

# Adapters that act in the wrapper's own forward, not in the modules of the model: without it they would be lost.
ACT_IN_THE_WRAPPER = {"XLORA", "POLY", "CARTRIDGE", "SHADOW"}


def unwrapped(model: Any) -> nn.Module:
    """The model of transformers that computes the logits when called with `input_ids`.

    Args:
        model: such a model, a PeftModel, nnsight's LanguageModel, a TransformerBridge, or one of these under
            torch.compile or DistributedDataParallel.

    Raises:
        ValueError: the wrapper adds what is not in the model's modules (prompt tuning), or it is no model at all.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        order = "; the model comes first, its tokenizer after it" if hasattr(model, "convert_ids_to_tokens") else ""
        raise ValueError(f"the model is a {type(model).__name__}; expected a causal LM of transformers{order}")
    if _package(model) == "transformer_lens":
        raise ValueError(
            f"the model is TransformerLens' {type(model).__name__}, which is no model of transformers; give the one it "
            "was made from, or a TransformerBridge"
        )
    return model


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that a wrapper carries along, or None."""
    while model is not None:
        if _inside(model) is not None and (tokenizer := getattr(model, "tokenizer", None)) is not None:
            return tokenizer
        model = _inside(model)
    return None


def names_inside(model: Any, inner: nn.Module, layers: Layers) -> Layers:
    """Layers as the inner model names them: a name that only the wrapper has ("blocks.15") becomes that module's own.

    Of a compiled part it is the name without torch.compile's "_orig_mod", as the part stands there when it is run.

    Args:
        model: what the user gave.
        inner: the model in it, from `unwrapped`.
        layers: as the user wrote them.
    """
    if isinstance(layers, str) and layers == "all":
        return layers
    known = {name for name, _ in inner.named_modules()}
    modules = model.named_modules(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    outer = {_uncompiled(name): module for name, module in modules}
    names: dict[int, str] = {id(module): name for name, module in inner.named_modules()}

    def inside(layer: str | int) -> str | int:
        if not isinstance(layer, str) or layer in known:
            return layer
        plain = _uncompiled(layer)
        own: str = plain if plain in known else names.get(id(outer.get(plain)), layer)
        return own

    return inside(layers) if isinstance(layers, str | int) else [inside(layer) for layer in listed_layers(layers)]


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _inside(model: Any) -> Any:
    """What a wrapper wraps, one layer of it; None where there is no wrapper."""
    package = _package(model)
    if package == "nnsight":
        return model.__dict__.get("_module")
    if package == "transformer_lens":
        return model.__dict__.get("original_model")
    if package == "peft" and hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        _check_adapter(model)
        return model.get_base_model()
    if type(model).__name__ == "OptimizedModule":
        return model._orig_mod
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    return None


def _package(model: Any) -> str:
    """The package of a model's class, or of the first of its bases that is not the user's own."""
    roots = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    return next((root for root in roots if root in ("nnsight", "transformer_lens", "peft")), roots[0])


def _check_adapter(model: Any) -> None:
    names = getattr(model, "active_adapters", None) or [getattr(model, "active_adapter", "default")]
    for name in [names] if isinstance(names, str) else names:
        config = model.peft_config.get(name)
        if reason := why_not_in_modules(config):
            raise ValueError(f"the adapter {name!r} {reason}; merge it into the model, or give one of another kind")


def why_not_in_modules(config: Any) -> str:
    """Why an adapter is not to be found in the modules of its model; empty where it is.

    Args:
        config: a PeftConfig.
    """
    kind = str(getattr(getattr(config, "peft_type", None), "value", getattr(config, "peft_type", None)))
    if getattr(config, "is_prompt_learning", False):
        return f"is {kind}: it adds virtual tokens to the prompt and no weights to the model"
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA: which tokens it acts on depends on the prompt"
    if kind in ACT_IN_THE_WRAPPER:
        return f"is {kind}: it acts outside of the model's modules"
    return ""
