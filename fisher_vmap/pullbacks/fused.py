"""Which modules have a forward whose derivatives we have written ourselves.

A module is taken for a norm or a gated MLP only if its output on random input is what the formula says.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from fisher_vmap.pullbacks.gated_mlp import fused_gated_mlp, is_gated_mlp
from fisher_vmap.pullbacks.norms import fused_norm, norm_kind

Forward = Callable[..., Any]


def fused_forward(module: nn.Module) -> Forward | None:
    """The module's forward with a fused pullback, or None where there is no rule for it."""
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, say, that it may be given as well
        return None
    if is_gated_mlp(module):
        return fused_gated_mlp(module)
    if (kind := norm_kind(module)) is not None:
        return fused_norm(module, kind)
    return None
