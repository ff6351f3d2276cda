"""The hooks that a user has registered on a model's modules: part of its function, and made for the user's own batches.

A hook may read position 5, or hold an activation of the very shape of a prompt. What is asked of a model's modules, and
not of its numbers, is asked without them.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NOT_THE_USERS = {"torch", "transformers", "accelerate", "peft"}  # packages whose hooks are part of a model


def users_hooks(module: nn.Module) -> list[Any]:
    """The forward hooks and pre-hooks of one module that no library has put there."""
    every = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in every if _package(hook) not in NOT_THE_USERS]


def is_hooked(model: nn.Module) -> bool:
    """Whether a user has registered a hook anywhere in the model."""
    return any(users_hooks(module) for module in model.modules())


@contextmanager
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Within the context no hook of a user is called; what is registered meanwhile is."""
    hooked = [module for module in model.modules() if users_hooks(module)]
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
    return [(key, hook) for key, hook in hooks.items() if _package(hook) in NOT_THE_USERS]


def _package(hook: Any) -> str:
    hook = getattr(hook, "func", hook)  # of a functools.partial
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return str(module).partition(".")[0]


def _name(hook: Any) -> str:
    hook = getattr(hook, "func", hook)
    return getattr(hook, "__qualname__", type(hook).__qualname__).replace("<locals>.", "")
