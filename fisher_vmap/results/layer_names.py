"""Layer names: sorted by their numbers, many of them on one line, and found by a block's number."""

import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

from fisher_vmap.errors import UserError, listed

RUN = 4  # from so many consecutive names on, `several` shows only the first and the last

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def several(names: Iterable[str]) -> str:
    """Names on one line: the first and last of each run of consecutive numbers, and at most ten others."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    total = sum(map(len, runs))
    parts = [part for run in runs for part in ([f"{run[0]} ... {run[-1]}"] if len(run) >= RUN else run)]
    return listed(parts) + (f", {total} in all" if len(parts) < total else "")


def layer_named(wanted: str | SupportsIndex, layers: Sequence[str], folder: Path) -> str:
    """The name of a stored layer.

    Args:
        wanted: a name, or a block's number (digits too): 15 is the layer whose name ends in ".15".
        layers: the names that are stored.
        folder: the results folder, for the errors.

    Raises:
        UserError: no such layer, several, or a negative number.
    """
    if isinstance(wanted, str) and wanted in layers:
        return wanted
    there = f"there is {several(layers)}"
    try:
        number = int(wanted) if isinstance(wanted, str) else operator.index(wanted)
    except (TypeError, ValueError) as error:
        raise UserError(f"{wanted!r:.80} was not hooked in {folder}; {there}") from error
    if number < 0:
        raise UserError(f"layer {number} counts from the model's top, which a results folder does not know; {there}")
    found = [layer for layer in layers if layer.rpartition(".")[2] == str(number)]
    if len(found) > 1:
        raise UserError(f"layer {number} may be {' or '.join(found)}; give the name")
    if not found:
        raise UserError(f"layer {number} was not hooked in {folder}; {there}")
    return found[0]


def _follows(one: str, other: str) -> bool:
    a, b = _LAST_NUMBER.match(one), _LAST_NUMBER.match(other)
    return a is not None and b is not None and (a[1], a[3], int(a[2]) + 1) == (b[1], b[3], int(b[2]))
