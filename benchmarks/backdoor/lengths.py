"""Lengths of steps at which they change a model's next token by a given divergence."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WITHIN = 0.05  # of a level, in which a length is good enough
HALVINGS = 40  # of an interval, or of a length, at most
STRAIGHT = 8  # rounds in which a straight line is tried, before halving


def lengths(
    divergence_of: Callable[[Tensor], Tensor],
    directions_CX: Tensor,
    levels: Sequence[float],
    start: float,
    most: float,
) -> tuple[Tensor, Tensor]:
    """Lengths of steps at which the divergence is at some levels, to within `WITHIN`.

    A length is doubled until the divergence is above the highest level. In the first of these intervals that crosses a
    level, the next length is where a line through its ends crosses it, on logarithmic scales; an end that stays counts
    half (the Illinois rule). All directions are computed together.

    Args:
        divergence_of: [N] nats of steps [N, X].
        directions_CX: unit vectors.
        levels: nats, each above zero.
        start: the first length.
        most: the largest one, which is taken where a level is not reached.

    Returns:
        Lengths [C, levels], and the divergence at each; float64.
    """

    def at(some: Sequence[int], length: Sequence[float]) -> list[float]:
        scale_N1 = torch.tensor(length, dtype=directions_CX.dtype)[:, None]
        values = divergence_of(directions_CX[list(some)] * scale_N1).tolist()
        return [math.inf if math.isnan(value) else max(value, 1e-12) for value in values]

    C = len(directions_CX)
    known: list[list[tuple[float, float]]] = [[] for _ in range(C)]  # lengths and divergences, the shortest first
    length, active = min(start, most), list(range(C))
    while active:
        for c, value in zip(active, at(active, [length] * len(active)), strict=True):
            known[c].append((length, value))
        active = [] if length == most else [c for c in active if known[c][-1][1] <= max(levels)]
        length = min(2 * length, most)
    for _ in range(HALVINGS):  # where the first length is too long already
        active = [c for c in range(C) if known[c][0][1] > min(levels)]
        if active:
            halves = [known[c][0][0] / 2 for c in active]
            for c, half, value in zip(active, halves, at(active, halves), strict=True):
                known[c].insert(0, (half, value))
    places = [(c, level) for c in range(C) for level in levels]
    brackets = [_Bracket(known[c], level) for c, level in places]
    for number in range(STRAIGHT + HALVINGS):
        waiting = [k for k, bracket in enumerate(brackets) if not bracket.done]
        if waiting:
            tried = [brackets[k].propose(number < STRAIGHT) for k in waiting]
            for k, length, value in zip(waiting, tried, at([places[k][0] for k in waiting], tried), strict=True):
                brackets[k].take(length, value)
    best = torch.tensor([bracket.best for bracket in brackets], dtype=torch.float64).reshape(C, len(levels), 2)
    return best[:, :, 0], best[:, :, 1]


class _Bracket:
    """An interval of lengths in which the divergence crosses a level, on logarithmic scales."""

    def __init__(self, known: Sequence[tuple[float, float]], level: float) -> None:
        self.level = level
        crosses = (i for i in range(1, len(known)) if known[i - 1][1] <= level < known[i][1])
        i = next(crosses, None)
        ends = known[-1:] if i is None else known[i - 1 : i + 1]
        self.best = min(ends, key=self._off)
        self.done = i is None or self._off(self.best) <= WITHIN
        self.x = [math.log(length) for length, _ in ends]
        self.y = [math.log(value / level) for _, value in ends]
        self.kept = -1  # the end that the last length left as it was

    def _off(self, point: tuple[float, float]) -> float:
        return abs(point[1] / self.level - 1)

    def propose(self, straight: bool) -> float:
        """The next length."""
        (a, b), (below, above) = self.x, self.y
        share = below / (below - above) if straight and math.isfinite(above) and above > below else 0.5
        return math.exp(a + min(max(share, 0.02), 0.98) * (b - a))

    def take(self, length: float, value: float) -> None:
        """Shorten the interval."""
        end = int(value > self.level)
        self.x[end], self.y[end] = math.log(length), math.log(value / self.level)
        if self.kept == 1 - end:
            self.y[1 - end] /= 2
        self.kept = 1 - end
        self.best = min(self.best, (length, value), key=self._off)
        self.done = self._off(self.best) <= WITHIN
