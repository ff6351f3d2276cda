"""How many positions a model has: where they are embedded one by one, in a table, there are no others.

Telling that memory ran out from everything else that can go wrong.

What a caller may give in place of a tensor, a whole number or layers: said in one line before anything is run.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

_FAULTS = (AssertionError, AttributeError, NameError, TypeError)

# How out of memory is spelt where it comes as a RuntimeError: torch on the CPU, cuBLAS, Apple's GPUs.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_our_fault(error: BaseException) -> bool:
    """Whether an error is a programming error of this package, not something that a model or a user's hook did.

    Such an error must not be taken for a reason to choose a slower form.
    """
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return isinstance(error, _FAULTS) and last.partition(".")[0] == __name__.partition(".")[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


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


class PositionTables(TorchFunctionMode):
    """Notes the tables of positions that a forward pass looks rows up in, while the context lasts.

    The tokens must be all alike: consecutive rows that are looked up are then no tokens but positions. A rotary
    embedding looks nothing up.
    """

    def __init__(self, tokens: int) -> None:
        """Watch for prompts of so many tokens."""
        super().__init__()
        self._tokens = tokens
        self._rooms: list[int] = []

    @property
    def room(self) -> int | None:
        """The most tokens that all tables that were seen have rows for; None: there was no table."""
        return min(self._rooms, default=None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an embedding is asked for."""
        if func is embedding and len(args) >= 2:
            rows, table = args[:2]
            for_each_token = isinstance(rows, Tensor) and rows.dim() > 0 and rows.shape[-1] == self._tokens > 1
            if for_each_token and bool((rows.diff(dim=-1) == 1).all()):
                self._rooms.append(len(table) - int(rows[..., 0].max()))
        return func(*args, **(kwargs or {}))


def most_positions(model: Any) -> int | None:
    """The number of positions that a model was made for, by its config, or None where it has no such number.

    Where positions are embedded one by one there are no others; elsewhere what stands further on is noise.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
