"""Processors of two kinds, and who counts what is multiplied in a narrow format."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_vmap.model import widening
from fisher_vmap.model.precision import Rates

SLOW, FAST = (
    Rates((11.0, 1.1), (85.0, 85.0)),
    Rates((900.0, 800.0), (120.0, 120.0)),
)  # without bfloat16 arithmetic, with


class NarrowProducts(TorchDispatchMode):
    """Counts matrix products in a narrow format."""

    names = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.narrow, self.all = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in func.overloadpacket.__name__ for name in self.names):
            self.all += 1
            if any(isinstance(a, torch.Tensor) and a.dtype in widening.NARROW for a in args):
                self.narrow.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
