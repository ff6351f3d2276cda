"""Gated MLPs: pulled back against plain autograd, and told from what is none."""

import pytest
from fused_cases import assert_pulls_back_right
from models import tiny
from torch import Tensor

from fisher_vmap.kernels.decoder_block import fused_forward
from fisher_vmap.kernels.mlp import mlp_of


@pytest.mark.parametrize(("family", "name"), [("llama", "model.layers.1.mlp"), ("gemma2", "model.layers.2.mlp")])
def test_gated_mlps(family, name, device):
    assert_pulls_back_right(tiny(family).get_submodule(name), 36, 1e-12, device)


def test_what_is_no_gated_mlp():
    mlp = tiny("llama").get_submodule("model.layers.1.mlp")
    assert mlp_of(mlp) is not None


    class Other(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    other = Other(mlp.config).double()
    assert mlp_of(other) is None and fused_forward(other) is None
