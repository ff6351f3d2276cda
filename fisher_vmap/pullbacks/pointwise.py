"""What is not a matrix product in the hand-written pullbacks: norms and softmax, in place, in memory used again."""

import torch
from torch import Tensor

from fisher_vmap.pullbacks.scratch import Scratch


def norm_pullback(
    g: Tensor, scale: Tensor, along: Tensor, back: Tensor, mean: Tensor | None, r: Tensor, scratch: Scratch, name: str
) -> Tensor:
    """The pullback of a norm, g * scale - back sum(g * along) - r sum(g * mean), in scratch memory of that name.

    Args:
        g: [..., D], the cotangents.
        scale: with as many dimensions as g, and broadcasts to it, as the next two do.
        along: see scale.
        back: see scale.
        mean: the same, for norms that take the mean off; else None.
        r: [..., 1], broadcasts to g.
        scratch: for the result and for what passes through.
        name: of the result's memory, which holds until that name is asked for again.
    """
    product = torch.mul(g, along, out=scratch("product", g.shape, g))
    dx = torch.mul(g, scale, out=scratch(name, g.shape, g))
    dx.addcmul_(product.sum(-1, keepdim=True), back, value=-1)
    if mean is not None:
        dx.addcmul_(torch.mul(g, mean, out=product).sum(-1, keepdim=True), r, value=-1)
    return dx


def softmax_pullback(dP: Tensor, P: Tensor) -> Tensor:
    """The pullback of a softmax, P * (dP - sum(P * dP)) over the last dimension, in place of dP; P broadcasts to it."""
    delta = dP.mul_(P).sum(-1, keepdim=True)
    return dP.addcmul_(P, delta, value=-1)
