"""Prompts that stand end to end, taken apart for attention: groups of similar length, each padded to its longest.

Only here, between queries and keys, does a packed batch know padding; a few products on a padded group take the place
of many small ones, a prompt each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = 1.25  # a group's padded rows may be this many times its real ones


@dataclass(frozen=True)
class Group:
    """Prompts that attend together.

    Attributes:
        rows: [b, T] int64, the row of each token; padding repeats the prompt's last row.
        real: [b, T] bool.
        own: [n] int64, the rows of the real tokens, in the order of `real`.
        single: [start, stop) where the group is one prompt, which needs no copy.
    """

    rows: Tensor
    real: Tensor
    own: Tensor
    single: tuple[int, int] | None

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


def group_prompts(ranges: list[tuple[int, int]], device: torch.device) -> tuple[Group, ...]:
    """Groups of the prompts [start, stop): similar lengths together, each prompt in one group."""
    groups: list[list[tuple[int, int]]] = []
    for start, stop in sorted(ranges, key=lambda r: (r[0] - r[1], r[0])):
        if groups:
            longest = groups[-1][0][1] - groups[-1][0][0]
            real = sum(b - a for a, b in groups[-1]) + stop - start
            if longest * (len(groups[-1]) + 1) <= PADDING * real:
                groups[-1].append((start, stop))
                continue
        groups.append([(start, stop)])
    return tuple(_group(members, device) for members in groups)


def _group(members: list[tuple[int, int]], device: torch.device) -> Group:
    starts = torch.tensor([start for start, _ in members], device=device)
    lengths = torch.tensor([stop - start for start, stop in members], device=device)
    column = torch.arange(int(members[0][1] - members[0][0]), device=device)
    real = column < lengths[:, None]
    rows = starts[:, None] + torch.minimum(column, lengths[:, None] - 1)
    return Group(rows, real, rows[real], members[0] if len(members) == 1 else None)
