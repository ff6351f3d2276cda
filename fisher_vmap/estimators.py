"""Low-rank Fisher matrices as factors, F = A^T A: of the top-k tokens, close to the whole vocabulary's best, or drawn.

`full` is a Nystrom approximation of F = J^T C J. With several targets a prompt, J is that of all of them, one below the
other, and C is block diagonal. Leading eigenvectors U of the output metric C are pulled back; the range of J^T U,
orthonormal rows Q, is pushed forward, Z = J Q; and with M = Z C Z^T,

    F  ~  (J^T C Z) M^-1 (J^T C Z)^T  =  A^T A,        A = (M^-1/2 Z C) J

With F = L^T L, L = C^(1/2) J, this is L^T P L for the orthogonal projection P on the range of C^(1/2) Z: for any Z it
never exceeds F, and rounding errors of the push enter only to second order. With as many vectors as h is wide, no
search is needed: with Z = 1 the formula is F itself, by one pullback of C^(1/2).

With several targets U is a random sketch of C, each vector at all targets at once, so that the number of vectors does
not depend on that of the targets; a few more than are wanted, of whose pulled range Q is the leading part. With as many
vectors as theta is wide, the result is F itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisher_vmap.decomposition import compress
from fisher_vmap.fisher import join_layers
from fisher_vmap.linearize.linear_map import LinearMap, Summed
from fisher_vmap.linearize.network import LinearizedNetwork
from fisher_vmap.linearize.output import (
    Asked,
    Distribution,
    Probes,
    distribution,
    drawn_tokens,
    leading_range,
    leading_vectors,
    orthonormal,
    random_sketch,
)
from fisher_vmap.linearize.scores import Scores, join_prompts
from fisher_vmap.model.targets import (
    NO_TOKEN,
    TargetGrid,
    Targets,
    grid_of,
    most_targets,
    target_seeds,
    targets_read,
)
from fisher_vmap.model.validation import check_whole, in_float64

TRACE_SAMPLES = 4  # random vectors for estimator full, a twelfth of its cost
SCORE_SAMPLES = 64  # drawn scores of estimator sampled
SKETCHED = 8  # of several targets: vectors of the sketch beyond those that are pushed
START_ITERATIONS = 1  # iterations of the subspace iteration for C's leading eigenvectors


class Estimate(NamedTuple):
    """Fisher matrices of a batch, one factor for each layer: F ~ A^T A.

    float32, or float64 for a float64 model. With several targets a prompt, m at most, the tokens of all of them stand
    one after the other, and K is m times the number of tokens, padded as in `Scores`.

    Attributes:
        log_probs: [B, K], of the likeliest next tokens, highest first at each target, in nats.
        token_ids: [B, K] int64.
        factors: for each layer, A, [B, n, D], of as many rows n as the estimator makes.
        loadings: for each layer, [B, K, n]: loadings @ A approximates diag(sqrt p) G, the tokens' own rows. Empty if
            these are the rows of A.
        remainder: for each layer, [B, S, D]: random vectors r with E[r r^T] = the Fisher matrix of the whole vocabulary
            minus A^T A.
        position_energy: for each layer, [B, T] in the caller's columns: the trace of each position's own A^T A.
        residual_norm: for each layer, [B]: the median norm of its output over the prompt's tokens.
        targets: columns, log p of the token that follows, and entropy, [B, m] each.
        target_trace: for each layer, [B, m]: the part of the trace that each target adds; of `full` and `sampled` in
            the span of the vectors that were pushed. Zero where it pads.
        trace_error: for each layer, [B]: the standard error of the trace of A^T A, where A is a sample; else empty.
    """

    log_probs: Tensor
    token_ids: Tensor
    factors: dict[str, Tensor]
    loadings: dict[str, Tensor]
    remainder: dict[str, Tensor]
    position_energy: dict[str, Tensor]
    residual_norm: dict[str, Tensor]
    targets: Targets
    target_trace: dict[str, Tensor]
    trace_error: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions:
    """Which matrix is estimated, and how.

    Attributes:
        estimator: "topk", the matrix of the K likeliest tokens; "full", close to the best approximation of the whole
            vocabulary's matrix with the rank asked for; or "sampled", an unbiased estimate of that matrix.
        include_rest: for topk: treat "any other token" as one more outcome.
        oversampling: for full: vectors beyond the rank.
        passes: for full: rounds of push and pull.
        trace_samples: random vectors for estimating what the matrix lacks; None: 4 for full, else 0.
        score_samples: for sampled: S, the number of drawn scores.

    Raises:
        ValueError: a value is not one of these, or two of them exclude each other.
    """

    estimator: str = "topk"
    include_rest: bool = False
    oversampling: int = 6
    passes: int = 1
    trace_samples: int | None = None
    score_samples: int = SCORE_SAMPLES

    def __post_init__(self) -> None:
        """Check the values that need no model."""
        if self.estimator not in ("topk", "full", "sampled"):
            raise ValueError(f"estimator is {self.estimator!r}; expected 'topk', 'full' or 'sampled'")
        check_whole("oversampling", self.oversampling, 0)
        check_whole("passes", self.passes, 1)
        check_whole("trace_samples", self.samples, 0)
        check_whole("score_samples", self.score_samples, 2)
        if self.estimator == "sampled" and self.trace_samples:
            raise ValueError("estimator sampled lacks nothing that trace_samples could estimate; leave it at auto")

    @property
    def samples(self) -> int:
        """The number of random vectors."""
        if self.trace_samples is not None:
            return self.trace_samples
        return TRACE_SAMPLES if self.estimator == "full" else 0


def check_fit(how: EstimatorOptions, kernel: str) -> None:
    """Raise ValueError for settings that exclude each other."""
    name = how.estimator
    if name != "topk" and kernel == "loop":
        raise ValueError(
            f"estimator {name} needs forward derivatives, which kernel loop does not have; use auto or whole"
        )
    if name != "topk" and how.include_rest:
        raise ValueError(f"estimator {name} includes every token: include_rest is for estimator topk; leave it false")


def topk(scores: Scores) -> Estimate:
    """The matrix of the outcomes that have scores: A = diag(sqrt p) G."""
    factors = {layer: scores.factor(layer) for layer in scores.gradients}
    B, m = scores.targets.columns.shape
    return Estimate(
        scores.log_probs,
        scores.token_ids,
        factors,
        {},
        scores.remainder,
        scores.position_energy,
        scores.residual_norm,
        scores.targets,
        {layer: A_BKD.square().sum(2).view(B, m, -1).sum(2) for layer, A_BKD in factors.items()},
        {},
    )


def mean_over_samples(found: Estimate, samples: int) -> Estimate:
    """The mean matrix of every `samples` consecutive rows of a batch: completions of one prompt.

    F = 1/S sum_s A_s^T A_s, so that the factors of S rows stand one below the other, divided by sqrt(S), and the tokens
    of all S rows are outcomes. `trace_error` is the standard error of the mean over the rows.
    """
    if samples == 1:
        return found
    S = samples

    def beside(x: Tensor) -> Tensor:  # [B S, n, ...] -> [B, S n, ...]
        return x.reshape(len(x) // S, S * x.shape[1], *x.shape[2:])

    def mean(x: Tensor) -> Tensor:
        averaged: Tensor = x.reshape(len(x) // S, S, *x.shape[1:]).mean(1)
        return averaged

    def block_diagonal(x_NOm: Tensor) -> Tensor:
        together: Tensor = torch.stack([torch.block_diag(*rows) for rows in x_NOm.split(S)])  # type: ignore[no-untyped-call]
        return together * sqrt(S)

    trace = {layer: A.square().sum((1, 2)).view(-1, S) for layer, A in found.factors.items()}
    loadings = found.loadings or {
        layer: torch.eye(A.shape[1], device=A.device, dtype=A.dtype).expand(len(A), -1, -1)
        for layer, A in found.factors.items()
    }
    return Estimate(
        beside(found.log_probs),
        beside(found.token_ids),
        {layer: beside(A) / sqrt(S) for layer, A in found.factors.items()},
        {layer: block_diagonal(x) for layer, x in loadings.items()},
        {layer: beside(x) for layer, x in found.remainder.items()},
        {layer: mean(x) for layer, x in found.position_energy.items()},
        {layer: mean(x) for layer, x in found.residual_norm.items()},
        Targets(*(beside(x) for x in found.targets)),
        {layer: beside(x) for layer, x in found.target_trace.items()},
        {layer: x.std(1) / sqrt(S) for layer, x in trace.items()},
    )


_PADDING = {"log_probs": -torch.inf, "token_ids": NO_TOKEN}  # of an estimate; zero of what is not named


def join_groups(parts: list[Estimate], groups: list[list[int]]) -> Estimate:
    """The estimate of a batch from those of its groups of prompts, which may differ in the most targets of a prompt."""
    if len(parts) == 1:
        return parts[0]

    def alike(pieces: Sequence[Any], fill: float) -> list[Any]:
        """The tensors of all parts, [b, n, ...] each, padded to the largest of them but for b."""
        if isinstance(pieces[0], dict):
            by_layer = {layer: alike([piece[layer] for piece in pieces], fill) for layer in pieces[0]}
            return [{layer: by_layer[layer][i] for layer in by_layer} for i in range(len(pieces))]
        if isinstance(pieces[0], Targets):
            fields = [alike(x, fill) for x, fill in zip(zip(*pieces, strict=True), (-1, nan, nan), strict=True)]
            return [Targets(*each) for each in zip(*fields, strict=True)]
        sizes = [max(piece.shape[d] for piece in pieces) for d in range(1, pieces[0].dim())]
        return [pad(x, [n for d in reversed(range(len(sizes))) for n in (0, sizes[d] - x.shape[d + 1])], value=fill)
                for x in pieces]  # fmt: skip

    fields = {name: alike([getattr(part, name) for part in parts], _PADDING.get(name, 0)) for name in Estimate._fields}
    padded = [Estimate(**{name: values[i] for name, values in fields.items()}) for i in range(len(parts))]
    return join_prompts(padded, groups)


def full(
    net: LinearizedNetwork, *, vectors: int, seeds: Sequence[int], passes: int = 1, top_k: int = 10, samples: int = 0
) -> Estimate:
    """Close to the best low-rank approximation of the whole vocabulary's Fisher matrix; see the module.

    `vectors` is a few more than the rank wanted. Each of the `passes` rounds of push and pull starts from the range of
    the previous result. `samples` is the number of random vectors for the remainder.
    """
    found = [_full_of(one, vectors, seeds, passes, top_k, samples) for one in net.maps()]
    return join_layers(found, net.layers)


class _At(NamedTuple):
    """The distribution at the targets of a linear map, and the place of each target."""

    net: LinearMap
    c: Distribution
    grid: TargetGrid

    def by_prompt(self, x_M: Tensor) -> Tensor:
        """[B, ...]: the sum over each prompt's targets of [M, ...]."""
        prompt_M = self.net.layout.prompt_of_target(x_M.device)
        if prompt_M is None:
            return x_M
        return x_M.new_zeros(self.grid.shape[0], *x_M.shape[1:]).index_add_(0, prompt_M, x_M)

    def of_target(self, x_B: Tensor) -> Tensor:
        """[M, ...]: each target's prompt's row of [B, ...]."""
        prompt_M = self.net.layout.prompt_of_target(x_B.device)
        return x_B if prompt_M is None else x_B[prompt_M]

    def token_rows(self) -> Tensor:
        """sqrt(p_t) a_t of the tokens that were read, [M, K, X]."""
        reading = self.c.reading
        return reading.cotangents.transpose(0, 1) * (reading.log_probs / 2).exp()[:, :, None]

    def estimate(
        self, layer: str, factor: Summed, loadings_MKm: Tensor, remainder_BSD: Tensor, trace_M: Tensor
    ) -> Estimate:
        """The estimate for one layer, from its factor and numbers of its targets."""
        reading, grid, net = self.c.reading, self.grid, self.net
        return Estimate(
            grid.spread(reading.log_probs, -torch.inf).flatten(1),
            grid.spread(reading.token_ids, NO_TOKEN).flatten(1),
            {layer: factor.gradients},
            {layer: grid.spread(loadings_MKm, 0).flatten(1, 2)},
            {layer: remainder_BSD},
            {layer: factor.energy},
            {layer: net.residual_norm[layer]},
            targets_read(net.layout, grid, self.c.log_probs, self.c.probs),
            {layer: grid.spread(trace_M, 0)},
            {},
        )


