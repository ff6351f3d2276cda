"""What our hand-written pullbacks share: functions of their own, linear in the cotangent, with a rule for `vmap`."""

from typing import Any

import torch


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


def cotangent_dim(in_dims: tuple[int | None, ...]) -> int:
    """The batched dimension of a `Pullback`'s cotangent.

    Raises:
        NotImplementedError: something else is batched.
    """
    first, *others = in_dims
    if first is None or any(dim is not None for dim in others):
        raise NotImplementedError("only the cotangents can be batched: everything else is shared by all of them")
    return first
