"""Prompts that stand end to end, taken apart for attention: groups of similar length, each padded to its longest.

Only here, between queries and keys, does a packed batch know padding; a few products on a padded group take the place
of many small ones, a prompt each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 1.25  # a group's padded rows may be this many times its real ones
# Prompts of so many tokens attend alone: on a CPU a call costs less than the copies and the padding of a group.
ALONE_FROM = {"cpu": 24}


@dataclass(frozen=True)
class Group:
    """Prompts that attend together.

    Attributes:
        rows: [b, T] int64, the row of each token; padding repeats the prompt's last row.
        real: [b, T] bool.
        own: [n] int64, the rows of the real tokens, in the order of `real`.
        prompts: [b] int64, the number of each prompt in the batch.
        single: [start, stop) where the group is one prompt, which needs no copy.
    """

    rows: Tensor
    real: Tensor
    own: Tensor
    prompts: Tensor
    single: tuple[int, int] | None

    def on(self, device: torch.device) -> "Group":
        """The same group with its rows on a device."""
        if self.rows.device == device:
            return self
        rows, real, own, prompts = (t.to(device) for t in (self.rows, self.real, self.own, self.prompts))
        return Group(rows, real, own, prompts, self.single)

    def take(self, x: Tensor) -> Tensor:
        """[b, H, T, ...] of the group, from [1, H, N, ...]."""
        if self.single is not None:
            return x[:, :, self.single[0] : self.single[1]]
        return x[0, :, self.rows].transpose(0, 1)

    def take_real(self, x: Tensor) -> Tensor:
        """The same with zeros at padding."""
        taken = self.take(x)
        if self.single is not None:
            return taken
        return taken * self.real[:, None, :].view(len(self.real), 1, -1, *(1,) * (x.dim() - 3))

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write [b, H, T, ...] of the group into [1, H, N, ...], padding left out."""
        if self.single is not None:
            out[:, :, self.single[0] : self.single[1]] = x
        else:
            out[0, :, self.own] = x.transpose(0, 1)[:, self.real]

    def take_queries(self, x: Tensor) -> Tensor:
        """[b, H, 1, ...] of the group, from [1, H, B, ...], a row a prompt."""
        return x[0, :, self.prompts].transpose(0, 1)[:, :, None]

    def put_queries(self, out: Tensor, x: Tensor) -> None:
        """Write [b, H, 1, ...] of the group into [1, H, B, ...]."""
        out[0, :, self.prompts] = x[:, :, 0].transpose(0, 1)


def group_prompts(ranges: Sequence[tuple[int, int]], device: torch.device) -> tuple[Group, ...]:
    """Groups of the prompts [start, stop): similar lengths together, each prompt in one group."""
    lengths = [stop - start for start, stop in ranges]
    groups: list[list[int]] = []
    alone_from = ALONE_FROM.get(device.type)
    for prompt in sorted(range(len(ranges)), key=lambda b: (-lengths[b], b)):
        if groups and (alone_from is None or lengths[groups[-1][0]] < alone_from):
            joined = [*groups[-1], prompt]
            if lengths[joined[0]] * len(joined) <= PADDING * sum(lengths[b] for b in joined):
                groups[-1] = joined
                continue
        groups.append([prompt])
    return tuple(_group(prompts, ranges, device) for prompts in groups)


def _group(prompts: list[int], ranges: Sequence[tuple[int, int]], device: torch.device) -> Group:
    starts = torch.tensor([ranges[b][0] for b in prompts], device=device)
    lengths = torch.tensor([ranges[b][1] - ranges[b][0] for b in prompts], device=device)
    column = torch.arange(ranges[prompts[0]][1] - ranges[prompts[0]][0], device=device)
    real = column < lengths[:, None]
    rows = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
    single = ranges[prompts[0]] if len(prompts) == 1 else None
    return Group(rows, real, rows[real], torch.tensor(prompts, device=device), single)
