"""The output distribution at the targets: log p, chosen tokens, their cotangents, and the output metric C.

With h the head's input, h' = norm(h), logits z = phi(W h' + b) and p = softmax(z), the gradient of log p_t is

    a_t = N^T (phi'_t W_t - sum_v p_v phi'_v W_v),    N the final norm's Jacobian

and the second term is the same for every t: the work of size V is one product for all K tokens, not K of them.

The metric C measures how far a small change of h moves the distribution: C = L^T (diag p - p p^T) L =
sum_v p_v a_v a_v^T, with L the logits' Jacobian, so that KL(p || p') = 1/2 dh^T C dh to second order, and the Fisher
matrix of the whole vocabulary is F = J^T C J. Products by C need only the unembedding, in chunks of the vocabulary; C
is never formed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.model.head import Head, Rest, UnembeddingHead, check_top_k, likeliest, sum_rows, times_rows
from fisher_vmap.model.validation import in_float64

START_TOKENS = 8  # the search for leading eigenvectors starts from this many likeliest tokens for each vector
SKETCH_ELEMENTS = 2**24  # most numbers of the tokens' rows that a sketch gathers at a time


class Probes(NamedTuple):
    """Random signs x over the vocabulary: E[x x^T] = 1, so that the rows C^(1/2) x have E |J^T C^(1/2) x|^2 = tr F.

    Attributes:
        vectors: S, the number for each prompt.
        seeds: one for each prompt, so that a prompt's signs do not depend on the rest of its batch.
    """

    vectors: int
    seeds: Sequence[int]

    def signs(self, vocabulary: int) -> Tensor:
        """[B, S, V] int8."""
        return torch.stack([_signs((self.vectors, vocabulary), seed) for seed in self.seeds])


def _signs(shape: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8, device="cpu").mul_(2).sub_(1)


class Asked(NamedTuple):
    """What to read from a distribution.

    Attributes:
        top_k: the number of likeliest tokens; None: none.
        token_ids: [B, K], tokens chosen by the caller; None: the likeliest.
        rest: whether "all other tokens" is read as one outcome.
        probes: random vectors whose second moment is C; None: none.
        of_rest: whether the random vectors cover the other tokens only; with `rest`, centred on their mean.
    """

    top_k: int | None = None
    token_ids: Tensor | None = None
    rest: bool = False
    probes: Probes | None = None
    of_rest: bool = False


class Reading(NamedTuple):
    """What was read at the targets; float32, or float64 for a float64 model.

    Attributes:
        log_probs: [B, K], in nats, highest first unless the caller chose the tokens.
        token_ids: [B, K] int64.
        cotangents: [K, B, X]: a_t, the gradient of each log p with respect to the head's input, of width X.
        log_rest: [B], the log-probability of all other tokens together, from their own logits; -inf if there are none.
        rest: [1, B, X], the gradient of `log_rest`, or [0, B, X] if not asked for.
        random: [S, B, X], the random vectors.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor
    log_rest: Tensor
    rest: Tensor
    random: Tensor


class Distribution(Protocol):
    """The next-token distribution at the rows of one batch, X wide, and its metric C."""

    probs: Tensor
    """[B, V]."""

    log_probs: Tensor
    """[B, V], computed from the logits, so that they are finite where `probs` underflows."""

    reading: Reading

    def product(self, x_BmX: Tensor) -> Tensor:
        """C x for m vectors of each prompt, [B, m, X]."""

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """a_v of these tokens, [B, K, X]."""

    def sketch(self, token_ids_BK: Tensor, weights_BmK: Tensor) -> Tensor:
        """sum_k w_k a_k over these tokens, for m sets of weights, [B, m, X]."""


def distribution(head: Head, rows_BX: Tensor, asked: Asked | None = None) -> Distribution:
    """The distribution that a head makes of its rows, [B, X], from one pass over the unembedding.

    Raises:
        ValueError: top_k is above V, or the rest is asked for and no token is left for it.
    """
    rows_BX = rows_BX.to(torch.promote_types(rows_BX.dtype, torch.float32))
    if isinstance(head, UnembeddingHead):
        with head.on_device():
            return _Unembedded(head, rows_BX, asked or Asked())
    return _Logits(rows_BX, asked or Asked())


