"""Singular values and vectors of F = A^T A from its factor A, [K, D], and estimates of what the low-rank matrix lacks.

`compress` never forms F. F is D x D but has rank at most K, and K is small. Its nonzero singular values are those of
the K x K Gram matrix A A^T, so the whole batch is decomposed by one small batched SVD on the device.

`quality` compares the low-rank matrix with the Fisher matrix of the whole vocabulary, F = A^T A + E, from a few random
vectors r with E[r r^T] = E: |r|^2 estimates tr E without bias, and (r . r')^2 of two independent ones estimates |E|^2
in the Frobenius norm. A is known exactly and adds no noise.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.validation import check_tensor, check_whole, float64_device, in_float64

TOGETHER = 2**25  # most elements of the factors that are decomposed in one batch


class LowRank(NamedTuple):
    """The leading part of F = A^T A for each prompt: F ~ vectors^T diag(singular_values) vectors.

    F is symmetric and positive semi-definite, so its left and right singular vectors are the same.

    Attributes:
        singular_values: [B, R] float32, not increasing; the eigenvalues of F, nats^2 per squared unit of the stream.
        vectors: [B, R, D] float32, the singular vectors as rows. The first `rank` are orthonormal, the others zero.
            The entry of largest magnitude of each row is positive.
        left_vectors: [B, K, R] float32, the Q of A = Q diag(sqrt S) V: the share of each token in each direction.
        rank: [B] int64, the number of singular values above K eps S_1; the others are zero.
        trace: [B] float32, the trace of F before it was truncated to R.
    """

    singular_values: Tensor
    vectors: Tensor
    left_vectors: Tensor
    rank: Tensor
    trace: Tensor


@autocast_off()
def compress(factor_BKD: Tensor, rank: int) -> LowRank:
    """The thin SVD A = Q Sigma V of each prompt's factor, truncated to `rank`: S = Sigma^2 belongs to F = A^T A.

    A A^T = Q Sigma^2 Q^T is decomposed in float64, where squaring loses no accuracy visible in float32, and
    V = Sigma^-1 Q^T A. A prompt whose factor is not finite gets NaN and rank 0.

    Args:
        factor_BKD: [B, K, D], any floating dtype. F = A^T A, so row t of A is sqrt(p_t) times the score of token t.
        rank: R, how many singular values to keep. It may exceed K; values and vectors beyond the numerical rank are
            zero.

    Returns:
        LowRank, on the device of the factor; float32 (float64 for a float64 factor).

    Raises:
        ValueError: the factor is not three-dimensional or the rank is not positive.
    """
    check_tensor("the factor", factor_BKD, "[B, K, D]")
    if factor_BKD.dim() != 3:
        raise ValueError(
            f"the factor has shape {tuple(factor_BKD.shape)}; expected [B, K, D]: unsqueeze a single prompt"
        )
    check_whole("rank", rank, 1)
    device, (_, K, D) = factor_BKD.device, factor_BKD.shape
    out_dtype = torch.promote_types(factor_BKD.dtype, torch.float32)
    resolution = torch.finfo(out_dtype).eps
    finite_B = factor_BKD.isfinite().flatten(1).all(1)

    A_BKD = in_float64(torch.where(finite_B[:, None, None], factor_BKD, 0))
    Q_BKK, S_BK = _gram_svd(A_BKD)
    rank_B = (K * resolution * S_BK[:, :1] < S_BK).sum(1)

    R = min(rank, K, D)
    kept_BR = torch.arange(R, device=S_BK.device) < rank_B[:, None]
    S_BR = torch.where(kept_BR, S_BK[:, :R], 0)
    Q_BKR = torch.where(kept_BR[:, None, :], Q_BKK[:, :, :R], 0)
    inverse_sigma_BR = torch.where(kept_BR, S_BR, 1).rsqrt()
    V_BRD = _orthonormal_again(inverse_sigma_BR[:, :, None] * (Q_BKR.mT @ A_BKD))

    # The SVD does not fix the sign of each pair (column of Q, row of V): make the largest entry of V positive.
    largest_BR1 = V_BRD.abs().argmax(2, keepdim=True)
    sign_BR = 1 - 2 * (V_BRD.gather(2, largest_BR1).squeeze(2) < 0).to(V_BRD.dtype)
    V_BRD, Q_BKR = sign_BR[:, :, None] * V_BRD, sign_BR[:, None, :] * Q_BKR

    missing = rank - R
    S_BR = torch.nn.functional.pad(S_BR, (0, missing))
    V_BRD = torch.nn.functional.pad(V_BRD, (0, 0, 0, missing))
    Q_BKR = torch.nn.functional.pad(Q_BKR, (0, missing))
    finite_on_B = finite_B.to(S_BR.device)
    S_BR, trace_B = S_BR.where(finite_on_B[:, None], torch.nan), S_BK.sum(1).where(finite_on_B, torch.nan)
    V_BRD, Q_BKR = (x.where(finite_on_B[:, None, None], torch.nan) for x in (V_BRD, Q_BKR))
    return LowRank(
        singular_values=S_BR.to(out_dtype).to(device),
        vectors=V_BRD.to(out_dtype).to(device),
        left_vectors=Q_BKR.to(out_dtype).to(device),
        rank=torch.where(finite_on_B, rank_B, 0).to(device),
        trace=trace_B.to(out_dtype).to(device),
    )


def compress_layers(factors: Mapping[str, Tensor], rank: int) -> dict[str, LowRank]:
    """`compress` of several layers' factors, [B, K, D] each: those of the same shape together, as memory allows."""
    together: dict[tuple[object, ...], list[str]] = {}
    for layer, factor in factors.items():
        together.setdefault((factor.shape, factor.dtype, factor.device), []).append(layer)
    found: dict[str, LowRank] = {}
    for alike in together.values():
        count = max(1, TOGETHER // max(1, factors[alike[0]].numel()))
        for layers in (alike[i : i + count] for i in range(0, len(alike), count)):
            low_rank = compress(torch.cat([factors[layer] for layer in layers]), rank)
            pieces = (field.chunk(len(layers)) for field in low_rank)
            found |= {layer: LowRank(*piece) for layer, piece in zip(layers, zip(*pieces, strict=True), strict=True)}
    return {layer: found[layer] for layer in factors}


def _gram_svd(A_BKD: Tensor) -> tuple[Tensor, Tensor]:
    """Q, [B, K, K], and Sigma^2, [B, K], of A = Q Sigma V, by the SVD of the Gram matrix."""
    scale_B = A_BKD.abs().amax((1, 2)).clamp(min=torch.finfo(A_BKD.dtype).tiny)  # squares neither under- nor overflow
    A_BKD = A_BKD / scale_B[:, None, None]
    Q_BKK, S_BK, _ = torch.linalg.svd(A_BKD @ A_BKD.mT)
    return Q_BKK, S_BK * scale_B[:, None] ** 2


def _orthonormal_again(V_BRD: Tensor) -> Tensor:
    """Two Newton-Schulz steps towards V (V V^T)^(-1/2): each squares the error; zero rows stay zero."""
    for _ in range(2):
        V_BRD = 1.5 * V_BRD - 0.5 * (V_BRD @ V_BRD.mT) @ V_BRD
    return V_BRD


class Quality(NamedTuple):
    """Estimates for each prompt, [B] float64; NaN if there are too few random vectors for them.

    Attributes:
        trace_full: trace of the Fisher matrix of the whole vocabulary.
        trace_full_error: its standard error; needs two vectors.
        relative_error: |F - F_stored| / |F| in the Frobenius norm, with F of the whole vocabulary and F_stored the
            stored matrix of rank R; needs two vectors.
    """

    trace_full: Tensor
    trace_full_error: Tensor
    relative_error: Tensor


def quality(factor_BmD: Tensor, kept: LowRank, remainder_BSD: Tensor) -> Quality:
    """Estimate how far a low-rank matrix is from the Fisher matrix of the whole vocabulary.

    With T = A^T A - F_stored, the part removed by the cut to rank R, |F - F_stored|^2 = |T|^2 + 2 tr(E T) + |E|^2.

    Args:
        factor_BmD: [B, m, D], A.
        kept: A^T A cut to rank R.
        remainder_BSD: [B, S, D], S random vectors with the second moment E.
    """
    place = float64_device(factor_BmD.device)
    A, r = (in_float64(x) for x in (factor_BmD, remainder_BSD))
    S_BR, V_BRD = (in_float64(x) for x in (kept.singular_values, kept.vectors))
    B, S = r.shape[:2]
    nan_B = torch.full((B,), torch.nan, dtype=torch.float64, device=place)
    if not S:
        return Quality(nan_B, nan_B, nan_B)
    energy_BS = r.square().sum(2)
    trace_B = A.square().sum((1, 2)) + energy_BS.mean(1)
    if S == 1:
        return Quality(trace_B, nan_B, nan_B)
    standard_error_B = energy_BS.std(1) / S**0.5
    along_BS = (r @ A.mT).square().sum(2)  # r^T A^T A r
    kept_BS = ((r @ V_BRD.mT).square() * S_BR[:, None]).sum(2)
    pairs = torch.ones(S, S, dtype=torch.bool, device=place).triu(1)
    rest_B = (r @ r.mT).square()[:, pairs].mean(1)
    gram_B = (A @ A.mT).square().sum((1, 2))
    cut_B = (gram_B - S_BR.square().sum(1)).clamp(min=0)
    missing_B = cut_B + 2 * (along_BS - kept_BS).mean(1) + rest_B
    whole_B = gram_B + 2 * along_BS.mean(1) + rest_B
    return Quality(trace_B, standard_error_B, (missing_B.clamp(min=0) / whole_B).sqrt())
