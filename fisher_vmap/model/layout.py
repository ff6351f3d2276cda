"""`Layout`: a batch of prompts of unequal length as the model sees it, or the live rows of one.

padded    [B, T], no attention mask: each prompt on the left, padding on the right. In a causal model nothing to the
          right of a token affects it, so this is right for every model, recurrent ones included.
packed    [1, N], no attention mask: all prompts end to end, without padding. Each has its own position ids, and the
          attention knows where each begins. Right if positions interact in attention only, which the probe proves.
given     [B, T] with the attention mask, as in the caller's tensor: for models with hooks that depend on it.

To the rest of the package all three are rows of tokens, of which prompt b owns a contiguous range.

A derivative matters only at the live rows of a prompt, from the first position of the bias (or the first target, if
that is earlier) to the last target.
`narrowed` lays out these, or the targets alone, by themselves.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.model.validation import check_tensor

PADDING = 1.25  # a group's padded rows may be this many times its real rows
# Prompts with this many queries attend alone: on a CPU a call costs less than the copies and the padding of a group.
ALONE_FROM = {"cpu": 24}


class NotPositionwise(Exception):
    """The block cannot be run at some positions only, such as when it is unclear which argument has positions."""


class Given(NamedTuple):
    """The caller's tensors, [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor


class Layout(NamedTuple):
    """Prompts as the model sees them. Rows are counted through all of `input_ids`, flattened.

    Attributes:
        input_ids: [b, T] int64 with b = B, or b = 1 if packed. Padding repeats a prompt's own last token.
        position_ids: [1, N] if packed, else None: the model's own are right.
        lengths: the number of real tokens of each prompt.
        first_row: the row of each prompt's first token.
        start: the column in which each prompt begins in the caller's tensor.
        width: the number of columns of the caller's tensor.
        given: the caller's tensors; None if these are only some of the caller's prompts.
        attention_mask: [B, T], the mask to give to the model, for prompts laid out as given; else None.
        positions: where the bias is added: "all", "last" (each prompt's last token), or a mask [B, width] in the
            caller's columns.
        targets: for each prompt the positions whose next-token distribution is read; None: its last token only.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    lengths: tuple[int, ...]
    first_row: tuple[int, ...]
    start: tuple[int, ...]
    width: int
    given: Given | None = None
    attention_mask: Tensor | None = None
    positions: str | Tensor = "all"
    targets: tuple[tuple[int, ...], ...] | None = None

    @property
    def packed(self) -> bool:
        """Whether the prompts are end to end in one row."""
        return self.position_ids is not None

    @property
    def device(self) -> torch.device:
        """The device of the tokens."""
        return self.input_ids.device

    def ranges(self) -> list[tuple[int, int]]:
        """[first, last + 1) row of each prompt."""
        return [(first, first + length) for first, length in zip(self.first_row, self.lengths, strict=True)]

    def target_rows(self, device: torch.device) -> Tensor:
        """[M] int64, the rows whose next-token distribution is read, prompt by prompt."""
        targets = self.targets or [(length - 1,) for length in self.lengths]
        rows = [first + at for first, places in zip(self.first_row, targets, strict=True) for at in places]
        return on_device(rows, device)

    def prompt_of_target(self, device: torch.device) -> Tensor | None:
        """[M] int64, the prompt of each target; None if target b belongs to prompt b."""
        if self.targets is None:
            return None
        return on_device([b for b, places in enumerate(self.targets) for _ in places], device)

    def targets_of(self, x_bTD: Tensor) -> Tensor:
        """[M, D]: the rows of the targets."""
        return x_bTD.flatten(0, 1)[self.target_rows(x_bTD.device)]

    def fields_of(self, x_bTKD: Tensor) -> Tensor:
        """[K, M, D]: the rows of the targets in [b, T, K, D]."""
        return self.targets_of(x_bTKD).transpose(0, 1)

    def at_targets(self, rows_KMD: Tensor) -> Tensor:
        """[b, T, K, D]: the given rows at the targets, zero elsewhere."""
        K, _, D = rows_KMD.shape
        out_NKD = rows_KMD.new_zeros(self.input_ids.numel(), K, D)
        out_NKD[self.target_rows(rows_KMD.device)] = rows_KMD.transpose(0, 1)
        return out_NKD.view(*self.input_ids.shape, K, D)

    def bias_mask(self) -> Tensor | None:
        """[N] of 0 and 1, the rows where the bias is added; None: all of them."""
        if isinstance(self.positions, Tensor):
            return self.from_caller((self.positions.to(self.device) != 0).float())
        if self.positions == "all":
            return None
        mask_N = torch.zeros(self.input_ids.numel(), device=self.device)
        mask_N[on_device([stop - 1 for _, stop in self.ranges()], self.device)] = 1
        return mask_N

    def at_bias(self, rows_BKD: Tensor) -> Tensor:
        """[b, T, K, D]: each prompt's rows at every position where the bias is added, zero elsewhere."""
        out_NKD = rows_BKD.new_zeros(self.input_ids.numel(), *rows_BKD.shape[1:])
        for b, (first, stop) in enumerate(self.ranges()):
            out_NKD[first:stop] = rows_BKD[b]
        if (mask_N := self.bias_mask()) is not None:
            out_NKD *= mask_N.to(out_NKD)[:, None, None]
        return out_NKD.view(*self.input_ids.shape, *rows_BKD.shape[1:])

    def sum_prompts(self, x_NKD: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, K, D]: the sum over each prompt's rows, accumulated in `dtype`."""
        return torch.stack([x_NKD[start:stop].sum(0, dtype=dtype) for start, stop in self.ranges()])

    def to_caller(self, x_N: Tensor) -> Tensor:
        """[B, width]: one number per row, moved to its token's place in the caller's tensor; zero at padding."""
        out_BW = x_N.new_zeros(len(self.lengths), self.width)
        for b, (first, stop) in enumerate(self.ranges()):
            out_BW[b, self.start[b] : self.start[b] + stop - first] = x_N[first:stop]
        return out_BW

    def from_caller(self, x_BW: Tensor) -> Tensor:
        """[N]: the inverse of `to_caller`; zero at padding."""
        out_N = x_BW.new_zeros(self.input_ids.numel())
        for b, (first, stop) in enumerate(self.ranges()):
            out_N[first:stop] = x_BW[b, self.start[b] : self.start[b] + stop - first]
        return out_N


