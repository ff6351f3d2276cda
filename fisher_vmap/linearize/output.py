"""Which outcomes a batch's scores are of, and which cotangents must be pulled back for them.

The scores of outcomes that cover everything obey sum p g = 0. Where "any other token" is an outcome, one of them
follows from the others, and nothing more is pulled back than without it. The likeliest is taken for that, so that what
rounding has left in the others is divided by the largest probability.

The output metric C: how far a small move of the head's input moves the next-token distribution.

With h the head's input and L the logits' Jacobian, C = L^T (diag p - p p^T) L, so that KL(p || p') = 1/2 dh^T C dh to
second order, and the Fisher matrix of the whole vocabulary is F = J^T C J. With a_v = grad_h log p_v, the v-th row of L
less its mean under p, C = sum_v p_v a_v a_v^T: products by it and by its root need the unembedding alone, in chunks of
the vocabulary, and C itself (D x D for each prompt) is never formed.

The record that the kernel returns: scores of the top-k tokens at every hooked layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.decomposition import float64_device
from fisher_vmap.model.head import Head, LogitsHead, Phi, UnembeddingHead, likeliest

START_TOKENS = 8  # likeliest tokens that the search for leading eigenvectors starts from, for each one wanted


class Metric(Protocol):
    """C at the rows of one batch, X wide."""

    probs: Tensor
    """[B, V], the next-token distribution."""

    log_probs: Tensor
    """[B, V], its logarithm, from the logits: finite where `probs` underflows."""

    def product(self, x_BmX: Tensor) -> Tensor:
        """C x for m vectors of each prompt, [B, m, X]."""

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """a_v of these tokens, [B, K, X]."""

    def transposed(self, y_BmV: Tensor) -> Tensor:
        """sum_v y_v a_v, [B, m, X]."""


def metric(head: Head, rows_BX: Tensor) -> Metric:
    """C at the last rows, by the head that reads them."""
    rows_BX = rows_BX.to(torch.promote_types(rows_BX.dtype, torch.float32))
    if isinstance(head, UnembeddingHead):
        return UnembeddingMetric(head, rows_BX)
    assert isinstance(head, LogitsHead)
    return LogitsMetric(rows_BX)


class UnembeddingMetric:
    """C of a head of the common kind: a_v = N^T (phi'_v W_v - sum_u p_u phi'_u W_u), N the final norm's Jacobian."""

    def __init__(self, head: UnembeddingHead, rows_BD: Tensor) -> None:
        self._head = head
        self._device, place = rows_BD.device, head.weight.device
        self._rows_BD = rows_BD
        with head.at_hand():
            normed_BD, self._pull_norm = vjp(head.norm, rows_BD)  # type: ignore[misc]
        self._norm_device = normed_BD.device
        self._normed_BD = normed_BD.to(place)
        z_BV, log_normaliser_B1, self._mean_BD = head.outputs(self._normed_BD)
        self.log_probs = (z_BV - log_normaliser_B1).to(self._device)
        self._probs_BV = (z_BV - log_normaliser_B1).exp_()
        self._slope_BV = None if head.phi == Phi() else head.phi.derivative(head.raw(self._normed_BD))
        self.probs = self._probs_BV.to(self._device)

    def product(self, x_BmX: Tensor) -> Tensor:
        """C x, in one pass over the unembedding."""
        n_BmD = self._through_norm(x_BmX)
        B, m, D = n_BmD.shape
        flat = n_BmD.reshape(B * m, D)
        mean_Bm1 = torch.einsum("bmd,bd->bm", n_BmD, self._mean_BD)[:, :, None]
        out, total_Bm1 = torch.zeros_like(flat), torch.zeros_like(mean_Bm1)
        for where, weight_vD in self._head.chunks(flat.dtype):
            y_Bmv = (flat @ weight_vD.T).view(B, m, -1)
            slope_B1v = None if self._slope_BV is None else self._slope_BV[:, None, where]
            if slope_B1v is not None:
                y_Bmv *= slope_B1v
            y_Bmv = y_Bmv.sub_(mean_Bm1).mul_(self._probs_BV[:, None, where])
            total_Bm1 += y_Bmv.sum(2, keepdim=True)  # zero but for rounding
            if slope_B1v is not None:
                y_Bmv *= slope_B1v
            out.addmm_(y_Bmv.view(B * m, -1), weight_vD)
        return self._back_through_norm(out.view(B, m, D).sub_(total_Bm1 * self._mean_BD[:, None]))

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """a_v of these tokens."""
        token_ids_BK = token_ids_BK.to(self._mean_BD.device)
        rows_BKD = self._head.weight[token_ids_BK].to(self._mean_BD.dtype)
        if self._slope_BV is not None:
            rows_BKD *= self._slope_BV.gather(1, token_ids_BK)[:, :, None]
        return self._back_through_norm(rows_BKD - self._mean_BD[:, None])

    def transposed(self, y_BmV: Tensor) -> Tensor:
        """sum_v y_v a_v."""
        y_BmV = y_BmV.to(self._mean_BD)
        total_Bm1 = y_BmV.sum(2, keepdim=True)
        if self._slope_BV is not None:
            y_BmV = y_BmV * self._slope_BV[:, None]
        B, m, _ = y_BmV.shape
        out = y_BmV.new_zeros(B * m, self._mean_BD.shape[1])
        for where, weight_vD in self._head.chunks(out.dtype):
            out.addmm_(y_BmV[:, :, where].reshape(B * m, -1), weight_vD)
        return self._back_through_norm(out.view(B, m, -1) - total_Bm1 * self._mean_BD[:, None])

    def _through_norm(self, x_BmX: Tensor) -> Tensor:
        def push(x_BX: Tensor) -> Tensor:
            return jvp(self._head.norm, (self._rows_BD,), (x_BX,))[1]  # type: ignore[no-any-return]

        with self._head.at_hand():
            moved_BmD = vmap(push, in_dims=1, out_dims=1)(x_BmX.to(self._rows_BD))
        return moved_BmD.to(self._mean_BD)  # type: ignore[no-any-return]

    def _back_through_norm(self, n_BmD: Tensor) -> Tensor:
        (x_BmD,) = vmap(self._pull_norm, in_dims=1, out_dims=1)(n_BmD.to(self._norm_device, self._rows_BD.dtype))
        return x_BmD  # type: ignore[no-any-return]


