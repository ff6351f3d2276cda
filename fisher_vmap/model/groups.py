"""`Rows` and `Group`: packed prompts that attend together, padded in attention only.

A few products on padded groups replace many small ones, one a prompt. In a group every prompt has queries and keys. If
only some rows are live, the queries and the keys whose derivatives are wanted are numbered among those, and the keys
among all rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_vmap.model.layout import grouped, on_device

Ranges = Sequence[tuple[int, int]]

# `ALONE_FROM` was measured for this many cotangents; with fewer, a query counts as a part of one, down to this.
MANY, LEAST_SHARE = 10, 0.25


@dataclass(frozen=True)
class Rows:
    """A contiguous range of rows of each of some prompts, side by side, padded to the longest.

    Attributes:
        rows: [b, T] int64, the row of each token; padding repeats a row of the same prompt.
        real: [b, T] bool, False at padding.
        own: [n] int64, the rows of the real tokens, in the order of `real`.
        places: [n] int64 each, the prompt and the column of each real token.
        even: [start, stop) if it is a single prompt, or several of one length end to end, which need no copy.
    """

    rows: Tensor
    real: Tensor
    own: Tensor
    places: tuple[Tensor, Tensor]
    even: tuple[int, int] | None

    @property
    def single(self) -> tuple[int, int] | None:
        """[start, stop) if it is a single prompt."""
        return self.even if len(self.rows) == 1 else None

    @property
    def first(self) -> int:
        """The first row of a single prompt; 0 of several, which may be anywhere."""
        return 0 if self.single is None else self.single[0]

    def on(self, device: torch.device) -> "Rows":
        """The same rows on a device."""
        if self.rows.device == device:
            return self
        rows, real, own, prompt, at = (t.to(device) for t in (self.rows, self.real, self.own, *self.places))
        return Rows(rows, real, own, (prompt, at), self.even)

    def take(self, x: Tensor) -> Tensor:
        """[b, H, T, ...] of these rows, from [1, H, N, ...]."""
        return x[0, :, self.rows].transpose(0, 1) if self.even is None else self._apart(x[0], 1).transpose(0, 1)

    def take_rows(self, x: Tensor) -> Tensor:
        """[b, T, ...] of these rows, from [N, ...]."""
        return x[self.rows] if self.even is None else self._apart(x, 0)

    def put_rows(self, out: Tensor, x: Tensor) -> None:
        """Write [b, T, ...] of these rows into [N, ...], padding left out."""
        if self.even is not None:
            self._apart(out, 0).copy_(x)
        else:
            out[self.own] = x[self.places]

    def take_real(self, x: Tensor) -> Tensor:
        """The same as `take` with zeros at padding."""
        taken = self.take(x)
        if self.even is not None:
            return taken
        return taken * self.real[:, None, :].view(len(self.real), 1, -1, *(1,) * (x.dim() - 3))

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write [b, H, T, ...] of these rows into [1, H, N, ...], padding left out."""
        if self.even is not None:
            self._apart(out[0], 1).copy_(x.transpose(0, 1))
        else:
            out[0, :, self.own] = x.transpose(0, 1)[:, *self.places]

    def _apart(self, x: Tensor, dim: int) -> Tensor:
        """A view of these rows with dimensions [b, T] in place of that of all rows."""
        assert self.even is not None
        start, stop = self.even
        apart: Tensor = x.narrow(dim, start, stop - start).unflatten(dim, (len(self.rows), -1))
        return apart


@dataclass(frozen=True)
class Group:
    """Packed prompts that attend together. If all rows are live, the three `Rows` are one object.

    Attributes:
        queries: their queries, numbered among the query rows.
        keys: their keys, numbered among all rows.
        live: the keys whose derivatives are wanted, numbered among the live rows; its columns count from `first_live`.
        mask: [b, 1, t, S] bool, the keys that each query sees; None: query i of t sees keys up to i + S - t.
        first_live: the first column of the keys with a live one.
    """

    queries: Rows
    keys: Rows
    live: Rows
    mask: Tensor | None
    first_live: int

    @property
    def single(self) -> tuple[int, int] | None:
        """[start, stop) of the queries of a single prompt; None of several."""
        return self.queries.single

    @property
    def first(self) -> int:
        """The first query row of a single prompt; 0 of several, which may be anywhere."""
        return self.queries.first

    def on(self, device: torch.device) -> "Group":
        """The same group with its rows on a device."""
        if self.keys.rows.device == device:
            return self
        moved = {id(rows): rows.on(device) for rows in (self.queries, self.keys, self.live)}
        queries, keys, live = (moved[id(rows)] for rows in (self.queries, self.keys, self.live))
        return Group(queries, keys, live, None if self.mask is None else self.mask.to(device), self.first_live)

    def seen(self, window: int | None) -> Tensor | None:
        """The mask where a query sees the last `window` keys at most; None where the mask is None."""
        if self.mask is None or window is None:
            return self.mask
        columns = torch.arange(self.mask.shape[-1], device=self.mask.device)
        return self.mask & (columns >= self.mask.sum(-1, keepdim=True) - window)


