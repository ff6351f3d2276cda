"""Items computed in this process: all of them, or every n-th, where other processes compute the others."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


class Share(NamedTuple):
    """The share of one of several processes: the `number`-th of `processes`, from 1."""

    number: int
    processes: int

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """Every n-th item, from this process's first on."""
        return islice(items, self.number - 1, None, self.processes)

    def has(self, place: int) -> bool:
        """Whether the item at this place, from 0, is this process's."""
        return place % self.processes == self.number - 1


def run_items(
    compute: Callable[[Iterator[T]], Iterator[Result]], items: Iterable[T], share: Share | None = None
) -> Iterator[Result]:
    """What `compute` gives for the items, or for this process's share of them, in their order."""
    yield from compute(iter(items) if share is None else share.of(items))
