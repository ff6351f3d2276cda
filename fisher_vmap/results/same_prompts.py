"""Two results folders of the same prompts, side by side: whether they are the same, and their shards by pairs.

Prompts are the same if they have the same number and text, and the same completion where the data gives one. Where one
of the folders stores no text, source rows and token counts are compared in its place.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fisher_vmap.errors import UserError, shown
from fisher_vmap.progress import bar, passing
from fisher_vmap.results.folder import plain_values
from fisher_vmap.results.index import Index
from fisher_vmap.results.record import Stack
from fisher_vmap.results.shard_reader import ShardReader

Matched = Literal["text", "source rows and token counts"]

_NAMES = ("text", "truncated", "source_row", "tokens", "status")
_COMPLETIONS = "completions"
_Row = dict[str, Any]  # these columns of a prompt's row
_BEFORE = 20  # characters shown before the first difference of two long texts
_APART = {"model", "model_path", "layers", "hook_layer_name", "device_type"}  # what usually differs, or is told


@dataclass(frozen=True)
class Side:
    """One of the two folders, at one layer."""

    folder: Path
    index: Index
    layer: str
    shards: Callable[[], Iterator[ShardReader]]
    """Gives the readers of all shards, in order."""

    @property
    def width(self) -> int:
        """D."""
        return self.index.layout.widths[self.layer]


class Piece(NamedTuple):
    """Prompts [start, stop), which lie in one shard of each folder."""

    one: ShardReader
    other: ShardReader
    start: int
    stop: int

    def rows(self, reader: ShardReader) -> slice:
        """Their rows in one of the two shards."""
        return slice(self.start - reader.entry.start, self.stop - reader.entry.start)

    def columns(self, reader: ShardReader, names: Iterable[str]) -> list[list[Any]]:
        """Columns of their rows of a shard's table."""
        rows = self.rows(reader)
        part = reader.table.slice(rows.start, rows.stop - rows.start)
        return [part.column(name).to_pylist() for name in names]


def pieces(one: Side, other: Side) -> Iterator[Piece]:
    """The prompts that both folders store, in order; a reader of each folder is in memory at a time."""
    seconds = other.shards()
    second = next(seconds, None)
    for first in one.shards():
        while second is not None and second.entry.start < first.entry.stop:
            start, stop = max(first.entry.start, second.entry.start), min(first.entry.stop, second.entry.stop)
            if start < stop:
                yield Piece(first, second, start, stop)
            if second.entry.stop > first.entry.stop:
                break
            second = next(seconds, None)


def stacks(one: Side, other: Side, what: str) -> Iterator[tuple[Piece, Stack, Stack]]:
    """The `pieces` of which some prompt has numbers in both folders, with their S, V and Q.

    Args:
        one: the first folder.
        other: the second one.
        what: for the progress bar.
    """
    held: dict[int, tuple[int, Stack]] = {}  # of each folder the number of a shard, and its arrays
    with bar(len(one.index.shards), "shards", what) as advance:
        for piece in pieces(replace(one, shards=lambda: passing(one.shards(), advance)), other):
            if not both_ok(piece).any():
                continue
            for place, (side, reader) in enumerate(((one, piece.one), (other, piece.other))):
                if place not in held or held[place][0] != reader.entry.number:
                    held.pop(place, None)  # before the next one is read
                    held[place] = (reader.entry.number, reader.stack(side.layer))
            yield piece, _cut(held[0][1], piece.rows(piece.one)), _cut(held[1][1], piece.rows(piece.other))


def _cut(stack: Stack, rows: slice) -> Stack:
    return Stack(*(array[rows] for array in stack))