class LogitsMetric:
    """C of a head whose input is the logits themselves: diag p - p p^T, [V, V]."""

    def __init__(self, rows_BV: Tensor) -> None:
        self.log_probs = rows_BV.log_softmax(1)
        self.probs = rows_BV.softmax(1)

    def product(self, x_BmX: Tensor) -> Tensor:
        """P * (x - p . x)"""
        p_B1V = self.probs[:, None]
        x_BmX = x_BmX.to(self.probs)
        return p_B1V * (x_BmX - (p_B1V * x_BmX).sum(2, keepdim=True))

    def rows(self, token_ids_BK: Tensor) -> Tensor:
        """One-hot less p."""
        rows_BKV = -self.probs[:, None].repeat(1, token_ids_BK.shape[1], 1)
        at_BK1 = token_ids_BK.to(self.probs.device)[:, :, None]
        return rows_BKV.scatter_add_(2, at_BK1, torch.ones_like(rows_BKV[:, :, :1]))

    def transposed(self, y_BmV: Tensor) -> Tensor:
        """Y - (sum y) p"""
        y_BmV = y_BmV.to(self.probs)
        return y_BmV - y_BmV.sum(2, keepdim=True) * self.probs[:, None]


def leading_vectors(c: Metric, count: int, iterations: int) -> Tensor:
    """About the leading eigenvectors of C, [B, count, X] orthonormal, by subspace iteration.

    It starts from those of the part of C that the likeliest tokens make up, which a small Gram matrix gives: there
    every iteration counts for several of one that starts at random.

    Args:
        c: the metric.
        count: how many vectors; at most X.
        iterations: products by C.
    """
    probs_BV = c.probs
    # A row of the logits is as wide as the vocabulary: there the tokens themselves must do.
    tokens = count if isinstance(c, LogitsMetric) else START_TOKENS * count
    n = min(probs_BV.shape[1], tokens)
    token_ids_Bn = likeliest(probs_BV, n)
    a_BnX = c.rows(token_ids_Bn) * probs_BV.gather(1, token_ids_Bn).sqrt()[:, :, None]
    if n < count:  # fewer tokens than vectors: the rest are arbitrary
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(count - n, a_BnX.shape[2], generator=generator, dtype=torch.float64, device="cpu").to(a_BnX)
        a_BnX = torch.cat([a_BnX, more.expand(len(a_BnX), -1, -1)], 1)
    wide = a_BnX.to(float64_device(a_BnX.device), torch.float64)
    rows_are_fewer = wide.shape[1] <= wide.shape[2]  # of the two Gram matrices the smaller one
    gram_Bnn = wide @ wide.mT if rows_are_fewer else wide.mT @ wide
    _, X_Bnn = torch.linalg.eigh(torch.where(gram_Bnn.isfinite(), gram_Bnn, 0))  # a prompt's NaN stays its own
    leading_Bmn = X_Bnn[:, :, -count:].mT
    u_BmX = orthonormal(leading_Bmn @ wide if rows_are_fewer else leading_Bmn).to(a_BnX)
    for _ in range(iterations):
        u_BmX = orthonormal(c.product(u_BmX)).to(a_BnX)
    return u_BmX


