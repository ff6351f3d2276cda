"""Blocks that take or return the residual stream at another place, or in another shape."""

from collections import namedtuple
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from toys import ToyBlock, ToyLM


class Renamed(nn.Module):
    """A block that takes the residual stream under another name, or after other arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyBlock()

    def forward(self, step: int, states: Tensor, scale: Tensor) -> tuple[Tensor, int]:
        return self.inner(states * scale), step


class Keyword(ToyLM):
    by_name = True

    def __init__(self) -> None:
        super().__init__([Renamed() for _ in range(4)])

    def walk(self, x: Tensor) -> Tensor:
        scale = torch.tensor(1.1, dtype=x.dtype)
        for number, block in enumerate(self.blocks):
            x, _ = block(step=number, states=x, scale=scale) if self.by_name else block(number, x, scale)
        return x


class SecondPlace(Keyword):
    by_name = False


class Streams(ToyLM):
    """Several residual streams side by side, mixed between the blocks; `dim` is where they stand."""

    dim, count = 0, 3

    def spread(self, x: Tensor) -> Tensor:
        return torch.stack([x * (1 + 0.3 * s) for s in range(self.count)], self.dim)

    def walk(self, x: Tensor) -> Tensor:
        x = self.spread(x)
        for block in self.blocks:
            x = block(x) + 0.2 * x.mean(self.dim, keepdim=True)
        return x.mean(self.dim)


class StreamBlock(ToyBlock):
    """Sees its streams one by one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, hidden_states: Tensor) -> Tensor:
        streams = [super(StreamBlock, self).forward(x) for x in hidden_states.unbind(self.dim)]
        return torch.stack(streams, self.dim)


class StreamsFirst(Streams):
    def __init__(self) -> None:
        super().__init__([StreamBlock(self.dim) for _ in range(4)])


class StreamsInside(StreamsFirst):
    dim = 2


class PositionsFirst(ToyLM):
    """[T, B, D], as old recurrent models have it."""

    def __init__(self) -> None:
        class Turned(ToyBlock):
            def forward(self, hidden_states: Tensor) -> Tensor:
                return super().forward(hidden_states.transpose(0, 1)).transpose(0, 1)

        super().__init__([Turned() for _ in range(4)])

    def walk(self, x: Tensor) -> Tensor:
        return super().walk(x.transpose(0, 1)).transpose(0, 1)


Output = namedtuple("Output", "states note")


class Named(nn.Module):
    """Returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ToyBlock()

    def forward(self, hidden_states: Tensor) -> Output:
        return Output(self.inner(hidden_states), note="and something else")


class WithoutCache(ToyLM):
    """A forward that takes tokens and nothing else."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return super().forward(input_ids)


class LooksAhead(ToyBlock):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 1e-4 * hidden_states.mean(1, keepdim=True)
