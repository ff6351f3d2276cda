"""The transformers model inside wrappers (PEFT, nnsight, TransformerLens, torch.compile, DDP), and the user's hooks.

A wrapper's changes to the model stay in force: an adapter's layers, TransformerLens' own attention. Only its calling
convention is bypassed, since the kernel calls the model as transformers does.

The hooks that a user has registered are part of the model's function, and made for the user's batches: a hook may read
position 5, or hold an activation with the shape of a prompt. So findings about a model's structure, as opposed to its
numbers, are made without them (`hooks_off`).
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fisher_vmap.model.steps import AddStep
from fisher_vmap.model.validation import listed_layers

NOT_THE_USERS = {"torch", "transformers", "accelerate", "peft"}  # packages whose hooks are part of a model
# Adapters that act in the wrapper's own forward, not in the model's modules: without the wrapper they would be lost.
ACT_IN_THE_WRAPPER = {"XLORA", "POLY", "CARTRIDGE", "SHADOW"}

Layers = str | int | Sequence[str | int]


def is_step(hook: Any) -> bool:
    """Whether a hook is from `steer` and acts alike on any batch."""
    return isinstance(hook, AddStep) and hook.fits_any_batch


def has_hooks(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has a hook of any kind."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def users_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks and pre-hooks of one module that are from no library and not from `steer`."""
    every = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in every if _of_package(hook) not in NOT_THE_USERS and not is_step(hook)]


def is_hooked(model: nn.Module) -> bool:
    """Whether a user has registered a hook anywhere in the model."""
    return any(users_hooks(module) for module in model.modules())


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Within the context hooks of the user and of `steer` are not called, except those registered within it."""
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
    """The user's hook that raised an error, and its module, in words; empty if none did."""
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
    hook = getattr(hook, "func", hook)  # inside a functools.partial
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]


def _name(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__qualname__", type(hook).__qualname__).replace("<locals>.", "")


def unwrapped(model: Any) -> nn.Module:
    """The transformers model that computes the logits when called with `input_ids`.

    Args:
        model: such a model, a PeftModel, nnsight's LanguageModel, a TransformerBridge, or one of these under
            torch.compile or DistributedDataParallel.

    Raises:
        ValueError: the wrapper adds something outside of the model's modules (prompt tuning), or it is not a model.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if not isinstance(model, nn.Module):
        order = "; the model comes first, its tokenizer after it" if hasattr(model, "convert_ids_to_tokens") else ""
        raise ValueError(f"the model is a {type(model).__name__}; expected a causal LM of transformers{order}")
    if _package(model) == "transformer_lens":
        raise ValueError(
            f"the model is TransformerLens' {type(model).__name__}, which is not a transformers model; give the model "
            "it was made from, or a TransformerBridge"
        )
    return model


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a wrapper, or None."""
    while model is not None:
        if _inside(model) is not None and (tokenizer := getattr(model, "tokenizer", None)) is not None:
            return tokenizer
        model = _inside(model)
    return None


def names_inside(model: Any, inner: nn.Module, layers: Layers) -> Layers:
    """The user's layers under the names of the inner model: a wrapper's name ("blocks.15") becomes the module's own.

    Names of compiled parts lose torch.compile's "_orig_mod". `inner` is the model inside `model`, from `unwrapped`.
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
    """The content of the outermost wrapper; None if there is no wrapper."""
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
    """Which known wrapper package a model's class or its bases come from, else the package of the class."""
    roots = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    return next((root for root in roots if root in ("nnsight", "transformer_lens", "peft")), roots[0])


def _check_adapter(model: Any) -> None:
    names = getattr(model, "active_adapters", None) or [getattr(model, "active_adapter", "default")]
    for name in [names] if isinstance(names, str) else names:
        config = model.peft_config.get(name)
        if reason := why_not_in_modules(config):
            raise ValueError(f"the adapter {name!r} {reason}; merge it into the model, or give one of another kind")


def why_not_in_modules(config: Any) -> str:
    """Why the adapter of a PeftConfig is not in the modules of its model; empty if it is."""
    kind = str(getattr(getattr(config, "peft_type", None), "value", getattr(config, "peft_type", None)))
    if getattr(config, "is_prompt_learning", False):
        return f"is {kind}: it adds virtual tokens to the prompt and no weights to the model"
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA: which tokens it acts on depends on the prompt"
    if kind in ACT_IN_THE_WRAPPER:
        return f"is {kind}: it acts outside of the model's modules"
    return ""