def orthonormal(rows_BmX: Tensor) -> Tensor:
    """An orthonormal basis that holds the rows of each prompt, as rows, [B, m, X] float64: by a QR."""
    wide = rows_BmX.to(float64_device(rows_BmX.device), torch.float64)
    length = torch.linalg.vector_norm(wide, dim=2, keepdim=True)
    wide = wide / torch.where(length > 0, length, 1)
    basis: Tensor = torch.linalg.qr(wide.mT).Q.mT
    return basis


class Probes(NamedTuple):
    """Random signs over the vocabulary: E[x x^T] = 1, so that the rows C^(1/2) x have E |J^T C^(1/2) x|^2 = tr F.

    Attributes:
        vectors: how many for each prompt.
        seeds: one for each prompt, so that a prompt's signs do not depend on its neighbours.
    """

    vectors: int
    seeds: Sequence[int]


def probe_rows(c: Metric, probes: Probes, without_BK: Tensor | None = None, *, centred: bool = False) -> Tensor:
    """sum_v x_v sqrt(p_v) a_v with random signs x, [B, S, X]: a random vector whose second moment is C.

    Args:
        c: the metric.
        probes: how many, and their seeds.
        without_BK: tokens that are left out: the second moment is then what they lack of C.
        centred: with `without_BK`: take off what the tokens that remain have in common, as far as one outcome that
            stands for all of them holds it.
    """
    V = c.probs.shape[1]
    signs = [
        torch.randint(
            0, 2, (probes.vectors, V), generator=torch.Generator().manual_seed(seed), dtype=torch.int8, device="cpu"
        )
        for seed in probes.seeds
    ]
    root_BV = c.probs.sqrt()
    if without_BK is not None:
        root_BV = root_BV.scatter(1, without_BK.to(root_BV.device), 0)
    x_BSV = torch.stack(signs).to(root_BV.device, root_BV.dtype).mul_(2).sub_(1)
    if centred:  # the rows sqrt(p_v) (a_v - mean a) are (1 - r r^T / |r|^2) diag(r) a, r the roots
        along_BS1 = x_BSV @ root_BV[:, :, None] / root_BV.square().sum(1)[:, None, None].clamp(min=1e-30)
        x_BSV = x_BSV - along_BS1 * root_BV[:, None]
    return c.transposed(x_BSV.mul_(root_BV[:, None]))


class Scores(NamedTuple):
    """Scores g_t = d log p_t / d theta of the K likeliest next tokens, theta a bias on the residual stream.

    float32, or float64 where the model is float64. log p is in nats, scores in nats per unit of residual stream.

    Attributes:
        log_probs: [B, K], highest first.
        token_ids: [B, K] int64.
        gradients: for each hooked layer, [B, K, D].
        position_energy: for each hooked layer, [B, T] in the caller's columns: sum_t p_t |g_t at this position|^2.
        residual_norm: for each hooked layer, [B]: the mean norm of its output over the prompt's tokens.
        remainder: for each hooked layer, [B, S, D]: random vectors r with E[r r^T] = the Fisher matrix of the whole
            vocabulary less that of the K tokens; S is what was asked for.
    """

    log_probs: Tensor
    token_ids: Tensor
    gradients: dict[str, Tensor]
    position_energy: dict[str, Tensor]
    residual_norm: dict[str, Tensor]
    remainder: dict[str, Tensor]

    def factor(self, layer: str | None = None) -> Tensor:
        """A = diag(sqrt p) G, [B, K, D]: the Fisher matrix of each prompt is A^T A.

        Args:
            layer: the name of a hooked layer; may be left out where there is only one.

        Raises:
            ValueError: the layer was not hooked, or none was named and there are several.
        """
        if layer is None and len(self.gradients) == 1:
            layer = next(iter(self.gradients))
        if layer not in self.gradients:
            raise ValueError(f"layer {layer!r} has no scores here; expected one of {list(self.gradients)}")
        return torch.exp(self.log_probs / 2)[:, :, None] * self.gradients[layer]


REST = -1  # the token id of "any other token"


