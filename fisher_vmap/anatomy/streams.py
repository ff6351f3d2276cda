"""Where the output of a module has its prompts and its positions, and how a bias is added to it.

Nearly always it is [B, T, D]. Some models carry several residual streams side by side, [S, B, T, D] or [B, T, S, D]:
the bias, one vector of width D for each prompt and position, is then added to each of the S.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Place(NamedTuple):
    """The dimensions of B and of T in a tensor of so many dimensions whose last is D."""

    prompts: int
    positions: int
    dims: int

    @property
    def plain(self) -> bool:
        """Whether it is [B, T, D]."""
        return self == (0, 1, 3)

    def fits(self, shape: torch.Size, B: int, T: int) -> bool:
        """Whether a tensor of this shape has B prompts and T positions there."""
        return len(shape) == self.dims and shape[self.prompts] == B and shape[self.positions] == T

    def spread(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] in the order of this tensor, its other dimensions 1."""
        if self.plain:
            return x_BTD
        shape = [1] * self.dims
        shape[self.prompts], shape[self.positions], shape[-1] = x_BTD.shape
        return (x_BTD if self.prompts < self.positions else x_BTD.transpose(0, 1)).reshape(shape)

    def gathered(self, x: Tensor) -> Tensor:
        """[B, T, D], or [B, T, S, D] with all other dimensions in S."""
        if self.plain:
            return x
        x = x.movedim((self.prompts, self.positions), (0, 1))
        return x if x.dim() == 3 else x.flatten(2, -2)


class Hooked(NamedTuple):
    """A module whose output a bias is added to, and where that output has prompts and positions."""

    module: nn.Module
    place: Place


def place_of(shape: torch.Size, B: int, T: int) -> Place | None:
    """Where an output of this shape has B prompts and T positions; None where it does not, or where it is not clear.

    Args:
        shape: of a module's output.
        B: the number of prompts, and T of tokens, sizes that no other dimension has by chance.
        T: see B.
    """
    dims = range(len(shape) - 1)
    found = [Place(b, t, len(shape)) for b in dims for t in dims if b != t and shape[b] == B and shape[t] == T]
    if len(found) != 1 or shape[-1] == T:  # attention weights, [B, H, T, T], have no width of their own
        return None
    return found[0]
