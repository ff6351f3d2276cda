"""How well a score ranks the prompts with the trigger: AUC, precision at 20, and their bootstrap.

Both depend on the order of the scores alone. A score is high where a prompt looks like one with the trigger; NaN, for a
prompt without a score, is the lowest of all. k prompts carry the trigger, n do not.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]

FIRST = 20  # precision among the prompts of the highest scores
RESAMPLES = 10_000
_REACH = 10  # times so many prompts, at least, among which precision looks before it looks at all
_AT_ONCE = 1000  # resamples: 16 MB of weights of 2,000 prompts


class Draws(NamedTuple):
    """[resamples] of a score's AUC and precision at 20."""

    auc: Float
    precision: Float


def levels(scores: Float) -> NDArray[np.uint16]:
    """[n] the place of each score among the distinct ones, the lowest 0; ties share a place."""
    _, places = np.unique(np.where(np.isnan(scores), -np.inf, scores), return_inverse=True)
    return places.astype(np.uint16)


def auc(scores: Float, carries: Mask) -> float:
    """The probability that a prompt with the trigger has a higher score than one without; a tie counts one half."""
    places = levels(scores).astype(np.int64)
    above = np.concatenate([[0], np.cumsum(np.bincount(places[~carries], minlength=places.max() + 1))])
    found = places[carries]
    return float((above[found] + above[found + 1]).mean() / 2 / (~carries).sum())


def precision(scores: Float, carries: Mask, first: int = FIRST) -> float:
    """The share of prompts with the trigger among the `first` highest scores, in the mean over the orders of ties."""
    weights = np.ones((1, len(scores)))
    return float(_precisions(levels(scores), carries, weights, first)[0])


def _precisions(places: NDArray[np.uint16], carries: Mask, weights_RP: Float, first: int = FIRST) -> Float:
    """[R] precision where a prompt is there as often as its weight says."""
    order = np.argsort(-places.astype(np.int64), kind="stable")
    starts = np.flatnonzero(np.diff(places[order], prepend=-1))
    least = _REACH * first
    reach = int(starts[starts >= least][0]) if starts[-1] >= least else len(order)
    if weights_RP[:, order[:reach]].sum(1).min() >= first:  # every resample's first ones are among these
        order, starts = order[:reach], starts[starts < reach]
    sizes = np.add.reduceat(weights_RP[:, order], starts, axis=1)  # of each level, the highest first
    marked = np.add.reduceat(np.where(carries[order], weights_RP[:, order], 0), starts, axis=1)
    before = np.cumsum(sizes, axis=1) - sizes
    taken = np.clip(first - before, 0, sizes)
    return np.asarray((marked * taken / np.maximum(sizes, 1)).sum(1) / first)


def bootstrap(several: dict[str, NDArray[np.uint16]], carries: Mask, seed: int) -> dict[str, Draws]:
    """Both of each score, in the same resamples: of the prompts with the trigger and of those without, separately.

    Args:
        several: `levels` of each score.
        carries: which prompts have the trigger.
        seed: of the resamples.
    """
    found: dict[str, list[Draws]] = {name: [] for name in several}
    for weights_RP in _weights(carries, seed):
        with_RP, without_RP = weights_RP[:, carries], weights_RP[:, ~carries]
        for name, places in several.items():
            places_i = places.astype(np.int64)
            counts = np.zeros((len(weights_RP), int(places_i.max()) + 2))
            for row, weights in zip(counts, without_RP, strict=True):
                row[1:] = np.cumsum(np.bincount(places_i[~carries], weights, len(row) - 1))
            mine = places_i[carries]
            below = (counts[:, mine] + counts[:, mine + 1]) / 2
            aucs = (below * with_RP).sum(1) / carries.sum() / (~carries).sum()
            found[name].append(Draws(aucs, _precisions(places, carries, weights_RP)))
    return {name: Draws(*map(np.concatenate, zip(*parts, strict=True))) for name, parts in found.items()}


def _weights(carries: Mask, seed: int) -> Iterator[Float]:
    """[R, prompts] how often each prompt is in a resample."""
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, _AT_ONCE):
        R = min(_AT_ONCE, RESAMPLES - start)
        weights_RP = np.zeros((R, len(carries)))
        for of in (carries, ~carries):
            size = int(of.sum())
            weights_RP[:, of] = rng.multinomial(size, np.full(size, 1 / size), R)
        yield weights_RP


def interval(draws: Float, level: float = 0.95) -> tuple[float, float]:
    """The percentiles that hold so much of the draws in the middle."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
