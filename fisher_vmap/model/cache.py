"""`Remembered`: values remembered for a model, stored in the model itself so that they are freed with it.

A separate mapping from models to values would hold its values, even with weak keys. Values of this package hold modules
of their model, and a module's hooks may hold the model, so the mapping would keep its own keys alive forever. A value
stored in the model can at worst form a reference cycle, which Python's garbage collector frees.
"""

import threading
import weakref
from typing import Any, Generic, TypeVar

from torch import nn

Value = TypeVar("Value")

NAME = "_fisher_vmap"  # the model's attribute
_MAKING = threading.Lock()


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
