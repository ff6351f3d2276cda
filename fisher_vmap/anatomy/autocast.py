"""What surrounds a call: autocast off, since the pullbacks count on the dtype, and one call at a time on a model."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from fisher_vmap.anatomy.remembered import Remembered

DEVICES = ("cpu", "cuda", "mps", "xpu")

_LOCKS: Remembered["threading.RLock"] = Remembered()


@contextmanager
def one_at_a_time(model: nn.Module) -> Iterator[None]:
    """Within the context no other thread computes on the model with this package: its parts are exchanged meanwhile."""
    with _LOCKS.setdefault(model, threading.RLock()):
        yield


@contextmanager
def autocast_off() -> Iterator[None]:
    """Within the context, or the function that it decorates, no operation is cast to another dtype."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
