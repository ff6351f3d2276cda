"""Fused pullbacks against plain autograd, and what they are not to be used for."""

import pytest
import torch
from models import tiny
from oracles import relative
from torch import Tensor, nn
from torch.func import vjp, vmap

from fisher_vmap.kernels.decoder_block import fused_forward
from fisher_vmap.kernels.gated_mlp import is_gated_mlp
from fisher_vmap.kernels.norm import norm_kind


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_pulls_back_right(module: nn.Module, width: int, tolerance: float) -> None:
    x, cotangents = 1.5 * draw(2, 5, width) + 0.3, draw(4, 2, 5, width, seed=1)
    dtype = next(module.parameters()).dtype
    x, cotangents = x.to(dtype), cotangents.to(dtype)
    forward = fused_forward(module)
    assert forward is not None
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    grads = torch.stack([torch.autograd.grad(expected, leaf, c, retain_graph=True)[0] for c in cotangents])
    out, pull = vjp(forward, x)
    assert torch.equal(out, expected)  # to the bit
    assert relative(vmap(pull)(cotangents)[0], grads) < tolerance
    assert relative(pull(cotangents[0])[0], grads[0]) < tolerance


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.input_layernorm"),  # root mean square
        ("gemma2", "model.layers.1.post_feedforward_layernorm"),  # the same with 1 + w
        ("gpt2", "transformer.h.1.ln_2"),
        ("opt", "model.decoder.layers.1.final_layer_norm"),
    ],
)
def test_norms(family, name):
    assert_pulls_back_right(tiny(family, torch.float32).get_submodule(name), 36, 1e-6)
    if family in ("gpt2", "opt"):  # the others are float32 inside
        assert_pulls_back_right(tiny(family).get_submodule(name), 36, 1e-12)


@pytest.mark.parametrize(("family", "name"), [("llama", "model.layers.1.mlp"), ("gemma2", "model.layers.2.mlp")])
def test_gated_mlps(family, name):
    assert_pulls_back_right(tiny(family).get_submodule(name), 36, 1e-12)


class Squashed(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class Halved(nn.Module):
    """As a norm but for a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(7)), 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("module", [Squashed(7), Halved(), nn.Linear(7, 7), nn.Embedding(7, 7), nn.BatchNorm1d(7)])
def test_what_is_no_norm(module):
    assert norm_kind(module.eval()) is None


def test_what_is_no_gated_mlp():
    mlp = tiny("llama").get_submodule("model.layers.1.mlp")
    assert is_gated_mlp(mlp)
    assert not is_gated_mlp(tiny("gpt2").get_submodule("transformer.h.1.mlp"))

    class Other(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Other(mlp.config).double()
    assert not is_gated_mlp(other) and fused_forward(other) is None
