"""Contexts that undo, during a call, what would break or slow down the derivatives of a model.

* `one_at_a_time`: one call at a time on a model, since its parts are replaced during a call.
* `autocast_off`: the pullbacks rely on the dtype.
* `own_forwards`, `nothing_compiled`: wrappers by torch.autocast, accelerate's mixed precision and torch.compile are
  taken off, because a wrapper that autocasts would change the dtype inside a call, and `torch.func` cannot transform
  compiled code. Only wrappers recognised by the code that made them are taken off. Any other function is part of the
  model, even a user's that autocasts. Functions compiled further inside run uncompiled.
* `modernised`: old autograd functions take `ctx` in their forward; `torch.func` needs forward and setup_context apart.
  The new form runs the old forward for its output, and once more for what it stores in `ctx`, and the old backward.
* `experts_apart`: experts of a mixture run one at a time. The grouped product of all experts has no batching rule, so
  `vmap` would run it once for each cotangent (with a warning). One expert's products serve all cotangents at once.

`Remembered` keeps values in the model itself, so that they are freed with it. A separate mapping from models to values
would hold its values, even with weak keys: they hold modules of their model, and a module's hooks may hold the model,
so the mapping would keep its own keys alive forever. A value stored in the model can at worst form a reference cycle,
which Python's garbage collector frees.
"""

import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

OldFunction = type[Function]
Value = TypeVar("Value")

NAME = "_fisher_vmap"  # the model's attribute
_MAKING = threading.Lock()

DEVICES = ("cpu", "cuda", "mps", "xpu")
ONE_EXPERT = "eager"  # transformers' name of the implementation that runs one expert after another

# What marks a wrapper: the module that its code is in, and the code's name; None: all of that module's.
WRAPPERS = {
    ("torch.amp.autocast_mode", "decorate_autocast"),
    ("torch._dynamo.eval_frame", None),
    ("torch._dynamo.external_utils", None),
    ("accelerate.utils.operations", "forward"),
}
UNDER_ACCELERATE = "_old_forward"  # the attribute in which accelerate's device hooks keep the forward that they call
OUTER_FIRST = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
INNER_FIRST = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _Kept:
    """All that is remembered for one model. A copy of it is an empty dict: a copied model starts with nothing."""

    def __init__(self, model: nn.Module) -> None:
        self.of = weakref.ref(model)
        self.values: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, copy and deepcopy: an empty dict, which can be loaded without this package."""
        return dict, ()


class Remembered(Generic[Value]):
    """A mapping from models to values that keeps no model alive.

    The values are not part of a model's state_dict, its copies or what is saved of it.
    """

    def get(self, model: nn.Module) -> Value | None:
        """The value of a model, or None."""
        kept = _kept_of(model)
        return None if kept is None else kept.values.get(self)

    def setdefault(self, model: nn.Module, value: Value) -> Value:
        """The value of a model; if there is none, store this one. All threads get the same value."""
        with _MAKING:
            found: Value = _made(model).values.setdefault(self, value)
        return found

    def pop(self, model: nn.Module, default: Value | None = None) -> Value | None:
        """Remove the value of a model and return it, or the default if there is none."""
        kept = _kept_of(model)
        return default if kept is None else kept.values.pop(self, default)

    def __contains__(self, model: nn.Module) -> bool:
        kept = _kept_of(model)
        return kept is not None and self in kept.values

    def __getitem__(self, model: nn.Module) -> Value:
        if (kept := _kept_of(model)) is None:
            raise KeyError(type(model).__name__)
        found: Value = kept.values[self]
        return found

    def __setitem__(self, model: nn.Module, value: Value) -> None:
        with _MAKING:
            _made(model).values[self] = value


def _kept_of(model: nn.Module) -> _Kept | None:
    """The values stored in a model; None if they are another model's, as in a shallow copy, which has them too."""
    kept = vars(model).get(NAME)
    return kept if isinstance(kept, _Kept) and kept.of() is model else None


def _made(model: nn.Module) -> _Kept:
    if (kept := _kept_of(model)) is None:
        kept = vars(model)[NAME] = _Kept(model)
    return kept


_LOCKS: Remembered["threading.RLock"] = Remembered()
# By module and attribute: the forward found there, and what it wraps. Kept, as a new method object would look changed.
_OWN: Remembered[dict[tuple[nn.Module, str], tuple[Any, Any]]] = Remembered()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within the context no other thread computes on the model with this package."""
    with _LOCKS.setdefault(model, threading.RLock()):
        yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """Within the context, or the decorated function, no operation is autocast to another dtype."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Context:
    """The `ctx` of an old forward and its backward."""

    def __init__(self, saved: Sequence[Tensor | None] = (), **attributes: Any) -> None:
        self.saved_tensors = tuple(saved)
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def attributes(self) -> dict[str, Any]:
        """The attributes set by the forward."""
        return {name: value for name, value in vars(self).items() if name != "saved_tensors"}


def old_functions(model: nn.Module) -> list[OldFunction]:
    """The old autograd functions in the Python modules that define the model's classes."""
    files = {type(module).__module__ for module in model.modules()}
    found = (value for file in sorted(files) if file in sys.modules for value in vars(sys.modules[file]).values())
    functions = (value for value in found if isinstance(value, type) and issubclass(value, Function))
    own = (f for f in functions if f is not Function and not f.__module__.startswith("torch."))
    return [f for f in own if f.setup_context is Function.setup_context]


def modern(old: OldFunction) -> OldFunction:
    """The same function in the form that `torch.func` can transform."""

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
    """Within the context these functions are called in their new form."""
    swapped = []
    try:
        for function in functions:
            function.apply = modern(function).apply  # type: ignore[method-assign]
            swapped.append(function)
        yield
    finally:
        for function in swapped:
            del function.apply


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Within the context the model's experts run one after another, regardless of its configuration."""
    # The attribute behind the property: setting the property would change nested configurations as well.
    name = "_experts_implementation_internal"
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, name, None) is not None}
    before = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, name, ONE_EXPERT)
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)


class _Calls:
    """How many calls of this package are running, in all threads, and the stance that the last of them resets."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.stance: AbstractContextManager[Any] | None = None


_CALLS = _Calls()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within the context compiled functions run uncompiled, in every thread.

    The setting belongs to the process, so only the last thread to leave resets it; otherwise it could stay on.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled; importing it takes a second
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


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Within the context no module of the model autocasts or is compiled; each is restored afterwards.

    A module that `torch.compile` has put in place of another is replaced by the original, with the hooks of both.
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
    """The function inside the known wrappers of a module's forward; the same object if there is no such wrapper."""
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
    """Whether a forward is the method of the module's class, bound to the module."""
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def _is_wrapper(function: Any) -> bool:
    if not hasattr(function, "__wrapped__"):
        return False
    if isinstance(function, FunctionType):  # look at its code, since functools.wraps copies the attributes
        where = function.__globals__.get("__name__")
        return not WRAPPERS.isdisjoint({(where, function.__code__.co_name), (where, None)})
    kind = type(function)
    return (kind.__module__, kind.__name__) == ("accelerate.utils.operations", "ConvertOutputsToFp32")


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule"


def _uncompiled(compiled: nn.Module, stack: ExitStack) -> nn.Module:
    """The original of a compiled module, with the hooks of both until the stack is closed."""
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
