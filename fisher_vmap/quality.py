"""How much of the whole vocabulary's Fisher matrix a stored low-rank matrix holds, from a few random vectors.

A remainder vector r has E[r r^T] = E, what the factor lacks of F = A^T A + E. So |r|^2 estimates tr E without bias, and
(r . r')^2 of two independent ones estimates |E|^2 in the Frobenius norm; what is known exactly (A) adds no noise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.decomposition import LowRank, float64_device


class Quality(NamedTuple):
    """Estimates for each prompt, [B] float64; NaN where too few random vectors were drawn for them.

    Attributes:
        trace_full: trace of the Fisher matrix of the whole vocabulary.
        trace_full_error: the standard error of that; needs two vectors.
        relative_error: |F - F_stored| / |F| in the Frobenius norm, F of the whole vocabulary and F_stored what is kept
            of it, cut to rank R; needs two vectors.
    """

    trace_full: Tensor
    trace_full_error: Tensor
    relative_error: Tensor


def quality(factor_BmD: Tensor, kept: LowRank, remainder_BSD: Tensor) -> Quality:
    """Estimate what a low-rank matrix lacks of the whole Fisher matrix.

    With T what the cut to rank R took away, |F - F_stored|^2 = |T|^2 + 2 tr(E T) + |E|^2.

    Args:
        factor_BmD: A.
        kept: A^T A cut to rank R.
        remainder_BSD: S random vectors with the second moment E.
    """
    place = float64_device(factor_BmD.device)
    A, r = (x.to(place, torch.float64) for x in (factor_BmD, remainder_BSD))
    S_BR, V_BRD = (x.to(place, torch.float64) for x in (kept.singular_values, kept.vectors))
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
