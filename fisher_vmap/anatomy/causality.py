"""Does a model look back only? All of the package rests on it: what stands to the right of a token must not matter."""

from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import forward_inputs
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import input_device, saved_aside
from fisher_vmap.anatomy.recording import hooks
from fisher_vmap.anatomy.streams import place_of

TOKENS = 5


def sees_ahead(model: Any) -> bool:
    """Whether the first token's logits depend on later tokens.

    Told by the gradient with respect to the embedded tokens, which is zero to the bit where there is no path: what an
    encoder sees of later tokens may be little. A model without a gradient there is told by the logits themselves.
    """
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    ids = torch.arange(1, TOKENS + 1, device=input_device(model))[None]
    ids %= getattr(embedding, "num_embeddings", TOKENS + 1)
    embedded: list[Tensor] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        if embedded or not isinstance(output, Tensor) or place_of(output.shape, 1, TOKENS) is None:
            return output
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # a copy: what comes next may write into it

    if isinstance(embedding, nn.Module):
        with torch.enable_grad(), saved_aside(model), hooks(embedding.register_forward_hook(cut)):
            gradient = _gradient(model, ids, embedded)
        if gradient is not None:
            place = place_of(gradient.shape, 1, TOKENS)
            assert place is not None
            return bool((place.gathered(gradient)[0, 1:].abs() > 0).any())  # false for NaN: a prompt's own matter
    with torch.no_grad():
        changed = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
        one, other = (model(**forward_inputs(model, x)).logits[0, 0] for x in (ids, changed))
        dtype, one, other = one.dtype, one.double(), other.double()
    return bool((one - other).norm() > 64 * torch.finfo(dtype).eps * one.norm())


def _gradient(model: Any, ids: Tensor, embedded: list[Tensor]) -> Tensor | None:
    """That of the first token's logits with respect to the embedded tokens; None where there is none to be had."""
    try:
        first = model(**forward_inputs(model, ids)).logits[0, 0]
        if not embedded or not first.requires_grad:
            return None
        return torch.autograd.grad(first.float().square().sum(), embedded[0], allow_unused=True)[0]
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        return None  # a model that cannot be differentiated is told so later, by its layer
