"""The output distribution, in float32: log p of the chosen tokens, and their cotangents at the residual stream.

With h' the normed last row, logits z = phi(W h' + b) and p = softmax(z), the gradient of log p_t with respect to h' is

    phi'_t W_t  -  sum_v p_v phi'_v W_v

and the second term is the same for every t: the work of size V is one product for all K tokens, not K of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import vjp, vmap

VOCABULARY_CHUNK_ELEMENTS = 2**24  # of the unembedding, upcast at a time
MIN_ROWS = 4  # a float32 product with fewer rows takes a path that is an order of magnitude less accurate


class Reading(NamedTuple):
    """What a head reads off the last rows.

    Attributes:
        log_probs: [B, K] float32, in nats, highest first unless the caller chose the tokens.
        token_ids: [B, K] int64.
        cotangents: [K, B, X] float32: the gradient of each log p with respect to the head's input, of width X.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor


class Head(Protocol):
    """From the rows of the last tokens to log p and its cotangents."""

    def read(self, rows_BX: Tensor, top_k: int, token_ids: Tensor | None) -> Reading:
        """Read the top_k likeliest tokens, or the tokens given, [B, K]."""


@dataclass(frozen=True)
class Phi:
    """The function that a model applies to its logits: z = cap tanh(scale x / cap), or z = scale x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Z, of the shape of x."""
        x = x * self.scale if self.scale != 1.0 else x
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)

    def derivative(self, z: Tensor) -> Tensor | None:
        """dz/dx as a function of z; None when it is 1 everywhere."""
        if self.cap is None:
            return None if self.scale == 1.0 else torch.full_like(z, self.scale)
        return self.scale * (1 - (z / self.cap) ** 2)


@dataclass(frozen=True)
class UnembeddingHead:
    """A head of the common kind: final norm, unembedding, and a function of each logit.

    Attributes:
        norm: the modules between the last block and the unembedding as a function [N, D] -> [N, D'], on float32 rows.
        weight: W, [V, D'], of any dtype; it is upcast a chunk of the vocabulary at a time.
        bias: [V] or None.
        phi: what the model does to its logits afterwards.
    """

    norm: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor | None
    phi: Phi

    def read(self, rows_BX: Tensor, top_k: int, token_ids: Tensor | None) -> Reading:
        """Log p of the tokens, and its gradient with respect to the last block's output, [K, B, D]."""
        rows_BD = rows_BX.to(torch.promote_types(rows_BX.dtype, torch.float32))
        normed_BD, pull_norm = vjp(self.norm, rows_BD)
        device = self.weight.device
        z_BV = self.phi(self._logits(normed_BD.to(device)))
        log_normaliser_B1 = z_BV.logsumexp(1, keepdim=True)
        if token_ids is None:
            check_top_k(top_k, z_BV.shape[1])
            token_ids = likeliest(z_BV, top_k)
        token_ids = token_ids.to(device)
        log_probs_BK = z_BV.gather(1, token_ids) - log_normaliser_B1

        weight_BV = (z_BV - log_normaliser_B1).exp_()  # p, then p phi'
        slope_BV = self.phi.derivative(z_BV)
        row_BKD = self.weight[token_ids].to(weight_BV.dtype)
        if slope_BV is not None:
            weight_BV *= slope_BV
            row_BKD *= slope_BV.gather(1, token_ids)[:, :, None]
        row_BKD -= self._expected_row(weight_BV)[:, None]
        cotangents_KBD = row_BKD.transpose(0, 1).to(rows_BD.device)
        (cotangents_KBD,) = vmap(pull_norm)(cotangents_KBD)
        return Reading(log_probs_BK.to(rows_BD.device), token_ids.to(rows_BD.device), cotangents_KBD)

    def _chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The unembedding in rows of the vocabulary, each chunk upcast: (where, [v, D'])."""
        V, D = self.weight.shape
        size = max(1, VOCABULARY_CHUNK_ELEMENTS // D)
        for start in range(0, V, size):
            yield slice(start, start + size), self.weight[start : start + size].to(dtype)

    def _logits(self, normed_BD: Tensor) -> Tensor:
        """W h' + b, [B, V]."""
        x_BD = _at_least_rows(normed_BD)
        out_BV = x_BD.new_empty(len(x_BD), len(self.weight))
        for where, weight_vD in self._chunks(x_BD.dtype):
            out_BV[:, where] = x_BD @ weight_vD.T
        logits_BV = out_BV[: len(normed_BD)]
        return logits_BV if self.bias is None else logits_BV + self.bias.to(logits_BV.dtype)

    def _expected_row(self, weight_BV: Tensor) -> Tensor:
        """The weighted sum of the rows of W, [B, D']; chunks are added up in float64 where there is one."""
        wide = torch.float64 if weight_BV.device.type != "mps" else torch.float32
        rows_BV = _at_least_rows(weight_BV)
        total_BD = rows_BV.new_zeros(len(rows_BV), self.weight.shape[1], dtype=wide)
        for where, weight_vD in self._chunks(weight_BV.dtype):
            total_BD += rows_BV[:, where] @ weight_vD
        return total_BD[: len(weight_BV)].to(weight_BV.dtype)


@dataclass(frozen=True)
class LogitsHead:
    """A head that is not of the common kind: its input is the logits that the model itself made, [B, V]."""

    def read(self, rows_BX: Tensor, top_k: int, token_ids: Tensor | None) -> Reading:
        """Log p of the tokens, and its gradient with respect to the logits: one-hot minus p, [K, B, V]."""
        z_BV = rows_BX.to(torch.promote_types(rows_BX.dtype, torch.float32))
        log_p_BV = z_BV.log_softmax(1)
        if token_ids is None:
            check_top_k(top_k, z_BV.shape[1])
            token_ids = likeliest(z_BV, top_k)
        token_ids = token_ids.to(z_BV.device)
        one_hot_BKV = torch.nn.functional.one_hot(token_ids, z_BV.shape[1]).to(z_BV.dtype)
        cotangents_BKV = one_hot_BKV - log_p_BV.exp()[:, None]
        return Reading(log_p_BV.gather(1, token_ids), token_ids, cotangents_BKV.transpose(0, 1))


def likeliest(z_BV: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest entries of each row, [B, K], largest first; equal entries in the order of their ids."""
    values_BK, ids_BK = z_BV.topk(top_k)
    smallest_B1 = values_BK[:, -1:]
    crowded_B = (z_BV >= smallest_B1).sum(1) > top_k  # a tie across the edge: topk may have kept any of them
    for b in crowded_B.nonzero().flatten().tolist():
        ids_BK[b] = torch.cat([(z_BV[b] > smallest_B1[b]).nonzero(), (z_BV[b] == smallest_B1[b]).nonzero()])[:top_k, 0]
    ids_BK = ids_BK.sort(1).values
    order_BK = z_BV.gather(1, ids_BK).argsort(dim=1, descending=True, stable=True)
    return ids_BK.gather(1, order_BK)


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise ValueError unless 1 <= top_k <= V."""
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k is {top_k}; expected 1 to {vocabulary}, the size of this model's vocabulary")


def _at_least_rows(x_BX: Tensor) -> Tensor:
    missing = MIN_ROWS - len(x_BX)
    return x_BX if missing <= 0 else torch.cat([x_BX, x_BX[:1].expand(missing, -1)])
