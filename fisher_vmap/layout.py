"""How a batch of prompts of unequal length is laid out: on the left, with padding on the right and no mask.

In a causal model what stands to the right of a token is inert, so right padding needs no mask, no position ids and no
special rule for recurrent models, and fused attention stays available. Input padded on the left is laid anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Prompts as the model sees them.

    Attributes:
        input_ids: [B, T] int64; a row's padding repeats its own last token, so it is always a valid token.
        lengths: [B] int64, the number of real tokens.
        start: [B] int64, the column of the caller's tensor in which each prompt began.
        width: the number of columns of the caller's tensor.
    """

    input_ids: Tensor
    lengths: Tensor
    start: Tensor
    width: int

    def real(self) -> Tensor:
        """[B, T] bool, True for real tokens."""
        return torch.arange(self.input_ids.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def last(self, x_BTD: Tensor) -> Tensor:
        """[B, D]: the rows of the last real tokens, of a tensor [B, T, D]."""
        return x_BTD[torch.arange(len(self.lengths), device=x_BTD.device), self.lengths.to(x_BTD.device) - 1]

    def at_last(self, rows_KBD: Tensor) -> Tensor:
        """[K, B, T, D], zero but for the rows given, [K, B, D], at each prompt's last real token."""
        K, B, D = rows_KBD.shape
        out_KBTD = rows_KBD.new_zeros(K, B, self.input_ids.shape[1], D)
        out_KBTD[:, torch.arange(B, device=rows_KBD.device), self.lengths.to(rows_KBD.device) - 1] = rows_KBD
        return out_KBTD

    def to_caller(self, x_BT: Tensor) -> Tensor:
        """[B, width]: a number for each token, moved to where the caller's tensor had the token; zero at padding."""
        column_BW = torch.arange(self.width, device=x_BT.device) - self.start.to(x_BT.device)[:, None]
        inside_BW = (column_BW >= 0) & (column_BW < self.lengths.to(x_BT.device)[:, None])
        return x_BT.gather(1, column_BW.clamp(0, x_BT.shape[1] - 1)) * inside_BW

    def from_caller(self, x_BW: Tensor) -> Tensor:
        """[B, T]: the inverse of `to_caller`; zero at padding."""
        column_BT = torch.arange(self.input_ids.shape[1], device=x_BW.device) + self.start.to(x_BW.device)[:, None]
        return x_BW.gather(1, column_BT.clamp(max=self.width - 1)) * self.real().to(x_BW.device)


def lay_out(input_ids: Tensor, attention_mask: Tensor | None) -> Layout:
    """Lay prompts on the left, whichever side they were padded on.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], nonzero for real tokens, which must be contiguous; None: every token is real.

    Raises:
        ValueError: shapes or dtypes are not these, a prompt is empty, or its real tokens have a gap.
    """
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32) or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}; expected [B, T] int64, not empty"
        )
    B, W = input_ids.shape
    input_ids = input_ids.long()
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, {tuple(input_ids.shape)}"
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
    return Layout(input_ids.gather(1, start[:, None] + offset_BT), lengths, start, W)
