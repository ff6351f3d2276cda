"""A form of the kernel compared with plain autograd on an excerpt of a batch, before it is used.

How far may it be from plain autograd? As far as rounding explains. In float32 and float64 that is a small constant. In
a narrower format (bfloat16, float16) it is measured: the distance of plain autograd from its own result in float32,
from the same weights and on the same prompts. Another order of the same operations is about as far from float32.

A form in a narrow format is compared twice: in float32 from the same weights, which shows whether it computes the right
thing, and in its own format, where it may be a few times as far from float32 as plain autograd is.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.hf_attention import UnsupportedAttention, attention_set_to, noting_windows, prompts_packed
from fisher_vmap.kernels.quantized import quantized_linears
from fisher_vmap.linearize.linear_map import KernelOptions
from fisher_vmap.linearize.model_info import Choice, ModelInfo, Parts
from fisher_vmap.linearize.plain import (
    Plain,
    first_line,
    noting_autocast,
    plain_autograd,
    plain_log_probs,
    reference_of,
)
from fisher_vmap.linearize.probe import excerpt
from fisher_vmap.linearize.scores import Scores, Wanted, run_choice
from fisher_vmap.model.layout import Layout, pack_rows
from fisher_vmap.model.offload import is_offloaded, model_dtype
from fisher_vmap.model.recording import StructureChanged, run_blocks
from fisher_vmap.model.validation import float64_device, in_float64, is_our_fault, is_out_of_memory
from fisher_vmap.model.widening import NARROW, in_float32
from fisher_vmap.model.wrappers import is_hooked

log = logging.getLogger(__name__)

# Largest relative distance of scores. The float32 value is loose because many models compute parts in float32 in any
# dtype. Those of the narrow formats serve only where noise cannot be measured: kernels for quantised weights round
# differently for few rows than for many.
SCORES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
# Largest distance of log-probabilities, in standard deviations over the vocabulary.
LOG_PROBS = {torch.float64: 1e-5, torch.float32: 3e-4, torch.float16: 0.1, torch.bfloat16: 0.3}
FACTOR = 3  # a form may be this many times as far from float32 as plain autograd is
FLOOR = 4  # but is always allowed this many roundings (eps) of the format
TINY = torch.finfo(torch.float32).tiny
CHECK_TOKENS = 64  # tokens of each prompt that is compared with plain autograd
CHECK_TOP = 2  # how many of the likeliest tokens are compared


class Budget(NamedTuple):
    """The largest distances that rounding explains: of scores, relative; of log-probabilities, in deviations."""

    scores: float
    log_probs: float


def arithmetic(model: nn.Module, autocast: Collection[torch.dtype]) -> torch.dtype:
    """The narrowest format that a model computes in; `autocast` holds the formats its own forward casts to."""
    formats = {torch.bfloat16 if quantized_linears(model) else model_dtype(model), *autocast}
    return max(formats, key=lambda dtype: torch.finfo(dtype).eps)


def budget_of(model: nn.Module, layer: str, known: ModelInfo) -> Budget:
    """The budget at a layer, from the arithmetic and the noise found by the proof."""
    dtype = known.arithmetic
    if dtype in NARROW and layer in known.noise:
        return measured_budget(dtype, known.noise[layer], known.log_probs_noise)
    if dtype in NARROW and not quantized_linears(model) and model_dtype(model) not in NARROW:
        return measured_budget(dtype, 0.0, 0.0)  # the model's own autocast, whose noise cannot be measured
    return Budget(SCORES[dtype], LOG_PROBS[dtype])


def measured_budget(dtype: torch.dtype, scores: float, log_probs: float) -> Budget:
    """The budget where plain autograd in `dtype` is this far from float32."""
    least = FLOOR * torch.finfo(dtype).eps
    return Budget(max(least, FACTOR * scores), max(least, FACTOR * log_probs))


def can_be_widened(model: nn.Module) -> bool:
    """Whether the noise can be measured: the model computes in a narrow format and can compute in float32."""
    return model_dtype(model) in NARROW and not is_offloaded(model) and not quantized_linears(model)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    found, expected = in_float64(found), in_float64(expected).to(found.device)
    return float((found - expected).norm() / expected.norm().clamp(min=TINY))


def distance_at(layer: str, scores_KD: Tensor, norm: Tensor, plain: Plain) -> float:
    """The larger of two distances from plain autograd: of the scores, and of the norm of the layer's output."""
    expected = plain.norms[layer]
    return max(relative(scores_KD, plain.scores[layer]), abs(float(norm) - expected) / max(abs(expected), TINY))


