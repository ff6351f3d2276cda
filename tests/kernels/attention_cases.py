"""Queries, keys and values for the tests of attention, and which keys a query sees."""

from contextlib import contextmanager

import torch
from torch import Tensor

from fisher_vmap.model.layout import lay_out, pack_rows

B, E, EV, K = 2, 6, 5, 4
LENGTHS = (5, 1, 9, 5)  # of the packed prompts
SCALE = 0.37  # not E ** -0.5: a scale that is forgotten shows


@contextmanager
def no_vmap_fallback():
    """An operator without a batching rule is an error, and not a loop."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(H: int, G: int, T: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * draw(B, H, T, E, seed=1), 2 * draw(B, G, S, E, seed=2), draw(B, G, S, EV, seed=3)


def causal(T: int, S: int) -> Tensor:
    """[T, S] bool: position t sees keys up to t + S - T."""
    return torch.arange(S) <= torch.arange(T)[:, None] + (S - T)


def window(T: int, S: int) -> Tensor:
    return causal(T, S) & (torch.arange(S) > torch.arange(T)[:, None] + (S - T) - 5)


def packed_prompts(device=None):
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    tokens = torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(1))
    return pack_rows(lay_out(tokens.to(device), mask.to(device)))
