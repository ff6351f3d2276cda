"""The output distribution, in float32: log p of the chosen tokens, and their cotangents at the residual stream.

With h' the normed last row, logits z = phi(W h' + b) and p = softmax(z), the gradient of log p_t with respect to h' is

    phi'_t W_t  -  sum_v p_v phi'_v W_v

and the second term is the same for every t: the work of size V is one product for all K tokens, not K of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from fisher_vmap.model.offload import weights_at_hand
from fisher_vmap.model.widening import widened

VOCABULARY_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # of the unembedding, upcast at a time: on a CPU in its cache
MIN_ROWS = 4  # on some processors a float32 product with fewer rows takes a path that is much less accurate


class Reading(NamedTuple):
    """What a head reads off the last rows.

    Attributes:
        log_probs: [B, K] float32, in nats, highest first unless the caller chose the tokens.
        token_ids: [B, K] int64.
        cotangents: [K, B, X] float32: the gradient of each log p with respect to the head's input, of width X.
        log_rest: [B] float32, the log-probability of all other tokens together, from their own logits; -inf if none.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor
    log_rest: Tensor


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

    def derivative(self, x: Tensor) -> Tensor | None:
        """dz/dx, of the shape of x; None when it is 1 everywhere."""
        if self.cap is None:
            return None if self.scale == 1.0 else torch.full_like(x, self.scale)
        # Not 1 - (z / cap)^2, which cancels where the cap bites.
        return self.scale / torch.cosh(self.scale * x / self.cap) ** 2


