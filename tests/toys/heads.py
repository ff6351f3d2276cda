"""Models that read their logits in other ways than by a norm and an unembedding."""

import torch
from models import WIDTH
from torch import Tensor, nn

from toys import ToyLM


class TanhHead(ToyLM):
    def read(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(super().read(x))


class ScaledInside(ToyLM):
    def read(self, x: Tensor) -> Tensor:
        return self.unembed(1.7 * self.norm(x))


class PositionalHead(ToyLM):
    """What follows the last block depends on where the token stands."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x) * torch.linspace(1, 2, 40)[: x.shape[1], None].to(x))


class VanishingHead(ToyLM):
    """Prompts of eight tokens, as the probe sees them, come out as zeros: what is proven on them is of nothing."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x) * (x.shape[1] != 8))


class CopyingHead(ToyLM):
    """Logits plus a term of the residual stream that does not go through the unembedding."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x)) + x @ self.embed.weight.T / 6


class MixingNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None])


class BatchedNorm(nn.LayerNorm):
    """Takes three dimensions and no other number of them."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        return super().forward(x.view(B * T, D)).view(B, T, D)


class OtherNorm(ToyLM):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        norm.double().load_state_dict(self.norm.state_dict())
        self.norm = norm


class MixingHead(OtherNorm):
    """The final norm looks at all positions."""

    def __init__(self) -> None:
        super().__init__(MixingNorm(WIDTH))


class BatchedHead(OtherNorm):
    def __init__(self) -> None:
        super().__init__(BatchedNorm(WIDTH))


class LogitsOfTwoPositions(ToyLM):
    """Logits of the position before come in after the unembedding."""

    def read(self, x: Tensor) -> Tensor:
        logits = super().read(x)
        return logits + 0.5 * torch.nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]


class LowRankHead(nn.Linear):
    """A subclass of Linear that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class SubclassHead(ToyLM):
    def __init__(self) -> None:
        super().__init__()
        head = LowRankHead(WIDTH, len(self.unembed.weight), bias=False).double()
        head.load_state_dict(self.unembed.state_dict())
        self.unembed = head


class NoOutputEmbeddings(ToyLM):
    def get_output_embeddings(self) -> None:
        return None


class TwoReadings(ToyLM):
    """A mixture of two softmaxes of one unembedding."""

    def read(self, x: Tensor) -> Tensor:
        both = torch.stack([self.unembed(self.norm(x)), self.unembed(self.norm(-x))])
        return both.log_softmax(-1).logsumexp(0)


class TransformedHead(ToyLM):
    """A layer of its own between the last block and the unembedding, written out in the model's code."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH).double()

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(torch.nn.functional.gelu(self.dense(x))) / 1.3 + 0.1)


class NarrowedHead(TransformedHead):
    """The row that is unembedded is not as wide as the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed = nn.Linear(20, len(self.unembed.weight)).double()

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(2 * self.dense(self.norm(x))[..., :20])


class SteppedLogits(ToyLM):
    """A soft-cap that the config does not tell: at large logits the identity is off by much, at small ones not."""

    cap = 30.0

    def read(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().read(x) / self.cap)


class ScaledTwice(ToyLM):
    """Its logits are made in a way that no head of ours has: read through the logits themselves."""

    def read(self, x):
        logits = super().read(x)
        return logits + 0.1 * logits.square()