def deviations(found_K: Tensor, log_probs_V: Tensor, token_ids_K: Tensor) -> float:
    """The largest distance of log-probabilities of tokens, in standard deviations over the vocabulary."""
    found_K, token_ids_K = in_float64(found_K), token_ids_K.to(float64_device(found_K.device))
    log_probs_V = in_float64(log_probs_V).to(found_K.device)
    expected_K = log_probs_V[token_ids_K]
    finite_V = log_probs_V[log_probs_V.isfinite()]
    spread = finite_V.std() if len(finite_V) > 1 else finite_V.new_ones(())
    gap_K = torch.where(found_K == expected_K, 0, (found_K - expected_K).abs())
    return float(gap_K.max() / spread.clamp(min=TINY))


def in_wide(model: nn.Module, compute: Callable[[], Any]) -> Any:
    """The result of a function while the model computes in float32; None if the model does not run in it."""
    try:
        with in_float32(model, keep=False):
            return compute()
    except (RuntimeError, TypeError, ValueError) as error:  # for example a hook with weights of its own
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        return None


def noise_between(
    narrow: Sequence[Plain], wide: Sequence[Plain], token_ids_BK: Tensor
) -> tuple[dict[str, float], float]:
    """The distance of plain autograd from float32: of the scores at each layer, and of the log-probabilities."""
    scores: dict[str, float] = {}
    log_probs = 0.0
    for one, other, token_ids_K in zip(narrow, wide, token_ids_BK, strict=True):
        for layer, expected in other.scores.items():
            scores[layer] = max(scores.get(layer, 0.0), relative(one.scores[layer], expected))
        log_probs = max(log_probs, deviations(one.log_probs[token_ids_K], other.log_probs, token_ids_K))
    return scores, log_probs


@dataclass
class Expected:
    """The results of plain autograd for two prompts of an excerpt.

    Attributes:
        few: the excerpt.
        prompts: which of its prompts are compared.
        token_ids: [B, 2] int64, the likeliest tokens; prompts that are not compared have those of the first one.
        plain: the results, one for each compared prompt.
        wide: the same in float32 from the same weights; None if the format is not narrow or this does not run.
        finite: whether all results are finite.
        arithmetic: the narrowest format used.
    """

    few: Layout
    prompts: list[int]
    token_ids: Tensor
    plain: list[Plain]
    wide: list[Plain] | None
    finite: bool
    arithmetic: torch.dtype


def expected_on(model: nn.Module, few: Layout, layers: Sequence[str]) -> Expected:
    """Plain autograd on an excerpt's longest and shortest prompt.

    Raises:
        ValueError: the model cannot be differentiated, or a user's hook does not work for these prompts.
    """
    order = sorted(range(len(few.lengths)), key=lambda b: few.lengths[b])
    prompts = sorted({order[0], order[-1]})
    references = [reference_of(model, few, b) for b in prompts]
    with noting_autocast() as autocast:
        log_probs = [plain_log_probs(model, reference) for reference in references]
    finite = all(bool(x.max().isfinite()) and not bool(x.isnan().any()) for x in log_probs)
    chosen = [x.nan_to_num(nan=-torch.inf).topk(min(CHECK_TOP, len(x))).indices.to(few.device) for x in log_probs]
    token_ids = torch.stack([chosen[prompts.index(b)] if b in prompts else chosen[0] for b in range(len(few.lengths))])

    def compute() -> list[Plain]:
        return [plain_autograd(model, r, layers, token_ids[b]) for r, b in zip(references, prompts, strict=True)]

    try:
        plain = compute()
    except Exception as error:  # a user's hook may raise anything
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot be differentiated with respect to the output of {', '.join(layers)}, not "
            f"even by plain autograd ({first_line(error)}); hook another module, or give another model"
        ) from error
    finite = finite and all(bool(x.isfinite().all()) for one in plain for x in one.scores.values())
    if not finite:
        log.warning("the scores of a prompt are not finite under plain autograd: they could not be compared")
    wide = in_wide(model, compute) if can_be_widened(model) else None
    if wide is None and can_be_widened(model):
        log.warning("plain autograd does not run in float32 here: the effect of rounding cannot be measured")
    return Expected(few, prompts, token_ids, plain, wide, finite, arithmetic(model, autocast))