class _Unembedded:
    """The distribution of an `UnembeddingHead`."""

    def __init__(self, head: UnembeddingHead, rows_BD: Tensor, asked: Asked) -> None:
        self._head, self._rows_BD = head, rows_BD
        normed_BD, self._pull_norm = vjp(head.norm, rows_BD)  # type: ignore[misc]
        self._norm_device = normed_BD.device
        _check(asked, len(head.weight))
        signs_BSV = None if asked.probes is None else asked.probes.signs(len(head.weight))
        rest = None
        if asked.rest or signs_BSV is not None:
            tokens = asked.top_k or 0 if asked.token_ids is None else asked.token_ids
            rest = Rest(tokens if asked.rest or asked.of_rest else 0, signs_BSV)
        sums = head.sums(normed_BD.to(head.weight.device), rest)
        self._log_probs_BV = sums.z - sums.log_normaliser
        self._probs_BV, self._mean_BD, self._slope_BV = self._log_probs_BV.exp(), sums.mean, sums.slope
        self.log_probs, self.probs = self._log_probs_BV.to(rows_BD.device), self._probs_BV.to(rows_BD.device)
        log_probs_BK, token_ids, log_rest_B = _tokens(sums.z, self._log_probs_BV, asked)
        rest_1BX = random_SBX = rows_BD.new_zeros(0, *rows_BD.shape)
        if asked.rest and sums.rest is not None:
            rest_1BX = self._back_through_norm((sums.rest.mean - sums.mean)[:, None]).transpose(0, 1)
        if signs_BSV is not None and sums.rest is not None:
            centre_BD = sums.rest.mean if asked.rest else sums.mean
            signed_BSD = sums.rest.signed - sums.rest.signs[:, :, None] * centre_BD[:, None].nan_to_num()
            random_SBX = self._back_through_norm(signed_BSD).transpose(0, 1)
        self.reading = Reading(
            log_probs_BK.to(rows_BD),
            token_ids.to(rows_BD.device),
            self.rows(token_ids).transpose(0, 1),
            log_rest_B.to(rows_BD),
            rest_1BX,
            random_SBX,
        )

    def product(self, x_BmX: Tensor) -> Tensor:
        """C x, in one pass over the unembedding."""
        n_BmD = self._through_norm(x_BmX)
        B, m, D = n_BmD.shape
        flat = n_BmD.reshape(B * m, D)
        mean_Bm1 = torch.einsum("bmd,bd->bm", n_BmD, self._mean_BD)[:, :, None]
        out, total_Bm1 = torch.zeros_like(flat), torch.zeros_like(mean_Bm1)
        for where, weight_vD in self._head.chunks(flat.dtype):
            y_Bmv = times_rows(flat, weight_vD).view(B, m, -1)
            slope_B1v = None if self._slope_BV is None else self._slope_BV[:, None, where]
            if slope_B1v is not None:
                y_Bmv *= slope_B1v
            y_Bmv = y_Bmv.sub_(mean_Bm1).mul_(self._probs_BV[:, None, where])
            total_Bm1 += y_Bmv.sum(2, keepdim=True)  # zero but for rounding
            if slope_B1v is not None:
                y_Bmv *= slope_B1v
            out += sum_rows(y_Bmv.view(B * m, -1), weight_vD)
        return self._back_through_norm(out.view(B, m, D).sub_(total_Bm1 * self._mean_BD[:, None]))

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """a_v of these tokens."""
        token_ids_BK = token_ids_BK.to(self._mean_BD.device)
        rows_BKD = self._head.weight[token_ids_BK].to(self._mean_BD.dtype)
        if self._slope_BV is not None:
            rows_BKD *= self._slope_BV.gather(1, token_ids_BK)[:, :, None]
        return self._back_through_norm(rows_BKD - self._mean_BD[:, None])

    def sketch(self, token_ids_BK: Tensor, weights_BmK: Tensor) -> Tensor:
        """sum_k w_k a_k, without the rows of all tokens at once."""
        at, w = token_ids_BK.to(self._mean_BD.device), weights_BmK.to(self._mean_BD)
        mixed = []
        for ids_bK, w_bmK, slope_bK in zip(*self._in_pieces(at, w), strict=True):
            w_bmK = w_bmK if slope_bK is None else w_bmK * slope_bK[:, None]
            mixed.append(w_bmK @ self._head.weight[ids_bK].to(w_bmK))
        return self._back_through_norm(torch.cat(mixed) - w.sum(2, keepdim=True) * self._mean_BD[:, None])

    def _in_pieces(self, at_BK: Tensor, w_BmK: Tensor) -> tuple[Sequence[Any], ...]:
        size = max(1, SKETCH_ELEMENTS // (at_BK.shape[1] * self._head.weight.shape[1]))
        slopes = None if self._slope_BV is None else self._slope_BV.gather(1, at_BK).split(size)
        ids = at_BK.split(size)
        return ids, w_BmK.split(size), [None] * len(ids) if slopes is None else slopes

    def _through_norm(self, x_BmX: Tensor) -> Tensor:
        def push(x_BX: Tensor) -> Tensor:
            return jvp(self._head.norm, (self._rows_BD,), (x_BX,))[1]  # type: ignore[no-any-return]

        with self._head.on_device():
            moved_BmD = vmap(push, in_dims=1, out_dims=1)(x_BmX.to(self._rows_BD))
        return moved_BmD.to(self._mean_BD)  # type: ignore[no-any-return]

    def _back_through_norm(self, n_BmD: Tensor) -> Tensor:
        (x_BmD,) = vmap(self._pull_norm, in_dims=1, out_dims=1)(n_BmD.to(self._norm_device, self._rows_BD.dtype))
        return x_BmD  # type: ignore[no-any-return]


class _Logits:
    """The distribution of logits computed by the model itself: a_v = e_v - p, and C = diag p - p p^T, [V, V]."""

    def __init__(self, rows_BV: Tensor, asked: Asked) -> None:
        _check(asked, rows_BV.shape[1])
        self.log_probs = rows_BV.log_softmax(1)
        self.probs = self.log_probs.exp()
        log_probs_BK, token_ids, log_rest_B = _tokens(rows_BV, self.log_probs, asked)
        rest_1BV = random_SBV = rows_BV.new_zeros(0, *rows_BV.shape)
        share_BV = None
        if asked.rest:
            # From the logits, because these probabilities may all underflow.
            share_BV = self.log_probs.scatter(1, token_ids, -torch.inf).softmax(1)
            rest_1BV = (share_BV - self.probs)[None]
        if asked.probes is not None:
            root_BV = self.probs.sqrt()
            if asked.of_rest:
                root_BV = root_BV.scatter(1, token_ids, 0)
            x_BSV = asked.probes.signs(rows_BV.shape[1]).to(root_BV) * root_BV[:, None]
            centre_BV = self.probs if share_BV is None else share_BV
            random_SBV = (x_BSV - x_BSV.sum(2, keepdim=True) * centre_BV[:, None]).transpose(0, 1)
        cotangents_KBV = self.rows(token_ids).transpose(0, 1)
        self.reading = Reading(log_probs_BK, token_ids, cotangents_KBV, log_rest_B, rest_1BV, random_SBV)

    def product(self, x_BmX: Tensor) -> Tensor:
        """C x = p * (x - p . x)"""
        p_B1V = self.probs[:, None]
        x_BmX = x_BmX.to(self.probs)
        return p_B1V * (x_BmX - (p_B1V * x_BmX).sum(2, keepdim=True))

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """a_v = e_v - p"""
        rows_BKV = -self.probs[:, None].repeat(1, token_ids_BK.shape[1], 1)
        at_BK1 = token_ids_BK.to(self.probs.device)[:, :, None]
        return rows_BKV.scatter_add_(2, at_BK1, torch.ones_like(rows_BKV[:, :, :1]))

    def sketch(self, token_ids_BK: Tensor, weights_BmK: Tensor) -> Tensor:
        """sum_k w_k e_k - (sum_k w_k) p"""
        w = weights_BmK.to(self.probs)
        at_BmK = token_ids_BK.to(w.device)[:, None].expand_as(w)
        return (-w.sum(2, keepdim=True) * self.probs[:, None]).scatter_add_(2, at_BmK, w)


def _check(asked: Asked, vocabulary: int) -> None:
    """Raise ValueError if more tokens are asked for than there are, or a rest without tokens."""
    if asked.token_ids is None and asked.top_k is not None:
        check_top_k(asked.top_k, vocabulary)
    K = asked.top_k or 0 if asked.token_ids is None else asked.token_ids.shape[1]
    if asked.rest and vocabulary <= K:
        raise ValueError(f"include_rest with all {K} tokens leaves no other one; lower top_k")


def _tokens(z_BV: Tensor, log_probs_BV: Tensor, asked: Asked) -> tuple[Tensor, Tensor, Tensor]:
    """Log p of the tokens asked for, their ids, and log p of all others together.

    The last comes from the others' own logits: 1 - sum p cancels where the tokens hold almost all probability.
    """
    if asked.token_ids is not None:
        token_ids = asked.token_ids.to(z_BV.device)
    else:
        token_ids = likeliest(z_BV, asked.top_k) if asked.top_k else z_BV.new_zeros(len(z_BV), 0, dtype=torch.int64)
    log_rest_B = log_probs_BV.scatter(1, token_ids, -torch.inf).logsumexp(1)
    return log_probs_BV.gather(1, token_ids), token_ids, log_rest_B


def leading_vectors(c: Distribution, count: int, iterations: int) -> Tensor:
    """Approximate leading eigenvectors of C, [B, count, X] orthonormal, by subspace iteration.

    It starts from the leading eigenvectors of the likeliest tokens' part of C, which a small Gram matrix gives. From
    there one iteration, a product by C, is worth several from a random start. `count` is at most X.
    """
    probs_BV = c.probs
    tokens = count if isinstance(c, _Logits) else START_TOKENS * count  # logits rows are V wide: take no more tokens
    n = min(probs_BV.shape[1], tokens)
    token_ids_Bn = likeliest(probs_BV, n)
    a_BnX = c.rows(token_ids_Bn) * probs_BV.gather(1, token_ids_Bn).sqrt()[:, :, None]
    if n < count:  # fewer tokens than vectors: the others are arbitrary
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(count - n, a_BnX.shape[2], generator=generator, dtype=torch.float64, device="cpu").to(a_BnX)
        a_BnX = torch.cat([a_BnX, more.expand(len(a_BnX), -1, -1)], 1)
    wide = in_float64(a_BnX)
    rows_are_fewer = wide.shape[1] <= wide.shape[2]  # take the smaller of the two Gram matrices
    gram_Bnn = wide @ wide.mT if rows_are_fewer else wide.mT @ wide
    _, X_Bnn = torch.linalg.eigh(torch.where(gram_Bnn.isfinite(), gram_Bnn, 0))  # one prompt's NaN must not fail all
    leading_Bmn = X_Bnn[:, :, -count:].mT
    u_BmX = orthonormal(leading_Bmn @ wide if rows_are_fewer else leading_Bmn).to(a_BnX)
    for _ in range(iterations):
        u_BmX = orthonormal(c.product(u_BmX)).to(a_BnX)
    return u_BmX


def random_sketch(c: Distribution, count: int, seeds: Sequence[int]) -> Tensor:
    """Random vectors x at each row of a distribution, [M, count, X], independent of those at the others.

    They are signs over the likeliest tokens, x = sum_v +-p_v a_v. With sqrt(p_v) in place of p_v, E[x x^T] would be
    these tokens' part of C; p_v lets the likeliest count more, as a step of the power method would.

    Args:
        c: the distribution at M rows.
        count: how many.
        seeds: one for each row.
    """
    n = min(c.probs.shape[1], START_TOKENS * count)
    token_ids_Mn = likeliest(c.probs, n)
    weight_Mn = c.probs.gather(1, token_ids_Mn)
    signs_Mmn = torch.stack([_signs((count, n), seed) for seed in seeds])
    return c.sketch(token_ids_Mn, signs_Mmn.to(weight_Mn) * weight_Mn[:, None])


def drawn_tokens(c: Distribution, count: int, seeds: Sequence[int]) -> Tensor:
    """Tokens drawn from the distribution at each row, [M, count] int64; `seeds` has one for each row."""
    drawn = [
        torch.multinomial(in_float64(p_V).cpu(), count, True, generator=torch.Generator().manual_seed(seed))
        for p_V, seed in zip(c.probs, seeds, strict=True)
    ]
    return torch.stack(drawn).to(c.probs.device)


def leading_range(rows_BmX: Tensor, count: int) -> Tensor:
    """The leading right singular vectors of each prompt's rows, as rows, [B, count, X] float64; NaN of NaN."""
    wide = in_float64(rows_BmX)
    finite_B11 = wide.isfinite().all(2, keepdim=True).all(1, keepdim=True)
    basis: Tensor = torch.linalg.svd(torch.where(finite_B11, wide, 0), full_matrices=False).Vh[:, :count]
    return torch.where(finite_B11, basis, torch.nan)


def orthonormal(rows_BmX: Tensor) -> Tensor:
    """An orthonormal basis of the span of each prompt's rows, as rows, [B, m, X] float64, by QR."""
    wide = in_float64(rows_BmX)
    length = torch.linalg.vector_norm(wide, dim=2, keepdim=True)
    wide = wide / torch.where(length > 0, length, 1)
    basis: Tensor = torch.linalg.qr(wide.mT).Q.mT
    return basis
