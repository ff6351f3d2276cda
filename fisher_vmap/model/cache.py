"""What is remembered of a model: it is kept in the model itself, so that it lives and dies with it.

A mapping from models to values beside the models, weak keys or not, holds its values. Values of this package hold
modules of their model, and a module's hooks may hold the model: such a mapping would keep its own key alive for good.
What the model itself holds is a circle at worst, which Python's collector frees.
"""

import threading
import weakref
from typing import Any, Generic, TypeVar

from torch import nn

Value = TypeVar("Value")

NAME = "_fisher_vmap"  # of the attribute
_MAKING = threading.Lock()


class _Kept:
    """All that is remembered of one model. A copy of the model begins with nothing: a copy of this is an empty dict."""

    def __init__(self, model: nn.Module) -> None:
        self.of = weakref.ref(model)
        self.values: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, copy and deepcopy: what they make of it needs nothing of this package, and is not used again."""
        return dict, ()


class Remembered(Generic[Value]):
    """One thing that is remembered of models: a mapping from each model to its value, which holds on to no model.

    A model's state_dict, its copies and what is saved of it are without it.
    """

    def get(self, model: nn.Module) -> Value | None:
        """The value of a model; None: there is none."""
        kept = _kept_of(model)
        return None if kept is None else kept.values.get(self)

    def setdefault(self, model: nn.Module, value: Value) -> Value:
        """The value of a model; where there is none, this one from now on. Threads all get the same."""
        with _MAKING:
            kept = _kept_of(model)
            if kept is None:
                kept = vars(model)[NAME] = _Kept(model)
            found: Value = kept.values.setdefault(self, value)
        return found

    def pop(self, model: nn.Module, default: Value | None = None) -> Value | None:
        """Forget the value of a model, and return it; the default where there is none."""
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
            if (kept := _kept_of(model)) is None:
                kept = vars(model)[NAME] = _Kept(model)
            kept.values[self] = value


def _kept_of(model: nn.Module) -> _Kept | None:
    """What is kept in a model; None where that is another model's: a shallow copy has all attributes of the first."""
    kept = vars(model).get(NAME)
    return kept if isinstance(kept, _Kept) and kept.of() is model else None