@dataclass(frozen=True)
class UnembeddingHead:
    """A head of the common kind: final norm, unembedding, and a function of each logit.

    Attributes:
        norm: the modules between the last block and the unembedding as a function [N, D] -> [N, D'], on float32 rows.
        unembedding: the module with W, [V, D'], of any dtype, and a bias [V] or None. W is upcast a chunk of the
            vocabulary at a time.
        phi: what the model does to its logits afterwards.
    """

    norm: Callable[[Tensor], Tensor]
    unembedding: nn.Linear
    phi: Phi

    @property
    def weight(self) -> Tensor:
        """W, [V, D'], as it is now; fetched, where it is put aside, unless it is at hand."""
        with weights_at_hand(self.unembedding):
            return self.unembedding.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """[V], as it is now."""
        with weights_at_hand(self.unembedding):
            bias: Tensor | None = self.unembedding.bias
            return None if bias is None else bias.detach()

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within the context no weight of the head is put aside, and none of what the norm runs is too narrow."""
        chain = getattr(self.norm, "chain", ())
        with weights_at_hand(self.unembedding, *chain), widened(*chain, *getattr(self.norm, "runs", ())):
            yield

    def read(self, rows_BX: Tensor, top_k: int, token_ids: Tensor | None) -> Reading:
        """Log p of the tokens, and its gradient with respect to the last block's output, [K, B, D]."""
        with self.at_hand():
            return self._read(rows_BX, top_k, token_ids)

    def _read(self, rows_BX: Tensor, top_k: int, token_ids: Tensor | None) -> Reading:
        rows_BD = rows_BX.to(torch.promote_types(rows_BX.dtype, torch.float32))
        normed_BD, pull_norm = vjp(self.norm, rows_BD)  # type: ignore[misc]
        z_BV, log_normaliser_B1, expected_BD = self.outputs(normed_BD.to(self.weight.device))
        if token_ids is None:
            check_top_k(top_k, z_BV.shape[1])
            token_ids = likeliest(z_BV, top_k)
        token_ids = token_ids.to(self.weight.device)
        z_BK = z_BV.gather(1, token_ids)
        row_BKD = self.weight[token_ids].to(z_BK.dtype)
        raw_BK = torch.einsum("bkd,bd->bk", row_BKD, normed_BD.to(row_BKD.device))
        if self.bias is not None:
            raw_BK += self.bias[token_ids].to(raw_BK.dtype)
        if (slope_BK := self.phi.derivative(raw_BK)) is not None:
            row_BKD *= slope_BK[:, :, None]
        cotangents_KBD = (row_BKD - expected_BD[:, None]).transpose(0, 1).to(normed_BD.device)
        (cotangents_KBD,) = vmap(pull_norm)(cotangents_KBD)
        log_probs_BK = (z_BK - log_normaliser_B1).to(rows_BD)
        log_rest_B = _log_rest(z_BV, token_ids, log_normaliser_B1).to(rows_BD)
        return Reading(log_probs_BK, token_ids.to(rows_BD.device), cotangents_KBD, log_rest_B)

    def outputs(self, normed_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits z [B, V], log sum exp z [B, 1], and sum_v p_v phi'_v W_v [B, D'], in one pass over the unembedding.

        Each chunk of W is upcast once and serves both products: the sum is kept relative to the largest logit so far,
        as in an online softmax, in float64 where there is one.
        """
        wide = torch.float64 if normed_BD.device.type != "mps" else torch.float32
        B = len(normed_BD)
        x_BD = _at_least_rows(normed_BD)
        z_BV = x_BD.new_empty(len(x_BD), len(self.weight))
        top_B1 = x_BD.new_full((len(x_BD), 1), -torch.inf)
        mass_B1 = torch.zeros_like(top_B1, dtype=wide)
        sum_BD = x_BD.new_zeros(len(x_BD), self.weight.shape[1], dtype=wide)
        for where, weight_vD in self.chunks(x_BD.dtype):
            raw_Bv = x_BD @ weight_vD.T
            if self.bias is not None:
                raw_Bv += self.bias[where].to(raw_Bv.dtype)
            z_BV[:, where] = z_Bv = self.phi(raw_Bv)
            higher_B1 = torch.maximum(top_B1, z_Bv.amax(1, keepdim=True))
            shrink_B1 = (top_B1 - higher_B1).exp_().to(wide)
            weight_Bv = (z_Bv - higher_B1).exp_()
            mass_B1 = mass_B1 * shrink_B1 + weight_Bv.sum(1, keepdim=True, dtype=wide)
            if (slope_Bv := self.phi.derivative(raw_Bv)) is not None:
                weight_Bv = weight_Bv * slope_Bv
            sum_BD.mul_(shrink_B1).add_(weight_Bv @ weight_vD)
            top_B1 = higher_B1
        log_normaliser_B1 = top_B1 + mass_B1.log().to(top_B1.dtype)
        return z_BV[:B], log_normaliser_B1[:B], (sum_BD / mass_B1)[:B].to(z_BV.dtype)

    def raw(self, normed_BD: Tensor) -> Tensor:
        """What goes into phi, W h' + b, [B, V]."""
        parts = [normed_BD @ weight_vD.T for _, weight_vD in self.chunks(normed_BD.dtype)]
        raw_BV = torch.cat(parts, 1)
        return raw_BV if self.bias is None else raw_BV + self.bias.to(raw_BV.dtype)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """The unembedding in rows of the vocabulary, each chunk upcast: (where, [v, D'])."""
        weight = self.weight
        V, D = weight.shape
        size = max(1, VOCABULARY_CHUNK_ELEMENTS.get(weight.device.type, 2**22) // D)
        for start in range(0, V, size):
            yield slice(start, start + size), weight[start : start + size].to(dtype)


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
        log_rest_B = _log_rest(log_p_BV, token_ids, torch.zeros_like(log_p_BV[:, :1]))
        return Reading(log_p_BV.gather(1, token_ids), token_ids, cotangents_BKV.transpose(0, 1), log_rest_B)


def likeliest(z_BV: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest entries of each row, [B, K], largest first; equal ones in the order of their ids."""
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


def _log_rest(z_BV: Tensor, token_ids: Tensor, log_normaliser_B1: Tensor) -> Tensor:
    """Log of the probability of all tokens but these, [B]; not 1 - sum p, which cancels where they hold almost all."""
    return z_BV.scatter(1, token_ids, -torch.inf).logsumexp(1) - log_normaliser_B1[:, 0]


def _at_least_rows(x_BX: Tensor) -> Tensor:
    missing = MIN_ROWS - len(x_BX)
    return x_BX if missing <= 0 else torch.cat([x_BX, x_BX[:1].expand(missing, -1)])
