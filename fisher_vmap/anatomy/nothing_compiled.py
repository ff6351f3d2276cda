"""torch.compile told to run everything as it is written: `torch.func` cannot transform what is compiled."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class _Calls:
    """How many calls of this package are running, in all threads, and what the last of them has to undo."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = 0
        self.stance: AbstractContextManager[Any] | None = None


_CALLS = _Calls()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within the context functions that are compiled run as they are written, in every thread; afterwards as before.

    The setting is one of the process: threads that were to set it back one by one would leave it on.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled: it takes a second to load
        yield
        return
    with _CALLS.lock:
        if _CALLS.running == 0:
            _CALLS.stance = torch.compiler.set_stance("force_eager")
        _CALLS.running += 1
    try:
        yield
    finally:
        with _CALLS.lock:
            _CALLS.running -= 1
            if _CALLS.running == 0 and _CALLS.stance is not None:
                _CALLS.stance.__exit__(None, None, None)
                _CALLS.stance = None
