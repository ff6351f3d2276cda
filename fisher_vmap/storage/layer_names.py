"""Names of layers as people write and read them: a number for a name, the order of numbers, many of them in a few words."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fisher_vmap.errors import UserError, listed

RUN = 4  # names in a row from which they are summed up

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def layer_named(name: str | int, layers: Sequence[str], folder: Path) -> str:
    """The hooked layer that a name, or a block's number as `run` takes it, stands for.

    Args:
        name: a layer's name or number; digits as text are a number.
        layers: the hooked ones.
        folder: where they are, for the error.

    Raises:
        UserError: no such layer was hooked, or a negative number, which the model's top would be needed for.
    """
    if name in layers:
        return str(name)
    number = int(name) if re.fullmatch(r"-?\d{1,9}", str(name)) else None
    if number is not None and number < 0:
        raise UserError(
            f"layer {number} counts from the model's top, which {folder} does not know; there is {several(layers)}"
        )
    found = [] if number is None else [layer for layer in layers if layer.rpartition(".")[2] == str(number)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"layer {number} may be any of {several(found)} in {folder}; give its name")
    what = repr(name) if number is None else f"layer {number}"
    raise UserError(f"{what} was not hooked in {folder}; there is {several(layers)}")


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def several(names: Iterable[str]) -> str:
    """Names on one line: a run of numbered ones by its first and last, and of what is left ten at most."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    total = sum(map(len, runs))
    parts = [part for run in runs for part in ([f"{run[0]} ... {run[-1]}"] if len(run) >= RUN else run)]
    return listed(parts) + (f", {total} in all" if len(parts) < total else "")


def _follows(one: str, other: str) -> bool:
    a, b = _LAST_NUMBER.match(one), _LAST_NUMBER.match(other)
    return a is not None and b is not None and (a[1], a[3], int(a[2]) + 1) == (b[1], b[3], int(b[2]))
