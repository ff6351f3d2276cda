"""The tokens that a direction trades over many prompts: whose probability grows along it, and whose falls."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.results.shard_reader import ShardReader

TOKENS = 8  # of each kind

Float64 = NDArray[np.float64]
Mask = NDArray[np.bool_]


class TokenChange(NamedTuple):
    """A token whose probability changes along a direction."""

    token_id: int
    text: str
    """As the folder stores it; "#ID" where it does not."""
    change: float
    """sum over prompts of p_t (g_t . v): the change of p_t for a step v of length 1, to first order."""


class Traded(NamedTuple):
    """The tokens that a direction trades, those that change most first: at most `TOKENS` of each kind."""

    up: tuple[TokenChange, ...]
    """Their probabilities grow."""
    down: tuple[TokenChange, ...]
    """Theirs fall."""


def traded_tokens(
    shards: Callable[[], Iterable[ShardReader]], layer: str, asked: Sequence[tuple[Mask, Float64]]
) -> list[tuple[Traded, ...]]:
    """Of groups of prompts, the tokens that directions trade.

    With A = Q diag(sqrt S) V of a prompt, whose rows are sqrt(p_t) g_t, p_t (g_t . v) = sqrt(p_t) (A v)_t.

    Args:
        shards: gives the readers of all shards.
        layer: the layer's name.
        asked: of each group, which prompts, booleans by their index, [stored], with numbers all; directions v [m, D].

    Returns:
        Of each group [m], one for each direction.
    """
    names: dict[int, str] = {}
    sums: list[dict[int, Float64]] = [{} for _ in asked]
    for reader in shards():
        start, stop = reader.entry.start, reader.entry.stop
        rows = np.flatnonzero(np.any([mask[start:stop] for mask, _ in asked], axis=0)).tolist()
        if not rows:
            continue
        stack = reader.stack(layer)
        tokens = {row: reader.tokens(start + row) for row in rows}
        _collect(names, reader, {row: ids.tolist() for row, (ids, _) in tokens.items()})
        for (mask, directions), total in zip(asked, sums, strict=True):
            ids, changes = list[NDArray[np.int64]](), list[Float64]()
            for row in rows:
                if mask[start + row]:
                    S, V, Q = (array[row].astype(np.float64) for array in stack)
                    root_p = np.exp(0.5 * tokens[row][1].astype(np.float64))
                    ids.append(tokens[row][0])
                    changes.append(root_p[:, None] * (Q @ (np.sqrt(S)[:, None] * (V @ directions.T))))
            if ids:
                _add(total, np.concatenate(ids), np.concatenate(changes))
    return [
        tuple(_most(total, number, names) for number in range(len(directions)))
        for total, (_, directions) in zip(sums, asked, strict=True)
    ]


def _collect(names: dict[int, str], reader: ShardReader, ids: dict[int, list[int]]) -> None:
    """Add the texts of the tokens of a shard's rows."""
    if "top_tokens" in reader.table.schema.names:
        texts = reader.table.column("top_tokens").to_pylist()
        for row, tokens in ids.items():
            for token, text in zip(tokens, texts[row] or (), strict=False):
                names.setdefault(token, text)


def _add(total: dict[int, Float64], ids: NDArray[np.int64], changes: Float64) -> None:
    """Add the changes [N, m] of tokens [N] to the sums by token; -1, any other token, is left out."""
    different, places = np.unique(ids, return_inverse=True)
    sums = np.zeros((len(different), changes.shape[1]))
    np.add.at(sums, places, changes)
    for token, change in zip(different.tolist(), sums, strict=True):
        if token >= 0:
            total[token] = total[token] + change if token in total else change


def _most(total: dict[int, Float64], direction: int, names: dict[int, str]) -> Traded:
    """The tokens that one direction changes most, up and down."""
    changes = [
        TokenChange(token, names.get(token, f"#{token}"), float(sums[direction])) for token, sums in total.items()
    ]
    ranked = sorted(
        changes,
        key=lambda each: (-each.change, each.token_id),
    )
    up = tuple(each for each in ranked[:TOKENS] if each.change > 0)
    return Traded(up, tuple(each for each in ranked[: -TOKENS - 1 : -1] if each.change < 0))
