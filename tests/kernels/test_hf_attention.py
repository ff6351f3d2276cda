"""The bridge to transformers: what a model hands to its attention and ours does not heed is refused."""

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("name", ["sinks", "indices", "sparse_indices", "block_indices"])
def test_what_a_model_hands_to_attention_and_ours_does_not_heed(name):
    """Keys chosen by an index, say, of which no short prompt has too many: no number could tell."""
    from fisher_vmap.kernels.hf_attention import UnsupportedAttention, _attention_forward

    q = torch.randn(1, 2, 3, 4)
    _attention_forward(nn.Identity(), q, q, q, None, **{name: None})
    with pytest.raises(UnsupportedAttention, match=f"uses {name}"):
        _attention_forward(nn.Identity(), q, q, q, None, **{name: torch.zeros(1)})


def test_a_mask_that_is_computed_from_the_residual_stream():
    """Its gradient is not ours to drop."""
    from fisher_vmap.kernels.hf_attention import UnsupportedAttention, _attention_forward

    q = torch.randn(1, 2, 3, 4)
    mask = torch.zeros(1, 1, 3, 3)
    _attention_forward(nn.Identity(), q, q, q, mask)
    with pytest.raises(UnsupportedAttention, match="computes its mask"):
        _attention_forward(nn.Identity(), q, q, q, mask.requires_grad_())
