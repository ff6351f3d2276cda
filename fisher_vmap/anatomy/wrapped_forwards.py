"""Forwards that others have wrapped: torch.autocast, accelerate's mixed precision, torch.compile.

A wrapper that autocasts would cast inside a call of this package, whose pullbacks count on the dtype; what is compiled
can be transformed by `torch.func` no more. So for the time of a call the module's own forward stands in its place. Only
wrappers are taken off that are known by the code that made them. Any other function is part of the model, the user's
that autocasts as well; what is compiled further inside runs as it is written.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from fisher_vmap.anatomy.nothing_compiled import nothing_compiled
from fisher_vmap.anatomy.remembered import Remembered

# What marks a wrapper: the module that its code is in, and the code's name; None: all of that module's.
WRAPPERS = {
    ("torch.amp.autocast_mode", "decorate_autocast"),
    ("torch._dynamo.eval_frame", None),
    ("torch._dynamo.external_utils", None),
    ("accelerate.utils.operations", "forward"),
}
UNDER_ACCELERATE = "_old_forward"  # where accelerate's device hooks keep the forward that they call
OUTER_FIRST = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
INNER_FIRST = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")

# By module and attribute: the forward that was found there, and what it wraps. A method made anew would look changed.
_OWN: Remembered[dict[tuple[nn.Module, str], tuple[Any, Any]]] = Remembered()


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Within the context no module of the model autocasts or is compiled; afterwards each is as it was.

    A module that `torch.compile` has put into the place of another is away with its name: the other stands there, with
    the hooks of both.
    """
    with nothing_compiled(), ExitStack() as stack:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if child is not None and _is_compiled(child) and not _is_compiled(parent):
                    stack.callback(parent._modules.__setitem__, name, child)
                    parent._modules[name] = _uncompiled(child, stack)
        own = _OWN.setdefault(model, {})
        for module in model.modules():
            attributes = vars(module)
            if attributes.get("_compiled_call_impl") is not None:
                stack.callback(attributes.__setitem__, "_compiled_call_impl", attributes.pop("_compiled_call_impl"))
            for name in ("forward", UNDER_ACCELERATE):
                forward = attributes.get(name)
                if forward is None or (inner := innermost(module, forward)) is forward:
                    continue
                if own.get((module, name), (None, None))[0] is not forward:
                    own[module, name] = forward, inner
                inner = own[module, name][1]
                stack.callback(attributes.__setitem__, name, forward)
                if name == "forward" and is_of_class(module, inner):
                    del attributes[name]
                else:
                    attributes[name] = inner
        yield


def innermost(module: nn.Module, forward: Any) -> Any:
    """What the known wrappers of a module's forward wrap; the same object where there is no such wrapper."""
    function, bound, wrapped = forward, False, False
    while True:
        if isinstance(function, MethodType) and function.__self__ is module:
            function, bound = function.__func__, True
        elif _is_wrapper(function):
            function, wrapped = function.__wrapped__, True
        elif not wrapped:
            return forward
        else:
            return MethodType(function, module) if bound else function


def is_of_class(module: nn.Module, forward: Any) -> bool:
    """Whether a forward is the module's own method, as its class has it."""
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def _is_wrapper(function: Any) -> bool:
    if not hasattr(function, "__wrapped__"):
        return False
    if isinstance(function, FunctionType):  # not by its attributes, which functools.wraps copies
        where = function.__globals__.get("__name__")
        return not WRAPPERS.isdisjoint({(where, function.__code__.co_name), (where, None)})
    kind = type(function)
    return (kind.__module__, kind.__name__) == ("accelerate.utils.operations", "ConvertOutputsToFp32")


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _uncompiled(compiled: nn.Module, stack: ExitStack) -> nn.Module:
    """The module that was compiled, until the stack is left with the hooks of both."""
    inner = compiled._orig_mod
    assert isinstance(inner, nn.Module)
    if _is_compiled(inner):
        inner = _uncompiled(inner, stack)
    for name in (*OUTER_FIRST, *INNER_FIRST):
        outer_hooks, inner_hooks = vars(compiled)[name], vars(inner)[name]
        if outer_hooks:
            first, then = (outer_hooks, inner_hooks) if name in OUTER_FIRST else (inner_hooks, outer_hooks)
            stack.callback(vars(inner).__setitem__, name, inner_hooks)
            vars(inner)[name] = type(inner_hooks)(first | then)
    return inner
