"""How far numbers may be from plain autograd's: what rounding accounts for, measured where it can be.

In float32 and float64 it is a small number. In a narrower format plain autograd itself is so far from what it gives in
float32, from the same weights, on the same prompts; numbers of another order of operations are about as far.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import model_dtype, put_aside
from fisher_vmap.anatomy.widening import NARROW, in_float32
from fisher_vmap.proofs.plain import Plain
from fisher_vmap.proofs.probe import Probe
from fisher_vmap.pullbacks.quantized import quantized_linears

# Largest relative distance of scores. Many models compute parts in float32 in any dtype. Of a narrow format only where
# it cannot be measured: kernels for quantised weights round another way for a few rows than for many.
SCORES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
# Of log-probabilities, in standard deviations over the vocabulary.
LOG_PROBS = {torch.float64: 1e-5, torch.float32: 3e-4, torch.float16: 0.1, torch.bfloat16: 0.3}
FACTOR = 3  # times the distance of plain autograd from float32
FLOOR = 4  # roundings of the format
TINY = torch.finfo(torch.float32).tiny


class Budget(NamedTuple):
    """The largest distances that rounding accounts for: of scores, relative; of log-probabilities, in deviations."""

    scores: float
    log_probs: float


def arithmetic(model: nn.Module, autocast: Collection[torch.dtype]) -> torch.dtype:
    """The narrowest format that a model computes in, whose forward casts to these formats by itself."""
    formats = {torch.bfloat16 if quantized_linears(model) else model_dtype(model), *autocast}
    return max(formats, key=lambda dtype: torch.finfo(dtype).eps)


def budget_of(model: nn.Module, layer: str, known: Probe) -> Budget:
    """What is allowed at a layer, by the arithmetic and the noise that the proof has found."""
    dtype = known.arithmetic
    if dtype in NARROW and layer in known.noise:
        return measured_budget(dtype, known.noise[layer], known.log_probs_noise)
    if dtype in NARROW and not quantized_linears(model) and model_dtype(model) not in NARROW:
        return measured_budget(dtype, 0.0, 0.0)  # under autocast of its own, whose noise cannot be measured
    return Budget(SCORES[dtype], LOG_PROBS[dtype])


def measured_budget(dtype: torch.dtype, scores: float, log_probs: float) -> Budget:
    """What is allowed where plain autograd in `dtype` is so far from float32."""
    least = FLOOR * torch.finfo(dtype).eps
    return Budget(max(least, FACTOR * scores), max(least, FACTOR * log_probs))


def can_be_widened(model: nn.Module) -> bool:
    """Whether the noise can be measured: the model computes in a narrow format, and could in float32."""
    return model_dtype(model) in NARROW and not put_aside(model) and not quantized_linears(model)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    found, expected = found.double(), expected.double().to(found.device)
    return float((found - expected).norm() / expected.norm().clamp(min=TINY))


def distance_at(layer: str, scores_KD: Tensor, norm: Tensor, plain: Plain) -> float:
    """How far scores, and the mean norm of the layer's output, are from plain autograd's: the larger distance."""
    expected = plain.norms[layer]
    return max(relative(scores_KD, plain.scores[layer]), abs(float(norm) - expected) / max(abs(expected), TINY))


def deviations(found_K: Tensor, log_probs_V: Tensor, token_ids_K: Tensor) -> float:
    """The largest distance of log-probabilities of tokens, in standard deviations over the vocabulary."""
    log_probs_V = log_probs_V.double().to(found_K.device)
    expected_K = log_probs_V[token_ids_K]
    finite_V = log_probs_V[log_probs_V.isfinite()]
    spread = finite_V.std() if len(finite_V) > 1 else finite_V.new_ones(())
    gap_K = torch.where(found_K.double() == expected_K, 0, (found_K.double() - expected_K).abs())
    return float(gap_K.max() / spread.clamp(min=TINY))


def in_wide(model: nn.Module, compute: Callable[[], Any]) -> Any:
    """What a function gives while the model computes in float32; None where the model does not run so."""
    try:
        with in_float32(model, keep=False):
            return compute()
    except (RuntimeError, TypeError, ValueError) as error:  # a hook with weights of its own, say
        if is_out_of_memory(error):
            raise
        return None


def noise_between(
    narrow: Sequence[Plain], wide: Sequence[Plain], token_ids_BK: Tensor
) -> tuple[dict[str, float], float]:
    """How far plain autograd is from float32: of the scores at each layer, and of the log-probabilities."""
    scores: dict[str, float] = {}
    log_probs = 0.0
    for one, other, token_ids_K in zip(narrow, wide, token_ids_BK, strict=True):
        for layer, expected in other.scores.items():
            scores[layer] = max(scores.get(layer, 0.0), relative(one.scores[layer], expected))
        log_probs = max(log_probs, deviations(one.log_probs[token_ids_K], other.log_probs, token_ids_K))
    return scores, log_probs
