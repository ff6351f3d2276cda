"""Exceptions that are shown as one line without a traceback, and what such lines are made of."""

from collections.abc import Sequence


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
