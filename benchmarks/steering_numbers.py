"""What the numbers of `benchmarks.steering` say: ratios, medians and intervals. A gain that is not reached costs
infinitely much."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

GAINS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # nats of log-odds
DAMPINGS = (1e-2, 1e-1, 1.0, 10.0)  # in units of tr F / D
SHOWN = (1.0, 2.0, 3.0)
RESAMPLES = 1000
NATURAL, EUCLID, MEANS, PCA = "natural", "Euclidean gradient", "difference of means", "PCA of differences"
SETTINGS = ("average", "own")

Array = NDArray[np.float64]


class Measured(NamedTuple):
    """A number, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


def number(x: float) -> str:
    """Three digits at most, or the sign of infinity."""
    if not np.isfinite(x):
        return "∞"
    return f"{x:.2g}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def array(values: list[Any]) -> Array:
    """[prompts, gains], infinite where a gain is not reached."""
    found = np.array(values, dtype=float)
    return np.where(np.isnan(found), np.inf, found)


def score(tries: dict[str, dict[str, Any]], key: str, gains: Sequence[float] = SHOWN) -> float:
    """The mean logarithm, over some gains, of the median off-target KL over concepts and prompts."""
    rows = np.concatenate([array(of[key]) for of in tries.values()])
    medians = np.median(rows[:, [GAINS.index(gain) for gain in gains]], axis=0)
    return float(np.log(medians).mean())


def cells(kept: dict[str, Any], models: list[str] | None = None) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(model, layer, concept, numbers) of all that is measured."""
    for model, of in kept["models"].items():
        if models is None or model in models:
            for layer, found in of["layers"].items():
                for concept, cell in found.items():
                    yield model, layer, concept, cell


def ratios(cell: dict[str, Any], setting: str, other: str, by: str = NATURAL) -> Array:
    """[prompts, gains]: the off-target KL of another method over that of a natural step; NaN if neither gets there."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return array(cell[setting][other]) / array(cell[setting][by])


class Pool:
    """Ratios of several cells, with the prompts that they share."""

    def __init__(self, chosen: list[tuple[str, str, str, dict[str, Any]]], setting: str, other: str, by: str) -> None:
        groups: dict[tuple[str, str], list[Array]] = {}
        for model, _, concept, cell in chosen:
            groups.setdefault((model, concept), []).append(ratios(cell, setting, other, by))
        self.groups = [np.stack(found, 1) for found in groups.values()]  # [prompts, layers, gains] each

    def at(self, gain: float) -> list[Array]:
        """[prompts, layers] of each concept."""
        return [found[:, :, GAINS.index(gain)] for found in self.groups]

    def median(self, gain: float) -> Measured:
        """Over prompts, concepts and layers; the interval by drawing prompts anew within each concept."""
        parts, rng = self.at(gain), np.random.default_rng(0)
        drawn = [middle([part[rng.integers(len(part), size=len(part))] for part in parts]) for _ in range(RESAMPLES)]
        # An order statistic, without interpolation: some of them may be infinite.
        low, high = np.sort(drawn)[[int(0.025 * RESAMPLES), int(0.975 * RESAMPLES) - 1]]
        return Measured(middle(parts), float(low), float(high))

    def where_both(self, gain: float) -> tuple[float, int]:
        """The median over those where both get there, and how many these are."""
        values = np.concatenate([part.ravel() for part in self.at(gain)])
        both = values[np.isfinite(values) & (values > 0)]
        return (float(np.median(both)) if len(both) else float("nan")), len(both)

    def won(self, gain: float) -> float:
        """The share in which the natural step costs less."""
        values = np.concatenate([part.ravel() for part in self.at(gain)])
        values = values[~np.isnan(values)]
        return float((values > 1).mean()) if len(values) else float("nan")


def middle(parts: list[Array]) -> float:
    """The median of all numbers but NaN; infinite ones count."""
    values = np.concatenate([part.ravel() for part in parts])
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return float("nan")
    a, b = values[(len(values) - 1) // 2], values[len(values) // 2]
    return float(a) if a == b else float((a + b) / 2)


def reached(chosen: list[tuple[str, str, str, dict[str, Any]]], setting: str, method: str, gain: float) -> float:
    """The share of prompts on which a method gets to a gain at any length."""
    values = np.concatenate([array(cell[setting][method])[:, GAINS.index(gain)] for *_, cell in chosen])
    return float(np.isfinite(values).mean())


def costs(chosen: list[tuple[str, str, str, dict[str, Any]]], setting: str, method: str) -> Array:
    """[3, gains]: quartiles of the off-target KL over prompts, concepts and layers."""
    rows = np.sort(np.concatenate([array(cell[setting][method]) for *_, cell in chosen]), axis=0)
    return rows[[len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4]]