def select(layout: Layout, prompts: list[int]) -> Layout:
    """Some prompts of a padded layout, in the order given."""
    if prompts == list(range(len(layout.lengths))):
        return layout
    lengths = tuple(layout.lengths[b] for b in prompts)
    T = max(lengths)
    return Layout(
        input_ids=layout.input_ids[prompts, :T],
        position_ids=None,
        lengths=lengths,
        first_row=tuple(i * T for i in range(len(prompts))),
        start=tuple(layout.start[b] for b in prompts),
        width=layout.width,
        positions=layout.positions[prompts] if isinstance(layout.positions, Tensor) else layout.positions,
        targets=None if layout.targets is None else tuple(layout.targets[b] for b in prompts),
    )


def lay_out(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    positions: str | Tensor = "all",
    targets: str | Tensor = "last",
) -> Layout:
    """Lay prompts on the left of a padded tensor, whichever side they were padded on.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], nonzero for real tokens, which must be contiguous; None: every token is real.
        positions: where the bias is added: "all", "last", or a mask [B, T].
        targets: whose next-token distribution is read: "last", "all", or a mask [B, T].

    Raises:
        ValueError: shapes or dtypes are not these, a prompt is empty, its real tokens have a gap, or `positions` or
            `targets` selects no real token of a prompt.
    """
    check_tensor("input_ids", input_ids, "[B, T] int64")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, dtype {input_ids.dtype}; expected [B, T] int64, not empty"
        )
    B, W = input_ids.shape
    input_ids = input_ids.long()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    check_tensor("attention_mask", attention_mask, "[B, T]")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(input_ids.shape)}, as input_ids"
        )
    real_BW = (attention_mask != 0).cpu()  # one wait for a GPU; lengths and starts are then known here
    lengths = real_BW.sum(1)
    if not bool((lengths > 0).all()):
        empty = (lengths == 0).nonzero()[0].item()
        raise ValueError(f"prompt {empty} of the batch has no real token; leave it out or give it a BOS token")
    start = real_BW.long().argmax(1)  # the first real column
    columns = torch.arange(W, device="cpu")
    if not torch.equal(real_BW, (columns >= start[:, None]) & (columns < (start + lengths)[:, None])):
        raise ValueError("attention_mask has a gap inside a prompt; the real tokens of a row must be contiguous")
    T = int(lengths.max())
    offset_BT = torch.minimum(torch.arange(T, device="cpu"), lengths[:, None] - 1)
    ids_BT = input_ids.gather(1, on_device(start[:, None] + offset_BT, input_ids.device))
    first_rows = tuple(b * T for b in range(B))
    given = Given(input_ids, attention_mask.to(input_ids.device))
    layout = Layout(ids_BT, None, tuple(lengths.tolist()), first_rows, tuple(start.tolist()), W, given)
    _check_positions(positions, layout)
    return layout._replace(positions=positions, targets=_target_places(targets, layout))