def why_wrong(
    model: nn.Module, known: ModelInfo, expected: Expected, layers: Sequence[str], choice: Choice
) -> str | None:
    """How a form fails on the excerpt; None if it agrees. Stores the measured noise in `known`."""

    def run() -> Scores:
        wanted, options = Wanted(0, expected.token_ids), KernelOptions(precision="model")
        return run_choice(choice, model, known, expected.few, layers, wanted, options)

    try:
        found = run()
        wide = in_wide(model, run) if expected.wide is not None else None
    except Exception as error:  # a user's hook may raise anything
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        return first_line(error)
    if not expected.finite:
        return None
    dtype = known.arithmetic = expected.arithmetic
    if expected.wide is None:
        budgets = {layer: budget_of(model, layer, known) for layer in layers}
        return _distances(found, expected, expected.plain, layers, budgets, dtype)
    if wide is None:
        return "it does not run in float32, and plain autograd does"
    single = torch.float32
    structure = dict.fromkeys(layers, Budget(SCORES[single], LOG_PROBS[single]))
    if (wrong := _distances(wide, expected, expected.wide, layers, structure, single)) is not None:
        return wrong
    token_ids = expected.token_ids[expected.prompts]
    noise, log_probs_noise = noise_between(expected.plain, expected.wide, token_ids)
    known.noise |= {layer: max(noise[layer], known.noise.get(layer, 0.0)) for layer in layers}
    known.log_probs_noise = max(known.log_probs_noise, log_probs_noise)
    budgets = {layer: measured_budget(dtype, noise[layer], log_probs_noise) for layer in layers}
    return _distances(found, expected, expected.wide, layers, budgets, dtype)


def _distances(
    found: Scores,
    expected: Expected,
    plain: Sequence[Plain],
    layers: Sequence[str],
    budgets: dict[str, Budget],
    dtype: torch.dtype,
) -> str | None:
    name = str(dtype).removeprefix("torch.")
    for b, one in zip(expected.prompts, plain, strict=True):
        for layer in layers:
            distance = distance_at(layer, found.gradients[layer][b], found.residual_norm[layer][b], one)
            log.debug("%s: %.1e from plain autograd in %s", layer, distance, name)
            if not distance <= budgets[layer].scores:
                return f"scores at {layer} are {distance:.1e} away in {name}, more than {budgets[layer].scores:.0e}"
        budget = budgets[layers[0]].log_probs
        distance = deviations(found.log_probs[b], one.log_probs, found.token_ids[b])
        if not distance <= budget:
            return f"log-probabilities are {distance:.1e} deviations away in {name}, more than {budget:.0e}"
    return None


def excerpts_for(model: nn.Module, known: ModelInfo, layout: Layout, choice: Choice) -> list[Layout]:
    """Two short prompts of a batch, or the whole batch if the model has user's hooks, which may expect its shape.

    If a packed prompt is longer than an attention window, two that fit it as well: what passes between prompts where
    they meet reaches the last token of a short one only.

    Raises:
        StructureChanged: the form packs prompts, and these cannot be packed at any length.
    """
    if choice.form != "packed":
        return [layout if is_hooked(model) else excerpt(layout, CHECK_TOKENS)]
    parts = known.under(choice.attention).parts
    with attention_set_to(model, known.attention_of(choice)):
        with noting_windows() as windows:
            few = packable(model, parts, layout)
        within = excerpt(layout, max(2, min(windows))) if windows else few
        try:
            return [few] if within is few else [few, packable(model, parts, within)]
        except Exception as error:  # a user's hook may raise anything
            if is_out_of_memory(error) or is_our_fault(error):
                raise
            return [few]


def packable(model: nn.Module, parts: Parts, layout: Layout) -> Layout:
    """An excerpt of the batch that can be packed: one that had to be padded would not test packing.

    Raises:
        StructureChanged: the prompts cannot be packed at any length.
    """
    tokens = 2 * CHECK_TOKENS if is_hooked(model) else CHECK_TOKENS
    while tokens >= 2:
        few = layout if tokens > CHECK_TOKENS else excerpt(layout, tokens)
        packed = pack_rows(few)
        try:
            with prompts_packed(packed):
                run_blocks(model, parts.blocks, parts.call_order, packed)
        except UnsupportedAttention as reason:
            log.debug("prompts of %d tokens cannot be packed: %s", tokens, reason)
            tokens //= 2
        else:
            return few
    raise StructureChanged("no two prompts can be packed, however short")