@dataclass(frozen=True)
class Wanted:
    """What is asked of a batch.

    Attributes:
        top_k: the number of likeliest tokens.
        token_ids: [B, K], the tokens, where the caller has chosen them.
        positions: where the bias is added.
        chunk_size: cotangents at a time.
        include_rest: whether "any other token" is an outcome as well.
        probes: random vectors of what the outcomes leave out; None: none.
        precision: "model", "float32", or "mixed": the forward alone in float32.
    """

    top_k: int
    token_ids: Tensor | None
    positions: str | Tensor
    chunk_size: int | None
    include_rest: bool = False
    probes: Probes | None = None
    precision: str = "model"


class Outcomes(NamedTuple):
    """O outcomes of each prompt, and the cotangents, C of them, from which their scores follow.

    Attributes:
        log_probs: [B, O].
        token_ids: [B, O], the last of them `REST` where that is included.
        cotangents: [C, B, X]: of the outcomes but the one that is derived, then of the random vectors.
        derived: [B], the outcome that is not pulled back; None: all are.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor
    derived: Tensor | None

    @property
    def pulled(self) -> Tensor:
        """[B, n] int64, the outcomes that are pulled back."""
        B, O = self.log_probs.shape
        every_BO = torch.arange(O, device=self.log_probs.device).expand(B, O)
        if self.derived is None:
            return every_BO
        return every_BO[every_BO != self.derived[:, None]].view(B, O - 1)

    def weights(self) -> Tensor:
        """[B, C]: the probability of each outcome that is pulled back; 0 for random vectors."""
        p_Bn = self.log_probs.exp().gather(1, self.pulled)
        return torch.nn.functional.pad(p_Bn, (0, len(self.cotangents) - p_Bn.shape[1]))

    def derivation(self) -> tuple[Tensor, Tensor] | None:
        """How the derived score is made of the others, [B, C], and its probability, [B]; None if there is none."""
        if self.derived is None:
            return None
        p_B = self.log_probs.gather(1, self.derived[:, None])[:, 0].exp()
        return -self.weights() / p_B[:, None], p_B

    def scores(self, pulled_BCD: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of the outcomes, [B, O, D], and the random vectors, [B, S, D]."""
        at_Bn = self.pulled
        n = at_Bn.shape[1]
        gradients, random = pulled_BCD[:, :n], pulled_BCD[:, n:]
        derivation = self.derivation()
        if derivation is None or self.derived is None:
            return gradients, random
        B, O = self.log_probs.shape
        scores_BOD = gradients.new_empty(B, O, gradients.shape[2])
        scores_BOD.scatter_(1, at_Bn.to(gradients.device)[:, :, None].expand_as(gradients), gradients)
        combination_BC = derivation[0].to(gradients)
        scores_BOD[torch.arange(B, device="cpu"), self.derived.cpu()] = torch.einsum(
            "bc,bcd->bd", combination_BC, pulled_BCD
        )
        return scores_BOD, random


def read_outcomes(head: Head, rows_BX: Tensor, wanted: Wanted) -> Outcomes:
    """Read the outcomes off the last rows.

    Raises:
        ValueError: "any other token" is wanted where there is none.
    """
    log_probs, token_ids, cotangents_KBX, log_rest_B = head.read(rows_BX, wanted.top_k, wanted.token_ids)
    tokens, derived = token_ids, None
    if wanted.include_rest or wanted.probes is not None:
        c = metric(head, rows_BX)
    if wanted.include_rest:
        if token_ids.shape[1] >= c.probs.shape[1]:
            raise ValueError(f"include_rest with all {token_ids.shape[1]} tokens leaves no other one; lower top_k")
        # Its own mean over the rest, not what the tokens lack: that cancels where they hold almost everything.
        # From the logits: their probabilities may all be too small for a number.
        share_BV = c.log_probs.scatter(1, token_ids.to(c.log_probs.device), -torch.inf).softmax(1)
        rest_1BX = c.transposed(share_BV[:, None]).transpose(0, 1)
        log_probs = torch.cat([log_probs, log_rest_B[:, None]], 1)
        token_ids = torch.cat([token_ids, torch.full_like(token_ids[:, :1], REST)], 1)
        derived = log_probs.argmax(1)
        every_OBX = torch.cat([cotangents_KBX, rest_1BX])
        outcomes = Outcomes(log_probs, token_ids, every_OBX, derived)
        cotangents_KBX = every_OBX.gather(0, outcomes.pulled.T[:, :, None].expand(-1, -1, every_OBX.shape[2]))
    if wanted.probes is not None:
        random_BSX = probe_rows(c, wanted.probes, tokens, centred=wanted.include_rest)
        cotangents_KBX = torch.cat([cotangents_KBX, random_BSX.transpose(0, 1)])
    return Outcomes(log_probs, token_ids, cotangents_KBX, derived)
