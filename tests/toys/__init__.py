"""A small language model written out in full, whose parts a test can replace by ones that break an assumption."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from models import VOCABULARY, WIDTH, draw
from torch import Tensor, nn


class ToyBlock(nn.Module):
    """One head of causal attention and a small network, both before-normed: the residual stream in, the same out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 58), nn.Linear(58, WIDTH)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm1(x)
        return self.key(normed), self.value(normed)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """x plus what its queries find; `mask` is added to the scores, and causality comes on top of it."""
        scores = self.query(self.norm1(x)) @ keys.mT * WIDTH**-0.5
        T, S = scores.shape[-2:]
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool, device=x.device).triu(1 + S - T), -torch.inf)
        scores = scores if mask is None else scores + mask
        return x + self.out(scores.softmax(-1) @ values)

    def think(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm2(x))))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.think(self.attend(hidden_states, *self.keys_and_values(hidden_states)))


class ToyLM(nn.Module):
    """Embedding, blocks, norm, unembedding, behind the interface of a causal LM of transformers.

    A fault is planted by other blocks, by overriding `walk` (what happens between the blocks) or `read` (the head).
    """

    def __init__(self, blocks: Sequence[nn.Module] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(blocks if blocks is not None else [ToyBlock() for _ in range(4)])
        self.norm = nn.LayerNorm(WIDTH)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        draw(self, seed).double().eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.unembed

    def walk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x))

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.read(self.walk(self.embed(input_ids))))


class LinearBlock(nn.Module):
    """x plus W times the mean of x over the positions up to each: linear, and a bias at every position stays one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        counts = torch.arange(1, hidden_states.shape[1] + 1).to(hidden_states)
        return hidden_states + self.matrix(hidden_states.cumsum(1) / counts[:, None])


class LinearLM(ToyLM):
    """Logits that are linear in the residual stream: a bias theta after block n moves them by W J theta.

    J = (I + M_last) ... (I + M_{n+1}), since the running mean of a constant is the constant.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__([LinearBlock() for _ in range(4)], seed)

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(x)

    def jacobian(self, block: int) -> Tensor:
        """J, [D, D], for a bias at the output of a block."""
        J = torch.eye(WIDTH, dtype=torch.float64)
        for upper in self.blocks[block + 1 :]:
            J = J + upper.matrix.weight.detach() @ J
        return J