def _full_of(net: LinearMap, vectors: int, seeds: Sequence[int], passes: int, top_k: int, samples: int) -> Estimate:
    """The estimate for the layers of one linear map."""
    layout, one_target = net.layout, most_targets(net.layout) == 1
    with net.prepared():
        exact = one_target and vectors >= net.rows.shape[1]
        grid = grid_of(layout)
        seeds = target_seeds(layout, grid, seeds)
        probes = Probes(samples, seeds) if samples and not exact else None
        at = _At(net, distribution(net.head, net.rows, Asked(top_k, probes=probes)), grid)
        if exact:
            return _exact_of(at, samples)
        if one_target:
            start_MnX = leading_vectors(at.c, vectors, START_ITERATIONS)
        else:
            start_MnX = random_sketch(at.c, vectors + SKETCHED, seeds)
        random_MSX, n = at.c.reading.random.transpose(0, 1), start_MnX.shape[1]
        first = net.pull(torch.cat([start_MnX, random_MSX.to(start_MnX)], 1))
        found = []
        for layer in net.layers:
            pulled, random_BSD = first[layer].gradients[:, :n], first[layer].gradients[:, n:]
            for _ in range(passes):
                basis = orthonormal(pulled) if pulled.shape[1] == vectors else leading_range(pulled, vectors)
                z_MmX, cz_MmX, trace_M = _whitened(at, net.push(basis.to(pulled), layer))
                last = net.pull(cz_MmX, [layer])[layer]
                pulled = last.gradients
            remainder_BSD = random_BSD - at.by_prompt(random_MSX.to(z_MmX) @ z_MmX.mT) @ pulled
            loadings_MKm = at.token_rows().to(z_MmX) @ z_MmX.mT
            found.append(at.estimate(layer, last, loadings_MKm, remainder_BSD, trace_M))
        return join_layers(found, net.layers)


