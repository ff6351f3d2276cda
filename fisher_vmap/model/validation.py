"""Checks of arguments, with one-line errors; kinds of errors; the number of positions of a model."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
R = TypeVar("R")

_FAULTS = (AssertionError, AttributeError, NameError, TypeError)

# Types of devices that have no float64: Apple's GPUs. All float64 of a batch asks here.
WITHOUT_FLOAT64 = ("mps",)
# Words of a RuntimeError that means out of memory: torch on the CPU, cuBLAS, Apple's GPUs.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_our_fault(error: BaseException) -> bool:
    """Whether an error is a programming error in this package, not an error of a model or a user's hook.

    Such an error must not lead to a slower form.
    """
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return isinstance(error, _FAULTS) and last.partition(".")[0] == __name__.partition(".")[0]


def forget_freed() -> None:
    """Give a GPU's freed memory back, after it ran out."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def float64_device(device: torch.device) -> torch.device:
    """The device to compute float64 on: the given one, or the CPU if it has no float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def in_float64(x: Tensor) -> Tensor:
    """The same numbers in float64, on the tensor's device or where float64 is."""
    return x.to(float64_device(x.device)).to(torch.float64)


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest format that a device computes in: float64, or float32 if it has no float64."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def in_halves(
    compute: Callable[[Sequence[T]], list[R]], items: Sequence[T], halving: Callable[[Sequence[T]], None] | None = None
) -> list[R]:
    """What `compute` returns for a batch, one result an item; out of memory for its two halves, down to single items.

    `halving` is told each batch that did not fit.
    """
    try:
        return compute(items)
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error) or len(items) == 1:
            raise
    # Outside of the handler, whose traceback keeps the tensors alive.
    if halving is not None:
        halving(items)
    forget_freed()
    half = (len(items) + 1) // 2
    return [*in_halves(compute, items[:half], halving), *in_halves(compute, items[half:], halving)]


def check_tensor(name: str, value: Any, expected: str) -> None:
    """Raise ValueError unless an argument is a tensor; `expected` is its shape and dtype in words."""
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
    """Raise ValueError unless a value is a whole number, of any library, and at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        bound = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} is {value!r:.60}; expected a whole number{bound}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}; expected at least {least}")


def listed_layers(layers: Any) -> list[str | int]:
    """The user's layers, one or several in any container, as a list of names and numbers.

    Raises:
        ValueError: an entry is neither a name nor a number.
    """
    if isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        layers = [layers]
    return [layer if isinstance(layer, str) else _number(layer) for layer in layers]


def _number(layer: Any) -> int:
    try:
        if type(layer).__name__ in ("bool", "bool_"):  # Python's and numpy's truth values do not count as numbers
            raise TypeError
        return operator.index(layer)
    except TypeError:
        raise ValueError(
            f"layers has {layer!r:.60} ({type(layer).__name__}); expected names of modules, numbers of blocks, or 'all'"
        ) from None


class PositionTables(TorchFunctionMode):
    """Within the context, find the tables of positions in which a forward pass looks up rows.

    All tokens must be the same, so that a lookup of consecutive rows is one of positions, not of tokens. Rotary
    embeddings have no table.
    """

    def __init__(self, tokens: int) -> None:
        """Prepare for prompts of this many tokens."""
        super().__init__()
        self._tokens = tokens
        self._rooms: list[int] = []

    @property
    def room(self) -> int | None:
        """The most tokens for which all tables have rows; None: there was no table."""
        return min(self._rooms, default=None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record the tables of embedding calls."""
        if func is embedding and len(args) >= 2:
            rows, table = args[:2]
            for_each_token = isinstance(rows, Tensor) and rows.dim() > 0 and rows.shape[-1] == self._tokens > 1
            if for_each_token and bool((rows.diff(dim=-1) == 1).all()):
                self._rooms.append(len(table) - int(rows[..., 0].max()))
        return func(*args, **(kwargs or {}))


def most_positions(model: Any) -> int | None:
    """The number of positions that a model was made for, by its config, or None.

    A table of positions has no rows beyond it; with other embeddings, results beyond it are meaningless.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
