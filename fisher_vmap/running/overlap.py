"""What goes on in the background while the model computes: the next shard's tokens, and the last shard's files."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; each is made in a background thread while the one before it is in use.

    Raises:
        Exception: whatever `items` raises, at the place of the item that it could not make.
    """
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming: Future[Any] = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """Within the context, `later(function, *arguments)` calls it in a background thread, one call at a time.

    Before it begins a call it waits for the one before, and raises what that one raised; so does the end of the
    context. Where the context itself is left by an error or Ctrl-C, the call that has begun is still completed.
    """
    begun: Future[Any] | None = None
    with ThreadPoolExecutor(1, "behind") as thread:

        def later(function: Callable[..., Any], *arguments: Any) -> None:
            nonlocal begun
            if begun is not None:
                begun.result()
            begun = thread.submit(function, *arguments)

        yield later
        if begun is not None:
            begun.result()
