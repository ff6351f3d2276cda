"""Rotary embeddings whose frequencies depend on the longest prompt of the batch: such prompts are computed alone.

"dynamic" and "longrope" scaling switch frequencies where a sequence is longer than the model was first trained on, for
the whole batch. A prompt's scores must not depend on its neighbours, so one that is longer goes by itself.

How a batch of prompts of unequal length is laid out for the model, without an attention mask.

padded    [B, T]: each prompt on the left, padding on the right. What stands to the right of a token
          is inert in a causal model, so this holds for every model, recurrent ones included.
packed    [1, N]: all prompts end to end, without padding; each has its own position ids, and the attention is told
          where each begins. It holds where positions meet in attention alone; the probe proves it before it is used.

given     [B, T] with its attention mask, as the caller's tensor has it: for models with hooks that depend on that.

All are one thing to the rest of the package: rows of tokens, of which prompt b owns a contiguous range.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fisher_vmap.model.validation import check_tensor


class Given(NamedTuple):
    """What the caller gave: [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor


class Layout(NamedTuple):
    """Prompts as the model sees them. Rows are counted through all of `input_ids`, flattened.

    Attributes:
        input_ids: [b, T] int64 with b = B, or b = 1 where packed. Padding repeats a prompt's own last token.
        position_ids: [1, T] where prompts are packed, else None: the model's own are right.
        lengths: the number of real tokens of each prompt.
        first_row: the row of each prompt's first token.
        start: the column of the caller's tensor in which each prompt began.
        width: the number of columns of the caller's tensor.
        given: the caller's own tensors; None where these prompts are not all of theirs.
        attention_mask: [B, T] where the model is to be told one: of prompts that stand as they were given.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    lengths: tuple[int, ...]
    first_row: tuple[int, ...]
    start: tuple[int, ...]
    width: int
    given: Given | None = None
    attention_mask: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether the prompts stand end to end in one row."""
        return self.position_ids is not None

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.input_ids.device

    def ranges(self) -> list[tuple[int, int]]:
        """[first, last + 1) row of each prompt."""
        return [(first, first + length) for first, length in zip(self.first_row, self.lengths, strict=True)]

    def last_rows(self, device: torch.device) -> Tensor:
        """[B] int64, the row of each prompt's last token."""
        return torch.tensor([stop - 1 for _, stop in self.ranges()], device=device)

    def last(self, x_bTD: Tensor) -> Tensor:
        """[B, D]: the rows of the last real tokens."""
        return x_bTD.flatten(0, 1)[self.last_rows(x_bTD.device)]

    def last_of(self, x_bTKD: Tensor) -> Tensor:
        """[K, B, D]: the rows of the last real tokens, of [b, T, K, D]."""
        return x_bTKD.flatten(0, 1)[self.last_rows(x_bTKD.device)].transpose(0, 1)

    def everywhere(self, rows_BKD: Tensor, mask_N: Tensor | None) -> Tensor:
        """[b, T, K, D]: each prompt's rows at all of its positions, or at those of the mask; zero at padding."""
        out_NKD = rows_BKD.new_zeros(self.input_ids.numel(), *rows_BKD.shape[1:])
        for b, (first, stop) in enumerate(self.ranges()):
            out_NKD[first:stop] = rows_BKD[b]
        if mask_N is not None:
            out_NKD *= mask_N.to(out_NKD)[:, None, None]
        return out_NKD.view(*self.input_ids.shape, *rows_BKD.shape[1:])

    def at_last(self, rows_KBD: Tensor) -> Tensor:
        """[b, T, K, D], zero but for the rows given, [K, B, D], at each prompt's last real token."""
        K, _, D = rows_KBD.shape
        out_NKD = rows_KBD.new_zeros(self.input_ids.numel(), K, D)
        out_NKD[self.last_rows(rows_KBD.device)] = rows_KBD.transpose(0, 1)
        return out_NKD.view(*self.input_ids.shape, K, D)

    def sum_prompts(self, x_NKD: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, K, D]: the sum over each prompt's rows, accumulated in `dtype`."""
        return torch.stack([x_NKD[start:stop].sum(0, dtype=dtype) for start, stop in self.ranges()])

    def to_caller(self, x_N: Tensor) -> Tensor:
        """[B, width]: a number for each row, moved to where the caller's tensor had its token; zero at padding."""
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
    )


