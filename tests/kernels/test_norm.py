"""Fused pullbacks against plain autograd, and what they are not to be used for."""

import pytest
import torch
from forms import assert_layerwise, right_form
from fused_cases import assert_pulls_back_right
from models import tiny
from torch import Tensor, nn
from toys import ToyLM
from toys.norms import GatedBlock

from fisher_vmap.kernels.modules import norm_kind


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.1.input_layernorm"),  # root mean square
        ("gemma2", "model.layers.1.post_feedforward_layernorm"),  # the same with 1 + w
        ("gpt2", "transformer.h.1.ln_2"),
        ("opt", "model.decoder.layers.1.final_layer_norm"),
    ],
)
def test_norms(family, name, device):
    assert_pulls_back_right(tiny(family, torch.float32).get_submodule(name), 36, 1e-6, device)
    if family in ("gpt2", "opt"):  # the others are float32 inside
        assert_pulls_back_right(tiny(family).get_submodule(name), 36, 1e-12, device)


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


@pytest.mark.parametrize("number", range(3))
def test_a_norm_that_is_given_more_than_its_input(number):
    assert_layerwise(right_form(ToyLM([GatedBlock() for _ in range(3)]), f"blocks.{number}"))
