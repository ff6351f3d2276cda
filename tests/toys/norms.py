"""Norms that are none of the common kinds, or used as none of these."""

import torch
from models import WIDTH
from torch import Tensor, nn

from toys import ToyBlock


class GatedNorm(nn.Module):
    """A norm that takes a gate as well: what it does on one input says nothing of what it does on two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if gate is None else x * torch.sigmoid(gate)


class GatedBlock(ToyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = GatedNorm()

    def think(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm2(x, gate=x))))
