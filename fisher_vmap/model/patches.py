"""Forwards that others have wrapped: torch.autocast, accelerate's mixed precision, torch.compile.

A wrapper that autocasts would cast inside a call of this package, whose pullbacks count on the dtype; what is compiled
can be transformed by `torch.func` no more. So for the time of a call the module's own forward stands in its place. Only
wrappers are taken off that are known by the code that made them. Any other function is part of the model, the user's
that autocasts as well; what is compiled further inside runs as it is written.

What surrounds a call: autocast off, since the pullbacks count on the dtype, and one call at a time on a model.

Autograd functions of the old form, which take `ctx` in their forward, in the form that torch.func can transform.

`torch.func` needs forward and setup_context apart. The old forward is run for its output, and once more for what it
leaves in its `ctx`; the old backward is as it was. For the time of one computation the new form stands in for the old.

Mixture-of-experts layers, one expert at a time: the grouped product that takes all at once has no batching rule.

Under `vmap` torch would run it once for each cotangent, and say so in a warning. An expert's own products have rules,
and serve all cotangents of the tokens that were sent to it.

torch.compile told to run everything as it is written: `torch.func` cannot transform what is compiled.
"""

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from fisher_vmap.model.cache import Remembered

DEVICES = ("cpu", "cuda", "mps", "xpu")

_LOCKS: Remembered["threading.RLock"] = Remembered()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within the context no other thread computes on the model with this package: its parts are exchanged meanwhile."""
    with _LOCKS.setdefault(model, threading.RLock()):
        yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """Within the context, or the function that it decorates, no operation is cast to another dtype."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


OldFunction = type[Function]


class _Context:
    """What an old forward and its backward see as `ctx`."""

    def __init__(self, saved: Sequence[Tensor | None] = (), **attributes: Any) -> None:
        self.saved_tensors = tuple(saved)
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def attributes(self) -> dict[str, Any]:
        """What the forward has put there by name."""
        return {name: value for name, value in vars(self).items() if name != "saved_tensors"}


def old_functions(model: nn.Module) -> list[OldFunction]:
    """The autograd functions of the old form in the files that the model's modules are written in."""
    files = {type(module).__module__ for module in model.modules()}
    found = (value for file in sorted(files) if file in sys.modules for value in vars(sys.modules[file]).values())
    return [value for value in found if isinstance(value, type) and issubclass(value, Function) and _is_old(value)]


def _is_old(function: OldFunction) -> bool:
    ours = function is not Function and not function.__module__.startswith("torch.")
    return ours and function.setup_context is Function.setup_context


def modern(old: OldFunction) -> OldFunction:
    """The same function in the form that torch.func can transform."""

    class Modern(Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return old.forward(_Context(), *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            left = _Context()
            old.forward(left, *inputs)
            ctx.save_for_backward(*left.saved_tensors)
            ctx.left = left.attributes()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            needed = {"needs_input_grad": ctx.needs_input_grad}
            return old.backward(_Context(ctx.saved_tensors, **needed, **ctx.left), *grads)

    return Modern


@contextmanager
def modernised(functions: Iterable[OldFunction]) -> Iterator[None]:
    """Within the context the functions given are called in their new form."""
    swapped = []
    try:
        for function in functions:
            function.apply = modern(function).apply  # type: ignore[method-assign]
            swapped.append(function)
        yield
    finally:
        for function in swapped:
            del function.apply


ONE_AT_A_TIME = "eager"


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Within the context the model's experts run one after another, whatever the model was told before."""
    # The attribute behind the property, which would change nested configurations as well.
    name = "_experts_implementation_internal"
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, name, None) is not None}
    before = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, name, ONE_AT_A_TIME)
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


class _Calls:
    """How many calls of this package are running, in all threads, and what the last of them has to undo."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.stance: AbstractContextManager[Any] | None = None


_CALLS = _Calls()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within the context functions that are compiled run as they are written, in every thread; afterwards as before.

    The setting is one of the process: threads that were to set it back one by one would leave it on.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled: it takes a second to load
        yield
        return
    with _CALLS.lock:
        if _CALLS.running == 0:
            _CALLS.stance = torch.compiler.set_stance("force_eager")
        _CALLS.running += 1
    try:
        yield
    finally:
        with _CALLS.lock:
            _CALLS.running -= 1
            if _CALLS.running == 0 and _CALLS.stance is not None:
                _CALLS.stance.__exit__(None, None, None)
                _CALLS.stance = None


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
