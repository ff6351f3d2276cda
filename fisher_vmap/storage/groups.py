"""A group of prompts across shards: their stack, and the length of their residual stream."""

from collections.abc import Iterable

import numpy as np

from fisher_vmap.storage.reading import ShardReader, Stack
from fisher_vmap.storage.selection import Chooser


def chosen_stack(readers: Iterable[ShardReader], layer: str, chosen: Chooser) -> Stack:
    """The chosen prompts at one layer, in order; shards without any are not read."""
    parts: list[Stack] = []
    empty: Stack | None = None
    for reader in readers:
        mask = chosen(reader)
        layout = reader.layout
        K, R, D = layout.top_k, layout.rank, layout.widths[layer]
        empty = Stack(*(np.zeros((0, *shape), np.float32) for shape in ((R,), (R, D), (K, R))))
        if mask.any():
            parts.append(Stack(*(piece[mask] for piece in reader.stack(layer))))
    if not parts:
        if empty is None:
            raise ValueError("a stack needs at least one shard")
        return empty
    return Stack(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))


def mean_residual_norm(readers: Iterable[ShardReader], layer: str, chosen: Chooser) -> float:
    """The mean over the chosen prompts of the residual stream's mean norm, from the table; NaN without prompts."""
    norms: list[float] = []
    for reader in readers:
        columns = (reader.table.column(f"{layer}/{name}").to_pylist() for name in ("trace", "trace_norm2"))
        for trace, trace_norm2, wanted in zip(*columns, chosen(reader), strict=True):
            if wanted and trace:
                norms.append((trace_norm2 / trace) ** 0.5)
    return float(np.mean(norms)) if norms else float("nan")
