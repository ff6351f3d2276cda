"""Low-rank Fisher matrices as factors, F = A^T A: of the top-k tokens, or close to the best for the whole vocabulary.

`full` is a Nystrom approximation of F = J^T C J. Leading eigenvectors U of the output metric C are pulled back; the
range of J^T U, orthonormal rows Q, is pushed forward, Z = J Q; and with M = Z C Z^T,

    F  ~  (J^T C Z) M^-1 (J^T C Z)^T  =  A^T A,        A = (M^-1/2 Z C) J

With F = L^T L, L = C^(1/2) J, this is L^T P L for the orthogonal projection P on the range of C^(1/2) Z: for any Z it
never exceeds F, and rounding errors of the push enter only to second order. With as many vectors as h is wide, no
search is needed: with Z = 1 the formula is F itself, by one pullback of C^(1/2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Unpack

import torch
from torch import Tensor, nn

from fisher_vmap.fisher import broken_off, check_inputs, join_layers, prompt_seeds
from fisher_vmap.linearize.linear_map import KernelOptions, LinearMap, Options, Summed, as_it_is, differentiable
from fisher_vmap.linearize.network import LinearizedNetwork, OneAtATime, linearize
from fisher_vmap.linearize.output import (
    Asked,
    Distribution,
    Probes,
    Reading,
    distribution,
    leading_vectors,
    orthonormal,
)
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.scores import Scores, join_prompts
from fisher_vmap.linearize.select import choose_forms, give_up
from fisher_vmap.model.layers import resolve_layers
from fisher_vmap.model.layout import batches_apart, lay_out, select
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.validation import check_whole, in_float64
from fisher_vmap.model.wrappers import names_inside, unwrapped

TRACE_SAMPLES = 4  # random vectors for estimator full, a twelfth of its cost
START_ITERATIONS = 1  # iterations of the subspace iteration for C's leading eigenvectors


class Estimate(NamedTuple):
    """Fisher matrices of a batch, one factor for each layer: F ~ A^T A.

    float32, or float64 for a float64 model.

    Attributes:
        log_probs: [B, K], of the likeliest next tokens, highest first, in nats.
        token_ids: [B, K] int64.
        factors: for each layer, A, [B, m, D].
        loadings: for each layer, [B, K, m]: loadings @ A approximates diag(sqrt p) G, the tokens' own rows. Empty if
            these are the rows of A.
        remainder: for each layer, [B, S, D]: random vectors r with E[r r^T] = the Fisher matrix of the whole vocabulary
            minus A^T A.
        position_energy: for each layer, [B, T] in the caller's columns: the trace of each position's own A^T A.
        residual_norm: for each layer, [B]: the mean norm of its output over the prompt's tokens.
    """

    log_probs: Tensor
    token_ids: Tensor
    factors: dict[str, Tensor]
    loadings: dict[str, Tensor]
    remainder: dict[str, Tensor]
    position_energy: dict[str, Tensor]
    residual_norm: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions:
    """Which matrix is estimated, and how.

    Attributes:
        estimator: "topk", the matrix of the K likeliest tokens, or "full", close to the best approximation of the
            whole vocabulary's matrix with the rank asked for.
        include_rest: for topk: treat "any other token" as one more outcome.
        oversampling: for full: vectors beyond the rank.
        passes: for full: rounds of push and pull.
        trace_samples: random vectors for estimating what the matrix lacks; None: 4 for full, 0 for topk.

    Raises:
        ValueError: a value is not one of these, or two of them exclude each other.
    """

    estimator: str = "topk"
    include_rest: bool = False
    oversampling: int = 6
    passes: int = 1
    trace_samples: int | None = None

    def __post_init__(self) -> None:
        """Check the values that need no model."""
        if self.estimator not in ("topk", "full"):
            raise ValueError(f"estimator is {self.estimator!r}; expected 'topk' or 'full'")
        check_whole("oversampling", self.oversampling, 0)
        check_whole("passes", self.passes, 1)
        check_whole("trace_samples", self.samples, 0)

    @property
    def samples(self) -> int:
        """The number of random vectors."""
        if self.trace_samples is not None:
            return self.trace_samples
        return TRACE_SAMPLES if self.estimator == "full" else 0


def check_fit(how: EstimatorOptions, kernel: str) -> None:
    """Raise ValueError for settings that exclude each other."""
    if how.estimator == "full" and kernel == "loop":
        raise ValueError("estimator full needs forward derivatives, which kernel loop does not have; use auto or whole")
    if how.estimator == "full" and how.include_rest:
        raise ValueError("estimator full includes every token: include_rest is for estimator topk; leave it false")


def topk(scores: Scores) -> Estimate:
    """The matrix of the outcomes that have scores: A = diag(sqrt p) G."""
    factors = {layer: scores.factor(layer) for layer in scores.gradients}
    return Estimate(
        scores.log_probs, scores.token_ids, factors, {}, scores.remainder, scores.position_energy, scores.residual_norm
    )


def full(
    net: LinearizedNetwork, *, vectors: int, passes: int = 1, top_k: int = 10, probes: Probes | None = None
) -> Estimate:
    """Close to the best low-rank approximation of the whole vocabulary's Fisher matrix; see the module.

    `vectors` is m, a few more than the rank wanted. Each of the `passes` rounds of push and pull starts from the range
    of the previous result. `probes` are random vectors for the remainder.
    """
    found = [_full_of(one, vectors, passes, top_k, probes) for one in net.maps()]
    return join_layers(found, net.layers)


def _full_of(net: LinearMap, vectors: int, passes: int, top_k: int, probes: Probes | None) -> Estimate:
    """The estimate for the layers of one linear map."""
    with net.prepared():
        exact = vectors >= net.rows.shape[1]
        c = distribution(net.head, net.rows, Asked(top_k, probes=None if exact else probes))
        if exact:
            return _exact_of(net, c, 0 if probes is None else probes.vectors)
        start_BmX = leading_vectors(c, vectors, START_ITERATIONS)
        random_BSX = c.reading.random.transpose(0, 1)
        first = net.pull(torch.cat([start_BmX, random_BSX.to(start_BmX)], 1))
        found = []
        for layer in net.layers:
            pulled, random_BSD = first[layer].gradients[:, :vectors], first[layer].gradients[:, vectors:]
            for _ in range(passes):
                z_BmX, cz_BmX = _whitened(c, net.push(orthonormal(pulled).to(pulled), layer))
                last = net.pull(cz_BmX, [layer])[layer]
                pulled = last.gradients
            remainder_BSD = random_BSD - (random_BSX.to(z_BmX) @ z_BmX.mT) @ pulled
            found.append(_estimate(net, layer, c.reading, z_BmX, last, remainder_BSD))
        return join_layers(found, net.layers)


def _exact_of(net: LinearMap, c: Distribution, samples: int) -> Estimate:
    """F itself at every layer, by the pullback of C^(1/2), with zero remainder."""
    B, X = net.rows.shape
    z_BXX, cz_BXX = _whitened(c, torch.eye(X, device=net.rows.device).expand(B, X, X))
    found = [
        _estimate(net, layer, c.reading, z_BXX, last, last.gradients.new_zeros(B, samples, net.widths[layer]))
        for layer, last in net.pull(cz_BXX).items()
    ]
    return join_layers(found, net.layers)


def _whitened(c: Distribution, z_BmX: Tensor) -> tuple[Tensor, Tensor]:
    """M^-1/2 Z and M^-1/2 Z C, M = Z C Z^T: the new Z has Z C Z^T = 1, except for rows that are zero to rounding."""
    cz_BmX = c.product(z_BmX)
    z_BmX = z_BmX.to(cz_BmX)
    whiten_Bmm = _inverse_root(z_BmX, cz_BmX)
    return whiten_Bmm @ z_BmX, whiten_Bmm @ cz_BmX


def _estimate(
    net: LinearMap, layer: str, reading: Reading, z_BmX: Tensor, last: Summed, remainder_BSD: Tensor
) -> Estimate:
    """The estimate for one layer; `last` is A = Z C J, with Z C Z^T = 1."""
    token_rows_BKX = reading.cotangents.transpose(0, 1) * (reading.log_probs / 2).exp()[:, :, None]
    return Estimate(
        reading.log_probs,
        reading.token_ids,
        {layer: last.gradients},
        {layer: token_rows_BKX.to(z_BmX) @ z_BmX.mT},
        {layer: remainder_BSD},
        {layer: last.energy},
        {layer: net.residual_norm[layer]},
    )


def _inverse_root(z_BmX: Tensor, cz_BmX: Tensor) -> Tensor:
    """M^-1/2 of M = Z C Z^T, [B, m, m], by its eigenvectors; rows of eigenvalues that are zero to rounding are zero.

    M is symmetric up to rounding, which may be coarser than the dtype (a norm may compute in float32). Its asymmetry
    measures the rounding, and so which eigenvalues count as zero.
    """
    m = z_BmX.shape[1]
    M_Bmm = in_float64(z_BmX) @ in_float64(cz_BmX).mT
    finite_B11 = M_Bmm.isfinite().all(2).all(1)[:, None, None]
    M_Bmm = torch.where(finite_B11, M_Bmm, 0)
    mu_Bm, X_Bmm = torch.linalg.eigh((M_Bmm + M_Bmm.mT) / 2)
    rounding_B = torch.linalg.matrix_norm(M_Bmm - M_Bmm.mT)[:, None]
    least_B = torch.maximum(m * torch.finfo(z_BmX.dtype).eps * mu_Bm[:, -1:], 4 * rounding_B).clamp(min=0)
    inverse_Bm = torch.where(mu_Bm > least_B, mu_Bm, torch.inf).rsqrt()
    return (
        torch.where(finite_B11, inverse_Bm[:, :, None] * X_Bmm.mT, torch.nan).flip(1).to(z_BmX.dtype).to(z_BmX.device)
    )


def fisher_full(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: str | int | Sequence[str | int],
    rank: int = 10,
    oversampling: int = 6,
    passes: int = 1,
    top_k: int = 10,
    trace_samples: int = 4,
    **options: Unpack[Options],
) -> Estimate:
    """Close to the best rank-R approximation of the Fisher matrix of the whole vocabulary, for a batch of prompts.

    F = sum over all tokens of p_t g_t g_t^T = J^T C J, by two pullbacks and one pushforward of rank + oversampling
    vectors for each pass [Halko, Martinsson and Tropp, SIAM Review 2011]. With several layers the first pullback is
    shared; each layer has its own push and second pull. If rank + oversampling is D or more, the result is F itself,
    for all layers by one pullback of D vectors.

    Args:
        model: as for `fisher_scores`.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: as for `fisher_scores`.
        rank: R, the rank wanted; `compress(factor, rank)` cuts the result to it.
        oversampling: vectors beyond R; more of them bring the result closer to the best possible.
        passes: rounds of push and pull.
        top_k: K, how many of the likeliest tokens to report as well.
        trace_samples: S, random vectors for estimating the remainder; they join the first pullback.
        options: positions, kernel ("auto", "layerwise" or "whole"), chunk_size, precision and audit, as for
            `fisher_scores`.

    Returns:
        Estimate, with factors [B, R + oversampling, D].

    Raises:
        ValueError: an argument is not as described, or the model has no forward derivatives.
    """
    how = KernelOptions(**options)
    bounds = (("rank", rank, 1), ("oversampling", oversampling, 0), ("passes", passes, 1), ("top_k", top_k, 1))
    for name, value, least in (*bounds, ("trace_samples", trace_samples, 0)):
        check_whole(name, value, least)
    if how.kernel == "loop":
        raise ValueError("kernel loop has no forward derivatives, which the full matrix needs; use auto or whole")
    layout = lay_out(input_ids, attention_mask, how.positions)
    given, model = model, unwrapped(model)
    how = how.on(model)
    with torch.inference_mode(False), torch.no_grad(), as_it_is(model, how.precision):
        with differentiable(model):
            names = resolve_layers(model, names_inside(given, model, layers))
            check_inputs(model, layout)
            known = probe(model, layout)

        def of_group(group: list[int]) -> Estimate:
            part = select(layout, group)
            probes = Probes(trace_samples, prompt_seeds(part)) if trace_samples else None

            def run() -> Estimate:
                products = 2 * passes * (rank + oversampling) + trace_samples
                net = linearize(model, known, part, names, how, products)
                return full(net, vectors=rank + oversampling, passes=passes, top_k=top_k, probes=probes)

            try:
                return run()
            except StructureChanged as reason:
                with differentiable(model):
                    forms = choose_forms(model, known, part, names, how.kernel)
                    give_up(model, known, part, how.kernel, broken_off(known, forms, names, how.kernel, reason))
                return run()

        groups = batches_apart(model, layout.lengths)
        try:
            parts = [of_group(group) for group in groups]
        except OneAtATime:
            groups = [[b] for b in range(len(layout.lengths))]
            parts = [of_group(group) for group in groups]
        return join_prompts(parts, groups)
