"""What is not a matrix product in the hand-written pullbacks: norms and softmax, in place, in memory used again.

Memory that is used again and again: a pullback's passing results stay in the processor's cache.

Fresh memory for every product of every block would be written out to main memory and fetched back; on two cores that
took more time than the elementwise work that it was for.

What our hand-written derivatives share: functions of their own, linear in what moves, with a rule for `vmap`.

A module with rules is a `Derived`: its `backward` applies a `Pullback` to the cotangent, its `jvp` a `Pushforward` to
the tangent. Only those two ever see K vectors at once.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

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


class Derived(torch.autograd.Function):
    """A forward with a hand-written pullback and pushforward."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
        """Raise. torch wants this rule to be there under `vmap`, and calls it if the inputs themselves are batched."""
        raise NotImplementedError("only the cotangents can be batched: everything else is shared by all of them")


class Pullback(torch.autograd.Function):
    """The backward of a module as a function: first the cotangent, then what all K of them share.

    A subclass has `forward`, for one cotangent, and `vmap`, for K. It has no backward itself: second derivatives are
    not implemented.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise: there are no second derivatives."""
        raise NotImplementedError("this pullback has no second derivatives; transformers' own eager modules have")


class Pushforward(Pullback):
    """The forward derivative of a module as a function: first the tangent, then what all K of them share."""


def cotangent_dim(in_dims: tuple[int | None, ...]) -> int:
    """The batched dimension of the cotangent of a `Pullback`, or of the tangent of a `Pushforward`.

    Raises:
        NotImplementedError: something else is batched.
    """
    first, *others = in_dims
    if first is None or any(dim is not None for dim in others):
        raise NotImplementedError("only the cotangents can be batched: everything else is shared by all of them")
    return first


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