def _check_positions(positions: str | Tensor, layout: Layout) -> None:
    """Raise ValueError unless `positions` is valid for the layout."""
    if isinstance(positions, Tensor):
        expected = (len(layout.lengths), layout.width)
        if positions.shape != expected:
            raise ValueError(f"positions has shape {tuple(positions.shape)}; expected that of input_ids, {expected}")
        mask_N = layout._replace(positions=positions).bias_mask()
        assert mask_N is not None
        if not bool(layout.to_caller(mask_N).any(1).all()):
            raise ValueError("positions selects no real token of some prompt; give at least one for each")
        return
    if not isinstance(positions, str):
        check_tensor("positions", positions, "[B, T], or 'all' or 'last'")
    if positions not in ("all", "last"):
        raise ValueError(f"positions is {positions!r}; expected 'all', 'last' or a mask [B, T]")


def _target_places(targets: str | Tensor, layout: Layout) -> tuple[tuple[int, ...], ...] | None:
    """The targets of each prompt, counted from its first token; None if each is the last token alone."""
    if isinstance(targets, str):
        if targets not in ("all", "last"):
            raise ValueError(f"targets is {targets!r}; expected 'all', 'last' or a mask [B, T]")
        places = [range(length - 1 if targets == "last" else 0, length) for length in layout.lengths]
    else:
        check_tensor("targets", targets, "[B, T], or 'all' or 'last'")
        expected = (len(layout.lengths), layout.width)
        if targets.shape != expected:
            raise ValueError(f"targets has shape {tuple(targets.shape)}; expected that of input_ids, {expected}")
        real = zip((targets != 0).cpu(), layout.start, layout.lengths, strict=True)
        chosen = [mask_W[start : start + length].nonzero()[:, 0].tolist() for mask_W, start, length in real]
        if not all(chosen):
            raise ValueError("targets selects no real token of some prompt; give at least one for each")
        places = chosen
    found = tuple(tuple(each) for each in places)
    return None if found == tuple((length - 1,) for length in layout.lengths) else found


def alone(layout: Layout, b: int) -> Layout:
    """One prompt of a layout, unpadded."""
    (first, stop), start = layout.ranges()[b], layout.start[b]
    where = layout.positions
    if isinstance(where, Tensor):
        where = where[b : b + 1, start : start + layout.lengths[b]]
    one = lay_out(layout.input_ids.flatten()[None, first:stop], None, where)
    return one._replace(targets=None if layout.targets is None else (layout.targets[b],))


def as_given(layout: Layout) -> Layout:
    """The same prompts laid out as in the caller's tensor, with its attention mask."""
    assert layout.given is not None
    ids, mask = layout.given
    first_rows = tuple(b * layout.width + start for b, start in enumerate(layout.start))
    return layout._replace(input_ids=ids, position_ids=None, first_row=first_rows, attention_mask=mask)


def first_live(layout: Layout) -> list[int]:
    """The first position of each prompt at which the bias is added, or the first target if that is earlier."""
    if isinstance(layout.positions, Tensor):
        real = zip((layout.positions != 0).cpu(), layout.start, layout.lengths, strict=True)
        biased = [int(mask_W[start : start + length].long().argmax()) for mask_W, start, length in real]
    else:
        biased = [0 if layout.positions == "all" else length - 1 for length in layout.lengths]
    return [min(first, target) for first, target in zip(biased, first_target(layout), strict=True)]


def first_target(layout: Layout) -> list[int]:
    """The first position of each prompt whose next-token distribution is read."""
    if layout.targets is None:
        return [length - 1 for length in layout.lengths]
    return [min(places) for places in layout.targets]


