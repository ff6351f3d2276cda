"""The transformers model inside what others wrap around it: PEFT, nnsight, TransformerLens, torch.compile, DDP.

What a wrapper has done to the model stays in force: an adapter's layers, TransformerLens' own attention. Only its
calling convention is left aside, since the kernel calls the model as transformers does.

The hooks that a user has registered on a model's modules: part of its function, and made for the user's own batches.

A hook may read position 5, or hold an activation of the very shape of a prompt. What is asked of a model's modules, and
not of its numbers, is asked without them.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fisher_vmap.model.validation import listed_layers

NOT_THE_USERS = {"torch", "transformers", "accelerate", "peft"}  # packages whose hooks are part of a model


STEERING = "fisher_vmap.steering"


def is_step(hook: Any) -> bool:
    """Whether a hook is `steer`'s: it adds a step at every position, whatever the batch."""
    return getattr(hook, "__module__", None) == STEERING


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has a hook of any kind."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def users_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks and pre-hooks of one module that no library has put there, and that may depend on the batch."""
    every = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in every if _of_package(hook) not in NOT_THE_USERS and not is_step(hook)]


def is_hooked(model: nn.Module) -> bool:
    """Whether a user has registered a hook anywhere in the model."""
    return any(users_hooks(module) for module in model.modules())


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Within the context no hook of a user is called, nor a step of `steer`; what is registered meanwhile is."""
    hooked = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    before = [(module, module._forward_pre_hooks, module._forward_hooks) for module in hooked]
    try:
        for module, pre, post in before:
            module._forward_pre_hooks = OrderedDict(_without_users(pre))
            module._forward_hooks = OrderedDict(_without_users(post))
        yield
    finally:
        for module, pre, post in before:
            module._forward_pre_hooks, module._forward_hooks = pre, post


def hook_behind(model: nn.Module, error: BaseException) -> str:
    """The hook that an error came out of, and its module, in words; empty where it was none of a user's."""
    hooks = {id(hook): (hook, name) for name, module in model.named_modules() for hook in users_hooks(module)}
    found, trace = "", error.__traceback__
    while trace is not None:
        called = trace.tb_frame.f_locals.get("hook")
        if id(called) in hooks:
            hook, name = hooks[id(called)]
            found = f"the hook {_name(hook)} on {name or 'the model'}"
        trace = trace.tb_next
    return found


def _without_users(hooks: Any) -> list[tuple[int, Any]]:
    return [(key, hook) for key, hook in hooks.items() if _of_package(hook) in NOT_THE_USERS]


def _of_package(hook: Any) -> str:
    hook = getattr(hook, "func", hook)  # of a functools.partial
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]


def _name(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__qualname__", type(hook).__qualname__).replace("<locals>.", "")


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
