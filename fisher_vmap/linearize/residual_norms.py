"""The norm of the residual stream at a layer, one number a prompt: the median over its tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from fisher_vmap.model.layout import Layout, on_device

_MEAN_NORMS: ContextVar[bool] = ContextVar("mean_norms", default=False)


@contextmanager
def mean_norms(wanted: bool = True) -> Iterator[None]:
    """Within the context `residual_norm` is the mean over a prompt's tokens, as older results folders have it."""
    token = _MEAN_NORMS.set(wanted)
    try:
        yield
    finally:
        _MEAN_NORMS.reset(token)


def residual_norm(hidden: Tensor, layout: Layout) -> Tensor:
    """The median norm of a residual stream, [b, T, D] or [b, T, S, D], over each prompt's tokens, [B].

    float32 or wider. Of an even number of tokens it is the mean of the two middle norms; NaN where a token has NaN.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    length_N = torch.linalg.vector_norm(hidden.flatten(0, 1), dim=-1, dtype=wide)
    length_N = length_N.view(len(length_N), -1).mean(1)  # the mean over S streams
    if _MEAN_NORMS.get():
        return torch.stack([length_N[a:z].mean() for a, z in layout.ranges()]).to(layout.device)
    first_B1, count_B1 = (torch.tensor(x, device="cpu")[:, None] for x in (layout.first_row, layout.lengths))
    column_T = torch.arange(max(layout.lengths), device="cpu")
    row_BT = torch.where(column_T < count_B1, first_B1 + column_T, len(length_N))  # beyond a prompt: the row of inf
    length_N = torch.cat([length_N, length_N.new_full((1,), torch.inf)])
    length_BT = length_N[on_device(row_BT, length_N.device)]
    middle_B2 = on_device(torch.cat([(count_B1 - 1) // 2, count_B1 // 2], 1), length_N.device)
    median_B = length_BT.sort(1).values.gather(1, middle_B2).mean(1)
    return median_B.masked_fill(length_BT.isnan().any(1), torch.nan).to(layout.device)
