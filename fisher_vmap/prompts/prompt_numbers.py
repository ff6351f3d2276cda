"""From a batch's estimate to each prompt's low-rank matrices, as arrays on the CPU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisher_vmap.decomposition import LowRank, compress_layers
from fisher_vmap.estimators import Estimate
from fisher_vmap.quality import quality
from fisher_vmap.storage.records import LayerResult


class PromptNumbers(NamedTuple):
    """One prompt's results as arrays on the CPU: token_ids [K], log_probs [K], and each layer's low-rank matrix.

    `reason` says what is wrong with them, where they are not finite; else it is None.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    layers: dict[str, LayerResult]
    reason: str | None


def numbers_of(found: Estimate, lengths: Sequence[int], rank: int) -> list[PromptNumbers]:
    """Compress a batch's factors, all layers in one batch.

    Args:
        found: the batch's estimate.
        lengths: the number of tokens of each prompt, which stand on the left of the position energy's columns.
        rank: R, singular values kept.
    """
    token_ids, log_probs = found.token_ids.cpu().numpy(), _numpy(found.log_probs)
    low_ranks = compress_layers(found.factors, rank)
    arrays = {layer: _layer_arrays(found, layer, low_rank) for layer, low_rank in low_ranks.items()}
    numbers = []
    for b, length in enumerate(lengths):
        layers = {
            layer: LayerResult(S[b], V[b], Q[b], float(norm[b]), energy[b, :length], *(float(x[b]) for x in rest))
            for layer, (S, V, Q, norm, energy, *rest) in arrays.items()
        }
        numbers.append(PromptNumbers(token_ids[b], log_probs[b], layers, _not_finite(log_probs[b], layers)))
    return numbers


def _layer_arrays(found: Estimate, layer: str, low: LowRank) -> tuple[np.ndarray, ...]:
    """S, V, Q, residual norm, position energy, and then the numbers of a `LayerResult` in their order."""
    how_good = quality(found.factors[layer], low, found.remainder[layer])
    Q_BKR = low.left_vectors
    if layer in found.loadings:
        Q_BKR = found.loadings[layer].to(Q_BKR) @ Q_BKR
    parts = (low.singular_values, low.vectors, Q_BKR, found.residual_norm[layer], found.position_energy[layer])
    return tuple(_numpy(x) for x in (*parts, low.trace, *how_good))


def _numpy(x: Tensor) -> np.ndarray:
    return x.to("cpu", torch.float32).numpy()


def _not_finite(log_probs: np.ndarray, layers: dict[str, LayerResult]) -> str | None:
    if np.isnan(log_probs).any() or not np.isfinite(log_probs[:1]).all():  # a banned token has probability 0
        return "the logits are not finite"
    for layer, result in layers.items():
        if not (np.isfinite(result.S).all() and np.isfinite(result.V).all()):
            return f"the scores at {layer} are not finite"
    return None
