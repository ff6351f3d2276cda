"""The head, from the last block's output to the logits, in float32: final norm, unembedding, function of each logit.

The unembedding is the only tensor of the vocabulary's size, so all sums over the vocabulary share one pass over it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.model.offload import weights_on_device
from fisher_vmap.model.validation import widest_dtype
from fisher_vmap.model.widening import widened

VOCABULARY_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # unembedding elements upcast at a time: fit a CPU's cache
MIN_ROWS = 4  # on some processors a float32 product with fewer rows takes a path that is much less accurate


class Rest(NamedTuple):
    """A request for sums over all tokens except some.

    Attributes:
        without: the tokens left out: this many of the likeliest, or their ids, [B, K].
        signs: [B, S, V] int8, the signs of S random sums; None: none.
    """

    without: int | Tensor
    signs: Tensor | None = None


class RestSums(NamedTuple):
    """Sums over the tokens that are not left out; q = p / (sum of p over them).

    Attributes:
        mean: [B, D'], sum_v q_v phi'_v W_v.
        signed: [B, S, D'], sum_v x_v sqrt(p_v) phi'_v W_v, x the signs.
        signs: [B, S], sum_v x_v sqrt(p_v).
    """

    mean: Tensor
    signed: Tensor
    signs: Tensor


class Sums(NamedTuple):
    """The results of one pass over the unembedding W; p = softmax(z), and phi' is the derivative of `Phi`.

    Attributes:
        z: [B, V], the logits.
        log_normaliser: [B, 1], log sum exp z.
        mean: [B, D'], sum_v p_v phi'_v W_v.
        slope: [B, V], phi'; None if it is 1 everywhere.
        rest: the sums over the rest, if asked for.
    """

    z: Tensor
    log_normaliser: Tensor
    mean: Tensor
    slope: Tensor | None
    rest: RestSums | None


@dataclass(frozen=True)
class Phi:
    """The function that a model applies to its logits: z = cap tanh(scale x / cap), or z = scale x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The logits z for the unembedding's output x, of the same shape."""
        x = x * self.scale if self.scale != 1.0 else x
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)

    def derivative(self, x: Tensor) -> Tensor | None:
        """dz/dx, of the shape of x; None when it is 1 everywhere."""
        if self.cap is None:
            return None if self.scale == 1.0 else torch.full_like(x, self.scale)
        # Not scale (1 - (z / cap)^2), which cancels near the cap.
        return self.scale / torch.cosh(self.scale * x / self.cap) ** 2


@dataclass(frozen=True)
class UnembeddingHead:
    """The usual head: final norm, unembedding, and a function of each logit.

    Attributes:
        norm: the modules between the last block and the unembedding as a function [N, D] -> [N, D'], on float32 rows.
        unembedding: the module with W, [V, D'], of any dtype, and a bias [V] or None. W is upcast a chunk of the
            vocabulary at a time.
        phi: the function that the model applies to each logit afterwards.
    """

    norm: Callable[[Tensor], Tensor]
    unembedding: nn.Linear
    phi: Phi

    @property
    def weight(self) -> Tensor:
        """W, [V, D'], as it is now; fetched if it is offloaded and not on the device."""
        with weights_on_device(self.unembedding):
            return self.unembedding.weight.detach()

    @property
    def bias(self) -> Tensor | None:
        """[V], as it is now."""
        with weights_on_device(self.unembedding):
            bias: Tensor | None = self.unembedding.bias
            return None if bias is None else bias.detach()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Within the context the head's weights are on the device, and the weights that the norm runs are widened."""
        chain = getattr(self.norm, "chain", ())
        with weights_on_device(self.unembedding, *chain), widened(*chain, *getattr(self.norm, "runs", ())):
            yield

    def sums(self, normed_BD: Tensor, rest: Rest | None = None) -> Sums:
        """All sums over the vocabulary, in one pass over the unembedding.

        Each chunk of W is upcast once for all products. Sums are relative to the largest logit so far, as in an online
        softmax.
        """
        B = len(normed_BD)
        x_BD = torch.cat([normed_BD, normed_BD[:1].expand(max(0, MIN_ROWS - B), -1)])
        V, width = self.weight.shape
        z_BV = x_BD.new_empty(len(x_BD), V)
        slopes: list[Tensor] = []
        every, others = _OnlineSums(x_BD, width), None if rest is None else _RestPass(rest, normed_BD, width)
        for where, weight_vD in self.chunks(x_BD.dtype):
            raw_Bv = times_rows(x_BD, weight_vD)
            if self.bias is not None:
                raw_Bv += self.bias[where].to(raw_Bv.dtype)
            z_BV[:, where] = z_Bv = self.phi(raw_Bv)
            if (slope_Bv := self.phi.derivative(raw_Bv)) is not None:
                slopes.append(slope_Bv[:B])
            every.add(z_Bv, slope_Bv, weight_vD)
            if others is not None:
                others.add(where, z_Bv[:B], None if slope_Bv is None else slope_Bv[:B], weight_vD)
        z_BV, slope_BV = z_BV[:B], torch.cat(slopes, 1) if slopes else None
        log_normaliser_B1, mean_BD = every.log_mass()[:B], every.mean()[:B]
        found = None if others is None else others.finished(z_BV, slope_BV, self.weight, log_normaliser_B1)
        return Sums(z_BV, log_normaliser_B1, mean_BD, slope_BV, found)

    def chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Chunks of the unembedding's rows, upcast: (slice of the vocabulary, [v, D']), valid until the next one.

        They share memory: new memory for each would cost more than the sums.
        """
        weight = self.weight
        V, D = weight.shape
        size = max(1, VOCABULARY_CHUNK_ELEMENTS.get(weight.device.type, 2**22) // D)
        if weight.device.type == "cpu" and size > (threads := torch.get_num_threads()):
            size -= size % threads  # as `times_rows` divides it
        memory = None if weight.dtype == dtype else weight.new_empty(min(size, V), D, dtype=dtype)
        for start in range(0, V, size):
            chunk_vD = weight[start : start + size]
            if memory is not None:
                chunk_vD = memory[: len(chunk_vD)].copy_(chunk_vD)
            yield slice(start, start + size), chunk_vD


@dataclass(frozen=True)
class LogitsHead:
    """The head of models without an `UnembeddingHead`: its input is the logits, [B, V], from the model itself."""


Head = UnembeddingHead | LogitsHead


class _OnlineSums:
    """sum_v e^(z_v) r_v and sum_v x_v e^(z_v / 2) r_v over rows r_v that arrive in pieces; x are random signs.

    The sums are relative to the largest logit so far, and in float64 if the device has it.
    """

    def __init__(self, x_BD: Tensor, width: int, signs: int = 0) -> None:
        B, wide = len(x_BD), widest_dtype(x_BD.device)
        self._kind = x_BD.dtype
        self.top_B1 = x_BD.new_full((B, 1), -torch.inf)
        self.mass_Bm1 = x_BD.new_zeros(B, 1 + signs, 1, dtype=wide)
        self.sum_BmD = x_BD.new_zeros(B, 1 + signs, width, dtype=wide)

    def add(self, z_Bv: Tensor, slope_Bv: Tensor | None, rows: Tensor, signs_BSv: Tensor | None = None) -> None:
        """Add one piece, with rows [v, D'], or [B, v, D'] if each prompt has its own."""
        top_B1 = torch.maximum(self.top_B1, z_Bv.amax(1, keepdim=True))
        at_B1 = torch.where(top_B1.isneginf(), 0, top_B1)
        shrink_Bm1 = (self.top_B1 - at_B1).exp_()[:, :, None].to(self.mass_Bm1.dtype)
        y_Bmv = (z_Bv - at_B1).exp_()[:, None]
        if signs_BSv is not None:
            y_Bmv = torch.cat([y_Bmv, signs_BSv * y_Bmv.sqrt()], 1)
            shrink_Bm1 = torch.cat([shrink_Bm1, shrink_Bm1.sqrt().expand_as(self.mass_Bm1[:, 1:])], 1)
        self.mass_Bm1 = self.mass_Bm1 * shrink_Bm1 + y_Bmv.sum(2, keepdim=True, dtype=self.mass_Bm1.dtype)
        if slope_Bv is not None:
            y_Bmv = y_Bmv * slope_Bv[:, None]
        sum_BmD = y_Bmv @ rows if rows.dim() > 2 else sum_rows(y_Bmv.flatten(0, 1), rows).view_as(self.sum_BmD)
        self.sum_BmD.mul_(shrink_Bm1).add_(sum_BmD)
        self.top_B1 = top_B1

    def log_mass(self) -> Tensor:
        """The log of sum_v e^(z_v), [B, 1]."""
        return self.top_B1 + self.mass_Bm1[:, 0].log().to(self._kind)

    def mean(self) -> Tensor:
        """The mean of the rows under softmax(z), [B, D']."""
        return (self.sum_BmD[:, 0] / self.mass_Bm1[:, 0]).to(self._kind)


class _RestPass:
    """The sums over all tokens except some, in the same pass that finds out which.

    Tokens that are left out are never added, because subtracting them later would cancel where they hold almost all
    probability. The likeliest tokens are known only at the end, so the likeliest of each chunk wait until then.
    """

    def __init__(self, rest: Rest, normed_BD: Tensor, width: int) -> None:
        self._without, self._signs_BSV = rest.without, rest.signs
        self._waiting: list[Tensor] = []
        self._sums = _OnlineSums(normed_BD, width, 0 if rest.signs is None else rest.signs.shape[1])

    def add(self, where: slice, z_Bv: Tensor, slope_Bv: Tensor | None, weight_vD: Tensor) -> None:
        """Add one chunk of the vocabulary."""
        if not isinstance(self._without, int):
            at_BK = self._without.to(z_Bv.device) - where.start
            inside_BK = (at_BK >= 0) & (at_BK < z_Bv.shape[1])
            out_Bv = torch.zeros_like(z_Bv).scatter_add_(1, at_BK.clamp(0, z_Bv.shape[1] - 1), inside_BK.to(z_Bv)) > 0
            z_Bv = z_Bv.masked_fill(out_Bv, -torch.inf)
        elif self._without:
            ids_Bk = likeliest(z_Bv, min(self._without, z_Bv.shape[1]))
            self._waiting.append(ids_Bk + where.start)
            z_Bv = z_Bv.scatter(1, ids_Bk, -torch.inf)
        signs_BSv = None if self._signs_BSV is None else self._signs_BSV[:, :, where].to(z_Bv)
        self._sums.add(z_Bv, slope_Bv, weight_vD, signs_BSv)

    def finished(self, z_BV: Tensor, slope_BV: Tensor | None, weight: Tensor, log_normaliser_B1: Tensor) -> RestSums:
        """The sums, after adding the waiting tokens that are not left out."""
        left_BK = likeliest(z_BV, self._without) if self._waiting and isinstance(self._without, int) else None
        for ids_Bk in self._waiting:
            assert left_BK is not None
            goes_Bk = (ids_Bk[:, :, None] == left_BK[:, None]).any(2)
            z_Bk = z_BV.gather(1, ids_Bk).masked_fill(goes_Bk, -torch.inf)
            slope_Bk = None if slope_BV is None else slope_BV.gather(1, ids_Bk)
            rows_BkD = weight[ids_Bk].to(z_BV.dtype)
            signs_BSk = None
            if (signs := self._signs_BSV) is not None:
                signs_BSk = signs.to(z_BV.device).gather(2, ids_Bk[:, None].expand(-1, signs.shape[1], -1)).to(z_BV)
            self._sums.add(z_Bk, slope_Bk, rows_BkD, signs_BSk)
        sums = self._sums
        scale_B11 = ((sums.top_B1 - log_normaliser_B1) / 2).exp()[:, :, None].to(sums.sum_BmD)
        signed_BSD, signs_BS = sums.sum_BmD[:, 1:] * scale_B11, (sums.mass_Bm1[:, 1:] * scale_B11)[:, :, 0]
        return RestSums(sums.mean(), signed_BSD.to(z_BV.dtype), signs_BS.to(z_BV.dtype))


def times_rows(x_RD: Tensor, weight_vD: Tensor) -> Tensor:
    """The product x W^T, [R, v], with a thread for each part of the vocabulary: few rows would be one thread's work.

    With two threads and eight rows it took 0.6 of the time; with 320 rows it made no difference.
    """
    if (parts := _parts(weight_vD)) is None:
        return x_RD @ weight_vD.T
    pieces_PRv = torch.bmm(x_RD.expand(len(parts), -1, -1), parts.mT)
    return pieces_PRv.transpose(0, 1).flatten(1)


def sum_rows(y_Rv: Tensor, weight_vD: Tensor) -> Tensor:
    """The product y W, [R, D'], with a thread for each part of the columns."""
    if (parts := _parts(weight_vD.T)) is None:
        return y_Rv @ weight_vD
    pieces_PRd = torch.bmm(y_Rv.expand(len(parts), -1, -1), parts.mT)
    return pieces_PRd.transpose(0, 1).flatten(1)


def _parts(matrix: Tensor) -> Tensor | None:
    """A thread's part of the rows for each thread, [threads, rows / threads, ...], if a CPU can divide them."""
    threads = torch.get_num_threads()
    if matrix.device.type != "cpu" or threads == 1 or len(matrix) % threads:
        return None
    parts: Tensor = matrix.unflatten(0, (threads, -1))
    return parts


def likeliest(z_BV: Tensor, top_k: int) -> Tensor:
    """The ids of the top_k largest entries of each row, [B, K], largest first; equal entries ordered by id."""
    values_BK, ids_BK = z_BV.topk(top_k)
    smallest_B1 = values_BK[:, -1:]
    crowded_B = (z_BV >= smallest_B1).sum(1) > top_k  # a tie for the last place, which topk breaks arbitrarily
    for b in [b for b, crowded in enumerate(crowded_B.tolist()) if crowded]:
        ids_BK[b] = torch.cat([(z_BV[b] > smallest_B1[b]).nonzero(), (z_BV[b] == smallest_B1[b]).nonzero()])[:top_k, 0]
    ids_BK = ids_BK.sort(1).values
    order_BK = z_BV.gather(1, ids_BK).argsort(dim=1, descending=True, stable=True)
    return ids_BK.gather(1, order_BK)


def check_top_k(top_k: int, vocabulary: int) -> None:
    """Raise ValueError unless 1 <= top_k <= V."""
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k is {top_k}; expected 1 to {vocabulary}, the size of this model's vocabulary")
