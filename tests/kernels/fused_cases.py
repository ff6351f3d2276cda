"""A module's fused pullback against plain autograd of the module."""

import torch
from devices import placed
from oracles import relative
from torch import Tensor, nn
from torch.func import vjp, vmap

from fisher_vmap.kernels.decoder_block import fused_forward


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_pulls_back_right(module: nn.Module, width: int, tolerance: float, device: torch.device) -> None:
    x, cotangents = 1.5 * draw(2, 5, width) + 0.3, draw(4, 2, 5, width, seed=1)
    dtype = next(module.parameters()).dtype
    module, x, cotangents = placed((module, x.to(dtype), cotangents.to(dtype)), device)
    forward = fused_forward(module)
    assert forward is not None
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    grads = torch.stack([torch.autograd.grad(expected, leaf, c, retain_graph=True)[0] for c in cotangents])
    out, pull = vjp(forward, x)
    assert torch.equal(out, expected)  # to the bit
    assert relative(vmap(pull)(cotangents)[0], grads) < tolerance
    assert relative(pull(cotangents[0])[0], grads[0]) < tolerance
