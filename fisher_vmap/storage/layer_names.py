"""Which of a folder's layers is meant, by its name or by its block's number."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from fisher_vmap.errors import UserError
from fisher_vmap.storage.name_lists import several


def layer_named(wanted: str | SupportsIndex, layers: Sequence[str], folder: Path) -> str:
    """The name of a stored layer.

    Args:
        wanted: a name; or a block's number, as digits too: that of the layer whose name ends in it ("model.layers.15").
        layers: the names that are stored.
        folder: where.

    Raises:
        UserError: no such layer, several, or a number from the top, which only the model knows.
    """
    if isinstance(wanted, str) and wanted in layers:
        return wanted
    there = f"there is {several(layers)}"
    number = _number(wanted)
    if number is None:
        raise UserError(f"{wanted!r:.80} was not hooked in {folder}; {there}")
    if number < 0:
        raise UserError(f"layer {number} counts from the model's top, which a results folder does not know; {there}")
    found = [layer for layer in layers if layer.rpartition(".")[2] == str(number)]
    if len(found) > 1:
        raise UserError(f"layer {number} may be {' or '.join(found)}; give the name")
    if not found:
        raise UserError(f"layer {number} was not hooked in {folder}; {there}")
    return found[0]


def _number(wanted: object) -> int | None:
    try:
        return int(wanted) if isinstance(wanted, str) else operator.index(wanted)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
