"""Memory that is used again and again: a pullback's passing results stay in the processor's cache.

Fresh memory for every product of every block would be written out to main memory and fetched back; on two cores that
took more time than the elementwise work that it was for.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a passing result, for all cotangents together, that go through a chain of products before the next do.
# On a CPU the chain then stays in its caches; fewer rows than LEAST_ROWS would slow the products down. On a GPU larger
# is better, and nothing is taken apart.
ELEMENTS_IN_CACHE = {"cpu": 2**23}
LEAST_ROWS = 1024


class Scratch:
    """Named stretches of memory. A name's tensor holds until that name is asked for again."""

    def __init__(self) -> None:
        self._stretches: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory of that shape, with the dtype and the device of another tensor, and with anything in it."""
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if key not in self._stretches or self._stretches[key].numel() < size:
            self._stretches[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._stretches[key][:size].view(*shape)


def stretches(ends: Sequence[int], cotangents: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Neighbouring ranges [start, stop) of positions, each about as much as stays in cache.

    Args:
        ends: where a range may end, in increasing order; the last is the number of positions.
        cotangents: K, rows for each position.
        width: of a row, where the chain is widest.
        device: where they are.
    """
    elements = ELEMENTS_IN_CACHE.get(device.type)
    most = None if elements is None else max(LEAST_ROWS, elements // width)
    start = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or (most is not None and (following - start) * cotangents > most):
            yield start, end
            start = end
