"""What a caller may give in place of a tensor, a whole number or layers: said in one line before anything is run."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def check_tensor(name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless a value is a tensor.

    Args:
        name: of the argument.
        value: what was given.
        expected: its shape and dtype, in words.
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, str):
        what, do = "a text", "tokenise it first: tokenizer(text, return_tensors='pt')"
    elif isinstance(value, Mapping):
        what, do = f"a {type(value).__name__}", f"give its entries one by one: {', '.join(map(str, list(value)[:3]))}"
    elif callable(getattr(value, "factor", None)):
        what, do = f"a {type(value).__name__}", "give what its .factor() returns"
    else:
        kind, shape = type(value), getattr(value, "shape", None)
        name_of_kind = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        what, do = f"a {name_of_kind}{f' of shape {shape}' if shape else ''}", "torch.as_tensor makes one"
    raise ValueError(f"{name} is {what}; expected a tensor {expected}: {do}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise ValueError unless a value is a whole number, of any library, and not below `least`, where there is one."""
    try:
        number = operator.index(value)
    except TypeError:
        bound = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} is {value!r:.60}; expected a whole number{bound}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; expected at least {least}")


def listed_layers(layers: Any) -> list[str | int]:
    """The names and numbers of layers that a user wrote: one of them, or several in any container.

    Raises:
        ValueError: something else is among them.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        layers = [layers]
    return [layer if isinstance(layer, str) else _number(layer) for layer in layers]


def _number(layer: Any) -> int:
    try:
        if type(layer).__name__ in ("bool", "bool_"):  # a truth value is no number, Python's and numpy's
            raise TypeError
        return operator.index(layer)
    except TypeError:
        raise ValueError(
            f"layers has {layer!r:.60} ({type(layer).__name__}); expected names of modules, numbers of blocks, or 'all'"
        ) from None