def _exact_of(at: _At, samples: int) -> Estimate:
    """F itself at every layer, by the pullback of C^(1/2), with zero remainder."""
    net, (B, X) = at.net, at.net.rows.shape
    z_BXX, cz_BXX, _ = _whitened(at, torch.eye(X, device=net.rows.device).expand(B, X, X))
    loadings_BKX = at.token_rows().to(z_BXX) @ z_BXX.mT
    found = []
    for layer, last in net.pull(cz_BXX).items():
        remainder_BSD = last.gradients.new_zeros(B, samples, net.widths[layer])
        trace_B = last.gradients.square().sum((1, 2))
        found.append(at.estimate(layer, last, loadings_BKX, remainder_BSD, trace_B))
    return join_layers(found, net.layers)


def _whitened(at: _At, z_MmX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M^-1/2 Z and M^-1/2 Z C, M = Z C Z^T, and each target's part of tr M, [M].

    M is a prompt's, a sum over its targets. The new Z has M = 1, except for rows that are zero to rounding.
    """
    cz_MmX = at.c.product(z_MmX)
    z_MmX = z_MmX.to(cz_MmX)
    gram_Mmm = in_float64(z_MmX) @ in_float64(cz_MmX).mT
    whiten_Mmm = at.of_target(_inverse_root(at.by_prompt(gram_Mmm), z_MmX.dtype).to(z_MmX.device))
    trace_M = gram_Mmm.diagonal(dim1=1, dim2=2).sum(1)
    return whiten_Mmm @ z_MmX, whiten_Mmm @ cz_MmX, trace_M.to(z_MmX.dtype).to(z_MmX.device)


def _inverse_root(M_Bmm: Tensor, dtype: torch.dtype) -> Tensor:
    """M^-1/2, [B, m, m], by its eigenvectors; rows of eigenvalues that are zero to rounding are zero.

    M is symmetric up to rounding, which may be coarser than the dtype (a norm may compute in float32). Its asymmetry
    measures the rounding, and so which eigenvalues count as zero.
    """
    m = M_Bmm.shape[1]
    finite_B11 = M_Bmm.isfinite().all(2).all(1)[:, None, None]
    M_Bmm = torch.where(finite_B11, M_Bmm, 0)
    mu_Bm, X_Bmm = torch.linalg.eigh((M_Bmm + M_Bmm.mT) / 2)
    rounding_B = torch.linalg.matrix_norm(M_Bmm - M_Bmm.mT)[:, None]
    least_B = torch.maximum(m * torch.finfo(dtype).eps * mu_Bm[:, -1:], 4 * rounding_B).clamp(min=0)
    inverse_Bm = torch.where(mu_Bm > least_B, mu_Bm, torch.inf).rsqrt()
    return torch.where(finite_B11, inverse_Bm[:, :, None] * X_Bmm.mT, torch.nan).flip(1).to(dtype)


def sampled(net: LinearizedNetwork, *, samples: int, rank: int, seeds: Sequence[int], top_k: int = 10) -> Estimate:
    """An unbiased estimate of the whole vocabulary's Fisher matrix: the mean of g g^T over S drawn scores g.

    g = sum_j J_j^T a_{j, y_j}, with y_j drawn from the distribution at target j. The a of different targets are
    independent with mean zero, so E[g g^T] = sum_j J_j^T C_j J_j. The relative error of the trace falls as 1 / sqrt(S).

    `samples` is S. The tokens' shares come from a push of the `rank` leading directions.
    """
    found = [_sampled_of(one, samples, rank, seeds, top_k) for one in net.maps()]
    return join_layers(found, net.layers)


def _sampled_of(net: LinearMap, samples: int, rank: int, seeds: Sequence[int], top_k: int) -> Estimate:
    grid = grid_of(net.layout)
    with net.prepared():
        at = _At(net, distribution(net.head, net.rows, Asked(top_k)), grid)
        drawn_MS = drawn_tokens(at.c, samples, target_seeds(net.layout, grid, seeds))
        equal_BS = at.c.probs.new_full((grid.shape[0], samples), 1 / samples)
        pulled = net.pull(at.c.rows(drawn_MS), None, equal_BS)
        found = []
        for layer, g in pulled.items():
            A_BSD = g.gradients / samples**0.5
            low = compress(A_BSD, rank)
            z_MRX = net.push(low.vectors.to(A_BSD), layer)
            inverse_BR = torch.where(low.singular_values > 0, low.singular_values, torch.inf).rsqrt()
            back_BRS = (inverse_BR[:, :, None] * low.left_vectors.mT).to(z_MRX)
            loadings_MKS = at.token_rows().to(z_MRX) @ z_MRX.mT @ at.of_target(back_BRS)
            trace_M = (z_MRX * at.c.product(z_MRX).to(z_MRX)).sum((1, 2))
            one = at.estimate(layer, Summed(A_BSD, g.energy), loadings_MKS, A_BSD[:, :0], trace_M)
            error_B = g.gradients.square().sum(2).std(1) / samples**0.5
            found.append(one._replace(trace_error={layer: error_B}))
        return join_layers(found, net.layers)
