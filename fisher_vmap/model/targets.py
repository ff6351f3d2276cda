"""The targets of a batch: the positions whose next-token distribution is read, prompt by prompt.

A target's row of numbers is one of [M, ...], all targets of the batch end to end. `TargetGrid` lays these out as
[B, m, ...], padded, with m the most targets of a prompt.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.model.layout import Layout, on_device

NO_TOKEN = -2  # the token id of an outcome that pads a prompt with fewer targets than others


class Targets(NamedTuple):
    """What is known of the targets of a batch.

    Attributes:
        columns: [B, m] int64, the column of each target in the caller's tensor; -1 pads.
        log_probs: [B, m], in nats: log p of the token that follows the target in the prompt; NaN if none follows, and
            where it pads.
        entropy: [B, m], in nats, of the distribution of the token that follows; NaN where it pads.
    """

    columns: Tensor
    log_probs: Tensor
    entropy: Tensor


class TargetGrid(NamedTuple):
    """The place of each of M targets in a table [B, m].

    Attributes:
        prompts: the prompt of each target.
        ranks: its number among the targets of its prompt.
        places: its position in its prompt.
        shape: (B, m).
    """

    prompts: tuple[int, ...]
    ranks: tuple[int, ...]
    places: tuple[int, ...]
    shape: tuple[int, int]

    def spread(self, x_M: Tensor, fill: float) -> Tensor:
        """[B, m, ...] of [M, ...]."""
        out = x_M.new_full((*self.shape, *x_M.shape[1:]), fill)
        out[on_device(self.prompts, x_M.device), on_device(self.ranks, x_M.device)] = x_M
        return out

    def with_ranks(self, first: int, stop: int) -> list[int]:
        """The targets, as indices into M, whose number in their prompt is in [first, stop)."""
        return [i for i, rank in enumerate(self.ranks) if first <= rank < stop]


def grid_of(layout: Layout, most: int | None = None) -> TargetGrid:
    """The grid of a layout's targets; `most` is m, None: as many as a prompt of the layout has."""
    every = layout.targets or tuple((length - 1,) for length in layout.lengths)
    m = most_targets(layout) if most is None else most
    rows = [(b, rank, place) for b, places in enumerate(every) for rank, place in enumerate(places)]
    prompts, ranks, places = zip(*rows, strict=True)
    return TargetGrid(prompts, ranks, places, (len(every), m))


def most_targets(layout: Layout) -> int:
    """The most targets of a prompt."""
    return 1 if layout.targets is None else max(map(len, layout.targets))


def targets_read(layout: Layout, grid: TargetGrid, log_probs_MV: Tensor, p_MV: Tensor) -> Targets:
    """What is known of a layout's targets from the distribution at each, log p and p."""
    columns = [layout.start[b] + place for b, place in zip(grid.prompts, grid.places, strict=True)]
    follows = [place + 1 < layout.lengths[b] for b, place in zip(grid.prompts, grid.places, strict=True)]
    rows = [layout.first_row[b] + place for b, place in zip(grid.prompts, grid.places, strict=True)]
    next_rows = [row + 1 if there else row for row, there in zip(rows, follows, strict=True)]
    ids_M = layout.input_ids.flatten()[on_device(next_rows, layout.device)].to(log_probs_MV.device)
    log_p_M = log_probs_MV.gather(1, ids_M[:, None])[:, 0]
    log_p_M = log_p_M.where(on_device(torch.tensor(follows, device="cpu"), log_p_M.device), torch.nan)
    entropy_M = -(p_MV * log_probs_MV.where(p_MV > 0, 0)).sum(1)
    device = layout.device
    return Targets(
        grid.spread(on_device(columns, device), -1),
        grid.spread(log_p_M.to(device), torch.nan),
        grid.spread(entropy_M.to(device), torch.nan),
    )


def at_one_target(layout: Layout, ranks: Sequence[int]) -> Layout:
    """The same batch with a single target a prompt, by its number among the prompt's targets."""
    if layout.targets is None:
        return layout
    return layout._replace(targets=tuple((places[r],) for places, r in zip(layout.targets, ranks, strict=True)))


def target_seeds(layout: Layout, grid: TargetGrid, seeds: Sequence[int]) -> list[int]:
    """A seed for each target from one for each prompt; the prompt's own if its last token is the only target."""
    if layout.targets is None:
        return list(seeds)
    return [
        zlib.crc32(place.to_bytes(8, "little"), seeds[b]) for b, place in zip(grid.prompts, grid.places, strict=True)
    ]