def group_prompts(
    keys: Ranges,
    device: torch.device,
    live: Ranges | None = None,
    queries: Ranges | None = None,
    vectors: int | None = None,
    alike: bool = False,
) -> tuple[Group, ...]:
    """Divide prompts into groups of similar length.

    Args:
        keys: the rows [start, stop) of each prompt's keys, among all rows.
        device: of the tensors.
        live: the rows of its live keys, which are its last ones, among the live rows; None: all are live.
        queries: the rows of its queries, which are at its last keys, among the query rows; None: the live rows.
        vectors: how many cotangents each query has. Of few, more prompts attend together: the copies cost less then.
        alike: whether neighbours of one length attend together in any case; that is faster in a forward alone.
    """
    live = keys if live is None else live
    queries = live if queries is None else queries
    share = 1.0 if vectors is None else min(1.0, max(LEAST_SHARE, vectors / MANY))
    groups = grouped([_length(rows) for rows in keys], device, [share * _length(rows) for rows in queries], alike)
    return tuple(
        _group([keys[b] for b in prompts], [live[b] for b in prompts], [queries[b] for b in prompts], device)
        for prompts in groups
    )


def _group(keys: Ranges, live: Ranges, queries: Ranges, device: torch.device) -> Group:
    every = _rows(keys, [0] * len(keys), device)
    if list(keys) == list(live) == list(queries):
        return Group(every, every, every, None, 0)
    S = every.rows.shape[1]
    starts = [_length(k) - _length(r) for k, r in zip(keys, live, strict=True)]  # the column of the first live key
    asking = _rows(queries, [0] * len(queries), device)
    alive = _rows(live, [start - min(starts) for start in starts], device, S - min(starts))
    mask = None
    if len({(_length(k), _length(r)) for k, r in zip(keys, queries, strict=True)}) > 1:
        t = asking.rows.shape[1]
        lengths = torch.tensor([(_length(k), _length(r)) for k, r in zip(keys, queries, strict=True)], device="cpu")
        first, stop = (lengths[:, 0] - lengths[:, 1])[:, None], lengths[:, :1]
        last_bt = torch.minimum(first + torch.arange(t, device="cpu"), stop - 1)
        mask = on_device((torch.arange(S, device="cpu") <= last_bt[:, :, None])[:, None], device)
    return Group(asking, every, alive, mask, min(starts))


def _length(rows: tuple[int, int]) -> int:
    return rows[1] - rows[0]


def _rows(ranges: Ranges, columns: Sequence[int], device: torch.device, width: int | None = None) -> Rows:
    """Rows of which each prompt's begin in a column of its own; `width` is the number of columns."""
    first, start, length = (
        torch.tensor(numbers, device="cpu")[:, None]
        for numbers in (columns, [r[0] for r in ranges], [_length(r) for r in ranges])
    )
    column = torch.arange(width or max(_length(r) for r in ranges), device="cpu") - first
    real = (column >= 0) & (column < length)
    real_everywhere = bool(real.all())
    rows = start + torch.minimum(column.clamp(min=0), length - 1)
    tensors = (rows, real, rows[real], *real.nonzero(as_tuple=True))
    rows, real, own, prompt, at = (on_device(tensor, device) for tensor in tensors)
    end_to_end = all(ranges[b][1] == ranges[b + 1][0] for b in range(len(ranges) - 1))
    even = (ranges[0][0], ranges[-1][1]) if end_to_end and real_everywhere else None
    return Rows(rows, real, own, (prompt, at), even)