def narrowed(layout: Layout, first: Sequence[int]) -> tuple[Layout, Tensor | None]:
    """The layout of each prompt's rows from a first position to its last target.

    A padded layout keeps all columns from the first of these rows on.

    Returns:
        The layout, and [n] int64, its columns among those of `input_ids`; the same layout and None if these are all
        of its columns.
    """
    stop = [n if layout.targets is None else max(layout.targets[b]) + 1 for b, n in enumerate(layout.lengths)]
    T = layout.input_ids.shape[1]
    if layout.packed:
        ranges = [range(row + f, row + e) for row, f, e in zip(layout.first_row, first, stop, strict=True)]
        columns = [column for rows in ranges for column in rows]
        first_row = [sum(map(len, ranges[:b])) for b in range(len(ranges))]
    else:
        begin = min(row % T + f for row, f in zip(layout.first_row, first, strict=True))
        columns = list(range(begin, T))
        rows = zip(layout.first_row, first, strict=True)
        first_row = [row // T * (T - begin) + row % T + f - begin for row, f in rows]
    if len(columns) == T or layout.attention_mask is not None:
        return layout, None
    positions, at = layout.positions, on_device(columns, layout.device)
    if positions == "last" and stop != list(layout.lengths):  # the last token is not among these rows
        mask_N = layout.bias_mask()
        assert mask_N is not None
        positions = layout.to_caller(mask_N)
    return layout._replace(
        input_ids=layout.input_ids[:, at],
        position_ids=None if layout.position_ids is None else layout.position_ids[:, at],
        lengths=tuple(e - f for f, e in zip(first, stop, strict=True)),
        first_row=tuple(first_row),
        start=tuple(start + f for start, f in zip(layout.start, first, strict=True)),
        given=None,
        positions=positions,
        targets=None if layout.targets is None
        else tuple(tuple(place - f for place in places) for places, f in zip(layout.targets, first, strict=True)),
    ), at  # fmt: skip


def take_columns(x: Tensor, columns: Tensor | None) -> Tensor:
    """These columns of [b, T, ...]; None: all."""
    return x if columns is None else x.index_select(1, columns.to(x.device))


def row_dimension(tensor: Tensor, shape: Sequence[int]) -> int | None:
    """The dimension of the positions in one of the inputs of a block that runs on [b, T]; None: it has none.

    It is the only dimension, the second after one for the prompts, or that of the queries in a mask [b, H, T, T].
    """
    (b, T), size = shape, tuple(tensor.shape)
    if T not in size:
        return None
    if size == (T,):
        return 0
    if len(size) == 4 and size[0] in (1, b) and size[2:] == (T, T) and size[1] != T:
        return 2
    if len(size) >= 2 and size[0] in (1, b) and size[1] == T and (len(size) != 4 or size[2:] != (T, T)):
        return 1
    raise NotPositionwise(f"a tensor of shape {size}")


def pack_rows(layout: Layout) -> Layout:
    """The same prompts end to end, without padding."""
    ids_N = torch.cat([layout.input_ids.flatten()[first:stop] for first, stop in layout.ranges()])
    positions_N = torch.cat([torch.arange(length, device=ids_N.device) for length in layout.lengths])
    firsts = tuple(sum(layout.lengths[:b]) for b in range(len(layout.lengths)))
    return layout._replace(input_ids=ids_N[None], position_ids=positions_N[None], first_row=firsts)


def grouped(
    lengths: Sequence[int], device: torch.device, queries: Sequence[float] | None = None, alike: bool = False
) -> list[list[int]]:
    """The numbers of the prompts of each group, the longest prompt first.

    `queries` is how many queries each prompt has; None: one for each token. With `alike`, neighbours of one length are
    in one group however long they are.
    """
    groups: list[list[int]] = []
    alone_from, real = ALONE_FROM.get(device.type), 0
    asking = lengths if queries is None else queries
    for prompt in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        longest = lengths[groups[-1][0]] if groups else 0
        most = max([asking[b] for b in [*groups[-1], prompt]]) if groups else 0
        same = alike and groups and groups[-1][-1] == prompt - 1 and lengths[prompt] == lengths[prompt - 1]
        near = groups and (alone_from is None or most < alone_from or same)
        if near and longest * (len(groups[-1]) + 1) <= PADDING * (real + lengths[prompt]):
            groups[-1].append(prompt)
            real += lengths[prompt]
        else:
            groups.append([prompt])
            real = lengths[prompt]
    return groups


def on_device(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Numbers made on the host, int64 unless a tensor, copied to a device without waiting for its work."""
    here = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64, device="cpu")
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)