def lay_out(input_ids: Tensor, attention_mask: Tensor | None) -> Layout:
    """Lay prompts on the left of a padded tensor, whichever side they were padded on.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], nonzero for real tokens, which must be contiguous; None: every token is real.

    Raises:
        ValueError: shapes or dtypes are not these, a prompt is empty, or its real tokens have a gap.
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
    real_BW = attention_mask.to(input_ids.device) != 0
    lengths = real_BW.sum(1)
    if not bool((lengths > 0).all()):
        empty = (lengths == 0).nonzero()[0].item()
        raise ValueError(f"prompt {empty} of the batch has no real token; leave it out or give it a BOS token")
    start = real_BW.long().argmax(1)  # the first real column
    columns = torch.arange(W, device=input_ids.device)
    if not torch.equal(real_BW, (columns >= start[:, None]) & (columns < (start + lengths)[:, None])):
        raise ValueError("attention_mask has a gap inside a prompt; the real tokens of a row must be contiguous")
    T = int(lengths.max())
    offset_BT = torch.minimum(torch.arange(T, device=input_ids.device), lengths[:, None] - 1)
    ids_BT = input_ids.gather(1, start[:, None] + offset_BT)
    first_rows = tuple(b * T for b in range(B))
    given = Given(input_ids, attention_mask)
    return Layout(ids_BT, None, tuple(lengths.tolist()), first_rows, tuple(start.tolist()), W, given)


def alone(layout: Layout, b: int) -> Layout:
    """One prompt of a layout, unpadded."""
    first, stop = layout.ranges()[b]
    return lay_out(layout.input_ids.flatten()[None, first:stop], None)


def as_given(layout: Layout) -> Layout:
    """The same prompts where the caller's tensor has them, with its attention mask."""
    assert layout.given is not None
    ids, mask = layout.given
    first_rows = tuple(b * layout.width + start for b, start in enumerate(layout.start))
    return layout._replace(input_ids=ids, position_ids=None, first_row=first_rows, attention_mask=mask)


def pack_rows(layout: Layout) -> Layout:
    """The same prompts end to end, without padding."""
    ids_N = torch.cat([layout.input_ids.flatten()[first:stop] for first, stop in layout.ranges()])
    positions_N = torch.cat([torch.arange(length, device=ids_N.device) for length in layout.lengths])
    firsts = tuple(sum(layout.lengths[:b]) for b in range(len(layout.lengths)))
    return layout._replace(input_ids=ids_N[None], position_ids=positions_N[None], first_row=firsts)


Record = TypeVar("Record", bound=NamedTuple)
SCALED_BY_LENGTH = {"dynamic", "longrope"}


def batches_apart(model: nn.Module, lengths: tuple[int, ...]) -> list[list[int]]:
    """The prompts of a batch in groups that may share a forward pass; for most models one group."""
    limit = min((_limit(module) for module in _length_dependent(model)), default=max(lengths))
    together = [b for b, length in enumerate(lengths) if length <= limit]
    return ([together] if together else []) + [[b] for b, length in enumerate(lengths) if length > limit]


def forget_lengths(model: nn.Module) -> None:
    """Give the embeddings the frequencies of training again: they keep those of the longest sequence that they saw."""
    for module in _length_dependent(model):
        for name in [n for n in (*vars(module), *module._buffers) if n.endswith("original_inv_freq")]:
            kind = name.removesuffix("original_inv_freq")
            current = getattr(module, kind + "inv_freq")
            setattr(module, kind + "inv_freq", getattr(module, name).to(current.device))
            if hasattr(module, kind + "max_seq_len_cached"):
                setattr(module, kind + "max_seq_len_cached", _limit(module))


def join_prompts(parts: list[Record], groups: list[list[int]]) -> Record:
    """The record of a batch, tensors with a row a prompt, from those of its groups, in the batch's order."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([b for group in groups for b in group], device="cpu").argsort()

    def joined(pieces: Any) -> Any:
        if isinstance(pieces[0], dict):
            return {layer: joined([piece[layer] for piece in pieces]) for layer in pieces[0]}
        return torch.cat(pieces)[order.to(pieces[0].device)]

    return type(parts[0])(*(joined(pieces) for pieces in zip(*parts, strict=True)))


def _length_dependent(model: nn.Module) -> list[Any]:
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kinds & SCALED_BY_LENGTH:
            found.append(module)
    return found


def _limit(module: Any) -> int:
    """The longest sequence that has the frequencies of training."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    sets = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    given = [p["original_max_position_embeddings"] for p in sets if p.get("original_max_position_embeddings")]
    return int(min(given, default=getattr(module, "original_max_seq_len", module.config.max_position_embeddings)))
