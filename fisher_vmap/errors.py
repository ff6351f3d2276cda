"""Exceptions that are shown as one line without a traceback, and what such lines are made of."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in what was asked for, which the user can mend: settings, model, data or folder.

    The message is one line that says what was given, what was expected and what to do next. The command line turns
    it into exit code 2; from Python it is an ordinary `ValueError`.
    """


class WorkerError(RuntimeError):
    """Work that failed on another process or machine: one line that names it with its reason. Exit code 1."""


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for such a line: the first few, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shown(value: object) -> str:
    """A value for such a line, in quotation marks and not too long."""
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 60
    shortened.maxlong = 30
    return shortened.repr(value)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The name that was probably meant, if there is one: a typing error, or a part of a name."""
    word, words = word.replace("-", "_"), list(words)
    # A typing error first, then a part of a name; anything looser would suggest nonsense.
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    near = near or [name for name in words if word and word in name.split("_")]
    bare = word.replace("_", "")
    near = near or [name for name in words if len(bare) > 2 and bare in name.replace("_", "")]
    return near[0] if near else None
