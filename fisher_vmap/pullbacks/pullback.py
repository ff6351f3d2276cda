"""What our hand-written derivatives share: functions of their own, linear in what moves, with a rule for `vmap`.

A module with rules is a `Derived`: its `backward` applies a `Pullback` to the cotangent, its `jvp` a `Pushforward` to
the tangent. Only those two ever see K vectors at once.
"""

from typing import Any, NoReturn

import torch


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