def both_ok(piece: Piece) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[stop - start] which prompts have numbers in both folders."""
    (one,), (other,) = (piece.columns(reader, ["status"]) for reader in (piece.one, piece.other))
    return np.array([a == b == "ok" for a, b in zip(one, other, strict=True)], bool)


def check_same(one: Side, other: Side) -> Matched:
    """Check that two folders are of the same prompts; returns by what they were compared.

    Raises:
        UserError: a prompt is another one, which the line names, or is in one of two finished folders alone.
    """
    texts = one.index.layout.store_text and other.index.layout.store_text
    given = texts and all(side.index.fingerprint.get("targets") == "completion" for side in (one, other))
    names = (*_NAMES, *([_COMPLETIONS] if given else []))
    with bar(len(one.index.shards), "shards", "comparing prompts") as advance:
        for piece in pieces(replace(one, shards=lambda: passing(one.shards(), advance)), other):
            rows = (zip(*piece.columns(reader, names), strict=True) for reader in (piece.one, piece.other))
            for number, pair in enumerate(zip(*rows, strict=True), piece.start):
                a, b = (dict(zip(names, row, strict=True)) for row in pair)
                if not _alike(a, b, texts):
                    raise UserError(_difference(number, (a, b), (one.folder, other.folder), texts))
    ends = one.index.stop, other.index.stop
    if ends[0] != ends[1] and one.index.complete and other.index.complete:
        longer = one if ends[0] > ends[1] else other
        raise UserError(
            f"{one.folder} has {ends[0]} prompts and {other.folder} {ends[1]}: prompt {min(ends)} is in "
            f"{longer.folder} alone; compare two runs over the same prompts, with the same --num_prompts"
        )
    return "text" if texts else "source rows and token counts"


def _alike(a: _Row, b: _Row, texts: bool) -> bool:
    if texts and a["text"] is not None and b["text"] is not None:
        return _same_text(a, b, a["text"], b["text"]) and _same_completion(a, b)
    rows = (a["source_row"], b["source_row"])
    counted = not texts and a["status"] == b["status"] == "ok"
    return (None in rows or rows[0] == rows[1]) and not (counted and a["tokens"] != b["tokens"])


def _same_text(a: _Row, b: _Row, one: str, other: str) -> bool:
    """Other tokenizers cut a text at other places: one that was cut is the beginning of the other."""
    cut_one, cut_other = a["truncated"] and other.startswith(one), b["truncated"] and one.startswith(other)
    return bool(one == other or cut_one or cut_other)


def _same_completion(a: _Row, b: _Row) -> bool:
    pairs = zip(a.get(_COMPLETIONS) or (), b.get(_COMPLETIONS) or (), strict=False)
    return all(_same_text(a, b, one, other) for one, other in pairs)


def _difference(
    number: int, rows: tuple[dict[str, Any], dict[str, Any]], folders: tuple[Path, Path], texts: bool
) -> str:
    a, b = rows
    what = f"prompt {number}"
    if texts and a["text"] is not None and b["text"] is not None:
        pair = a["text"], b["text"]
        if _same_text(a, b, *pair):
            what = f"the completion of prompt {number}"
            pairs = zip(a[_COMPLETIONS], b[_COMPLETIONS], strict=True)
            pair = next(each for each in pairs if not _same_text(a, b, *each))
        one, other = _apart(*pair)
        why = "compare two runs over the same prompts in the same order"
    else:
        one, other = (f"row {row['source_row']} of the data with {row['tokens']} tokens" for row in rows)
        stores = "its text is not stored" if texts else "one of the folders stores no texts"
        why = f"{stores}, so that source rows and token counts are compared; run both with store_text: true"
    return f"{what} is {one} in {folders[0]} and {other} in {folders[1]}; {why}"


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two texts shortened, so that one sees where they differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(same - _BEFORE, 0)
    return shown(one[start:]), shown(other[start:])


def other_settings(one: Index, other: Index) -> dict[str, tuple[Any, Any]]:
    """The settings that change results and differ between two runs, but for model and layers; None: not set."""
    a, b = plain_values(one.fingerprint), plain_values(other.fingerprint)
    names = [name for name in {**a, **b} if name not in _APART and a.get(name) != b.get(name)]
    return {name: (a.get(name), b.get(name)) for name in names}


def texts_of(shards: Iterable[ShardReader], prompts: Iterable[int]) -> dict[int, str | None]:
    """The stored texts of some prompts, by their numbers; None where there is none."""
    wanted = sorted(set(prompts))
    found: dict[int, str | None] = {}
    for reader in shards:
        there = [prompt for prompt in wanted if reader.entry.start <= prompt < reader.entry.stop]
        if there:
            texts = reader.table.column("text").to_pylist()
            found |= {prompt: texts[prompt - reader.entry.start] for prompt in there}
    return found
