"""Models of which a second call is not the first one: state, masks that change, inputs written into."""

import torch
from models import WIDTH
from torch import Tensor

from toys import ToyBlock, ToyLM


class CachingBlock(ToyBlock):
    """Attends to its cache as well; whoever calls it again without emptying the cache gets something else."""

    cache: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        pairs = self.keys_and_values(hidden_states)
        if self.cache is not None and self.cache.shape == pairs[0].shape:
            pairs = (pairs[0] + self.cache, pairs[1])
        self.cache = pairs[0].detach()
        return self.think(self.attend(hidden_states, *pairs))


class Stateful(ToyLM):
    """Empties its cache at the beginning of a forward: every forward is the same, a replay is not."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), CachingBlock(), ToyBlock()])

    def walk(self, x: Tensor) -> Tensor:
        self.blocks[2].cache = None
        return super().walk(x)


class LateFault(ToyBlock):
    """Multiplies its output from the n-th call of a forward on, once the fault is switched on."""

    faulty = False
    calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states) * (1.2 if self.faulty and self.calls > 1 else 1.0)


class LateStateful(ToyLM):
    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), LateFault(), ToyBlock()])

    def walk(self, x: Tensor) -> Tensor:
        self.blocks[2].calls = 0
        return super().walk(x)


class MaskedBlock(ToyBlock):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.think(self.attend(hidden_states, *self.keys_and_values(hidden_states), mask=mask))


class ChangingMask(ToyLM):
    """One mask for all blocks, narrowed in place on the way up: what was recorded is no longer what was used."""

    def __init__(self) -> None:
        super().__init__([MaskedBlock() for _ in range(4)])

    def walk(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.zeros(T, T, dtype=x.dtype)
        for number, block in enumerate(self.blocks):
            x = block(x, mask=mask)
            mask -= 0.5 * (number + 1) * torch.arange(T)
        return x


class NamedMaskBlock(MaskedBlock):
    """Reads the model's config when it is called: no mask means causal under "fused" and everything under "eager"."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None or self.config._attn_implementation == "fused":
            return super().forward(hidden_states, mask)
        keys, values = self.keys_and_values(hidden_states)
        weights = (self.query(self.norm1(hidden_states)) @ keys.mT * WIDTH**-0.5).softmax(-1)
        return self.think(hidden_states + self.out(weights @ values))


class NamedMask(ToyLM):
    """Builds a mask under "eager" and none under "fused", as the models of transformers do."""

    def __init__(self) -> None:
        class Config:
            _attn_implementation = "fused"

        config = Config()
        super().__init__([NamedMaskBlock(config) for _ in range(4)])
        self.config = config

    def walk(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(()) if self.config._attn_implementation == "eager" else None
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


class WritingBlock(ToyBlock):
    """Adds to its input in place."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += 3 * self.norm2.bias
        return super().forward(hidden_states)


class SelfMasking(ToyBlock):
    """Its mask depends on the residual stream: all that it does is through the block's own input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = self.norm1(hidden_states)[..., :1].mT
        return self.think(self.attend(hidden_states, *self.keys_and_values(hidden_states), mask=mask))
