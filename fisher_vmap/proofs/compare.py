"""A form of the kernel compared with plain autograd on an excerpt of a batch, before its results count.

In a narrow format twice: in float32 from the same weights, which shows whether it computes the right thing, and as it
will be run, which may be as far from float32 as plain autograd itself is there.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.layout import Layout, pack_rows
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.recording import StructureChanged, run_blocks
from fisher_vmap.anatomy.user_hooks import is_hooked
from fisher_vmap.outcomes import Wanted
from fisher_vmap.proofs.distance import (
    LOG_PROBS,
    SCORES,
    Budget,
    arithmetic,
    budget_of,
    can_be_widened,
    deviations,
    distance_at,
    in_wide,
    measured_budget,
    noise_between,
)
from fisher_vmap.proofs.plain import Plain, first_line, noting_autocast, plain_autograd, plain_log_probs, reference_of
from fisher_vmap.proofs.probe import Choice, Probe, excerpt
from fisher_vmap.pullbacks.attention_interface import UnsupportedAttention, attention_set_to, prompts_packed
from fisher_vmap.scores import Scores
from fisher_vmap.upper_network.model_parts import Parts
from fisher_vmap.upper_network.run_form import run_form

log = logging.getLogger(__name__)

CHECK_TOKENS = 64  # of each prompt that is compared with plain autograd
CHECK_TOP = 2  # of the likeliest tokens


@dataclass
class Expected:
    """What plain autograd gives for two prompts of an excerpt.

    Attributes:
        few: the excerpt.
        prompts: which of its prompts.
        token_ids: [B, 2] int64, the likeliest tokens; of prompts that are not compared, the first one's.
        plain: for each of the prompts.
        wide: the same in float32 from the same weights; None where the format is not narrow, or that cannot be had.
        finite: whether all of it are numbers.
        arithmetic: the narrowest format that it was computed in.
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
        ValueError: the model cannot be differentiated, or a hook of the user does not work for these prompts.
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
    except Exception as error:  # a hook of the user may raise anything
        if is_out_of_memory(error):
            raise
        raise not_differentiable(model, layers, error) from error
    finite = finite and all(bool(x.isfinite().all()) for one in plain for x in one.scores.values())
    if not finite:
        log.warning("the scores of a prompt are not finite under plain autograd: it could not be compared")
    wide = in_wide(model, compute) if can_be_widened(model) else None
    if wide is None and can_be_widened(model):
        log.warning("plain autograd does not run in float32 here: what rounding accounts for cannot be measured")
    return Expected(few, prompts, token_ids, plain, wide, finite, arithmetic(model, autocast))


def not_differentiable(model: nn.Module, layers: Sequence[str], error: Exception) -> ValueError:
    """The error of a model that plain autograd cannot differentiate."""
    return ValueError(
        f"{type(model).__name__} cannot be differentiated with respect to the output of {', '.join(layers)}, not even "
        f"by plain autograd ({first_line(error)}); hook another module, or give another model"
    )


def run_choice(
    choice: Choice, model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    """The scores of a batch by a form, under the attention that it goes with."""
    with attention_set_to(model, attention_of(choice, known)):
        parts = known.under(choice.attention).parts
        return run_form(choice.form, choice.prompts, model, parts, layout, layers, wanted)


def attention_of(choice: Choice, known: Probe) -> str | None:
    """The attention implementation that a form runs under; None: the model's own."""
    return None if choice.attention == "own" else known.under(choice.attention).attention


def why_wrong(model: nn.Module, known: Probe, expected: Expected, layers: Sequence[str], choice: Choice) -> str | None:
    """How a form fails on the excerpt; None where it agrees. What was measured of the noise is kept."""

    def run() -> Scores:
        return run_choice(choice, model, known, expected.few, layers, Wanted(0, expected.token_ids, "all", None))

    try:
        found = run()
        wide = in_wide(model, run) if expected.wide is not None else None
    except Exception as error:  # a hook of the user may raise anything
        if is_out_of_memory(error):
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


def excerpt_for(model: nn.Module, known: Probe, layout: Layout, choice: Choice) -> Layout:
    """Two short prompts of a batch; of a hooked model all of it as it is, for hooks may be made for its shape.

    Raises:
        StructureChanged: the form packs prompts, and none of these can be packed, however short.
    """
    if choice.form == "packed":
        with attention_set_to(model, attention_of(choice, known)):
            return packable(model, known.under(choice.attention).parts, layout)
    return layout if is_hooked(model) else excerpt(layout, CHECK_TOKENS)


def packable(model: nn.Module, parts: Parts, layout: Layout) -> Layout:
    """An excerpt of the batch that can be packed: what were padded instead (a window is short) would prove nothing.

    Raises:
        StructureChanged: none can, however short.
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
