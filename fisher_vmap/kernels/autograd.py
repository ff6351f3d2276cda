"""What the rules share: base classes with a rule for `vmap`, norm and softmax pullbacks, memory that is reused.

A function with rules is a `Derived`: its `backward` applies a `Pullback` to the cotangent, its `jvp` a `Pushforward` to
the tangent. Both are functions linear in that vector, and only they receive K vectors at once.

`Scratch` reuses memory, so that a pullback's intermediate results stay in the processor's cache. New memory for every
product of every block would go to main memory and back; on two cores that took longer than the elementwise work on it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import vmap

# Most elements of an intermediate result, over all cotangents, that pass through a chain of products at a time. A CPU
# then keeps the chain in its caches; fewer rows than LEAST_ROWS would slow the products down. A GPU takes all at once.
ELEMENTS_IN_CACHE = {"cpu": 2**23}
LEAST_ROWS = 1024


class Scratch:
    """Memory by name. The tensor of a name is valid until that name is requested again."""

    def __init__(self) -> None:
        self._stretches: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory of that shape, with the dtype and the device of another tensor."""
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if key not in self._stretches or self._stretches[key].numel() < size:
            self._stretches[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._stretches[key][:size].view(*shape)


def stretches(ends: Sequence[int], cotangents: int, width: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Consecutive ranges [start, stop) of positions, each of about the size of the cache.

    `ends` are where a range may end, in increasing order up to the number of positions. Each position has K rows, one
    for each of the cotangents; `width` is the largest row width in the chain.
    """
    elements = ELEMENTS_IN_CACHE.get(device.type)
    most = None if elements is None else max(LEAST_ROWS, elements // width)
    start = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or (most is not None and (following - start) * cotangents > most):
            yield start, end
            start = end


class Derived(torch.autograd.Function):
    """A forward with rules for its pullback and pushforward."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> NoReturn:
        """Raise. Under `vmap` torch requires this rule to exist, and calls it if the inputs are batched."""
        raise NotImplementedError("only the cotangents can be batched: everything else is shared by all of them")


class Pullback(torch.autograd.Function):
    """The backward of a `Derived` as a function: the first argument is the cotangent, the others are shared by all K.

    A subclass has `forward`, for one cotangent, and `vmap`, for K. Second derivatives are not implemented.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Raise: there are no second derivatives."""
        raise NotImplementedError("this pullback has no second derivatives; transformers' own eager modules have")


class Pushforward(Pullback):
    """The forward derivative of a `Derived` as a function: first the tangent, then the arguments that all K share."""


def cotangent_dim(in_dims: tuple[int | None, ...]) -> int:
    """The batched dimension of the cotangent of a `Pullback`, or of the tangent of a `Pushforward`.

    Raises:
        NotImplementedError: another argument is batched.
    """
    first, *others = in_dims
    if first is None or any(dim is not None for dim in others):
        raise NotImplementedError("only the cotangents can be batched: everything else is shared by all of them")
    return first


def pull_each(pull: Callable[[Tensor], tuple[Tensor]], cotangents: Tensor, chunk_size: int | None) -> Tensor:
    """A pullback of rows, applied to each of K cotangents, [b, n, K, D]."""
    if cotangents.shape[2] == 1:
        return pull(cotangents[:, :, 0])[0][:, :, None]
    (below,) = vmap(pull, in_dims=2, out_dims=2, chunk_size=chunk_size)(cotangents)
    return below  # type: ignore[no-any-return]


def norm_pullback(
    g: Tensor, scale: Tensor, along: Tensor, back: Tensor, mean: Tensor | None, r: Tensor, scratch: Scratch, name: str
) -> Tensor:
    """The pullback of a norm, g * scale - back sum(g * along) - r sum(g * mean), in scratch memory of that name.

    `g` are the cotangents, [..., D]; `mean` is [D], or None for norms that do not subtract the mean; the other tensors
    broadcast to g.
    """
    product = torch.mul(g, along, out=scratch("product", g.shape, g))
    dx = torch.mul(g, scale, out=scratch(name, g.shape, g))
    dx.addcmul_(product.sum(-1, keepdim=True), back, value=-1)
    if mean is not None:  # not by addcmul: with two factors that are broadcast it takes ten times as long
        dx.sub_((g @ mean)[..., None] * r)
    return dx


def softmax_pullback(dP: Tensor, P: Tensor) -> Tensor:
    """The pullback of a softmax over the last dimension, P * (dP - sum(P * dP)), written to dP; P broadcasts to it."""
    delta = dP.mul_(P).sum(-1, keepdim=True)
    return dP.addcmul_(P, delta, value=-1)
