"""Autograd functions of the old form, which take `ctx` in their forward, in the form that torch.func can transform.

`torch.func` needs forward and setup_context apart. The old forward is run for its output, and once more for what it
leaves in its `ctx`; the old backward is as it was. For the time of one computation the new form stands in for the old.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

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
