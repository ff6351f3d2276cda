"""torch.autocast around a call: off inside, since the dtype is the model's and the pullbacks by hand count on it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def autocast_off() -> Iterator[None]:
    """Within the context, or the function that it decorates, no operation is cast to another dtype."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
