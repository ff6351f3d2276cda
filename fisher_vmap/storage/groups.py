"""Prompts across shards, all of them or a group: their stack, and the length of their residual stream."""

from collections.abc import Iterable

import numpy as np

from fisher_vmap.storage.reading import ShardReader, Stack
from fisher_vmap.storage.records import ShardLayout
from fisher_vmap.storage.selection import Chooser


def stack_of_all(readers: Iterable[ShardReader], layer: str, layout: ShardLayout, prompts: int) -> Stack:
    """All prompts at one layer, in order, read shard by shard into their places: they are never there twice."""
    stack, start = _empty_stack(layer, layout, prompts), 0
    for reader in readers:
        part = reader.stack(layer)
        for whole, piece in zip(stack, part, strict=True):
            whole[start : start + len(piece)] = piece
        start += len(part.S)
    return stack


def stack_of_chosen(readers: Iterable[ShardReader], layer: str, layout: ShardLayout, chosen: Chooser) -> Stack:
    """The chosen prompts at one layer, in order; shards without any are not read."""
    parts = [_empty_stack(layer, layout, 0)]
    for reader in readers:
        mask = chosen(reader)
        if mask.any():
            parts.append(Stack(*(piece[mask] for piece in reader.stack(layer))))
    return Stack(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))


def _empty_stack(layer: str, layout: ShardLayout, prompts: int) -> Stack:
    K, R, D = layout.outcomes, layout.rank, layout.widths[layer]
    return Stack(*(np.empty((prompts, *shape), np.float32) for shape in ((R,), (R, D), (K, R))))


def mean_residual_norm(readers: Iterable[ShardReader], layer: str, chosen: Chooser) -> float:
    """The mean over the chosen prompts of the residual stream's mean norm, from the table; NaN without prompts."""
    norms: list[float] = []
    for reader in readers:
        columns = (reader.table.column(f"{layer}/{name}").to_pylist() for name in ("trace", "trace_norm2"))
        for trace, trace_norm2, wanted in zip(*columns, chosen(reader), strict=True):
            if wanted and trace:
                norms.append((trace_norm2 / trace) ** 0.5)
    return float(np.mean(norms)) if norms else float("nan")
