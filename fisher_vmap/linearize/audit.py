"""The audit: results compared with the model itself while it is in use.

A form is proven once, on a few prompts, and trusted afterwards. The audit finds what the proof did not cover and what
has changed since. It runs one prompt of a batch alone through the unchanged model and compares the log-probabilities.
From time to time, and whenever a batch is larger than any proven one, it compares a token's scores with plain autograd.
"""

import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.quantized import quantized_pullbacks
from fisher_vmap.linearize.compare import (
    budget_of,
    can_be_widened,
    deviations,
    distance_at,
    in_wide,
    measured_budget,
    noise_between,
)
from fisher_vmap.linearize.model_info import Choice, ModelInfo
from fisher_vmap.linearize.plain import Plain, Reference, first_line, plain_autograd, plain_log_probs, reference_of
from fisher_vmap.model.layers import decoder_blocks, hooked
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.validation import in_float64, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked

log = logging.getLogger(__name__)

SHARE = 0.01  # largest share of a batch's work for its audit; if it would take more, only some batches are audited
SCORE_SHARE = 0.02  # largest share of a shard's work for the audit of a score
ALONE = 3  # a prompt run alone takes this many times its share of a batch
MOST_APART = 64  # at least one batch, or shard, in this many is audited


class Plan(NamedTuple):
    """The prompts of a batch whose log-probabilities are compared, and those whose scores are."""

    log_probs: tuple[int, ...] = ()
    scores: tuple[int, ...] = ()


@dataclass
class Found:
    """The results for a batch at layers that share a form.

    Attributes:
        log_probs: [B, K].
        token_ids: [B, K] int64; negative entries are not single tokens.
        gradients: for each layer, [B, K, D].
        norms: for each layer, [B], the median norm of its output over the prompt's tokens.
        likeliest: whether the tokens should be the K likeliest.
    """

    log_probs: Tensor
    token_ids: Tensor
    gradients: dict[str, Tensor]
    norms: dict[str, Tensor]
    likeliest: bool


def plan_audit(
    model: nn.Module, known: ModelInfo, layout: Layout, forms: Mapping[str, Choice], vectors: int, audit: str
) -> Plan:
    """What to audit in a batch: depends on the batch and on the number of batches before it in the shard or process.

    `vectors` is K, the number of vectors pulled back; `audit` is "auto", "always" or "off".
    """
    B, rows, lengths = len(layout.lengths), sum(layout.lengths), layout.lengths
    packed = any(choice.form == "packed" for choice in forms.values())
    proven_length, proven_rows = (min(getattr(choice, at) for choice in forms.values()) for at in ("length", "rows"))
    hooked = is_hooked(model)
    further = max(lengths) > proven_length or (packed and rows > proven_rows)
    longer, more = max(lengths) > 2 * proven_length, packed and rows > 2 * proven_rows
    ends = {max(range(B), key=lambda b: lengths[b])} if longer or not more else set()
    furthest = tuple(sorted(ends | ({B - 1} if more or hooked else set())))  # the longest prompt, the last row, or both
    beyond = longer or more or (hooked and further)
    if audit == "off":
        return Plan((), furthest if beyond else ())
    calls = known.calls + 1
    mark = zlib.crc32(layout.input_ids.cpu().numpy().tobytes()) + calls  # so that a batch that comes again takes turns
    one = ((mark // MOST_APART) % B,)
    doubling = known.due is None and calls & (calls - 1) == 0
    scored = doubling or (calls == known.due and not known.scored) or audit == "always"
    # A hook may depend on the whole batch and may change unnoticed; padded results may depend on the padding's width.
    if (hooked and (beyond or scored)) or (beyond and not packed):
        return Plan(tuple(range(B)), furthest)
    if beyond or (scored and further and known.due is None):
        return Plan((), furthest)
    if scored:
        return Plan((), one)
    forward, _, work = _work(model, known, list(forms), vectors)
    share = ALONE * forward / (B * work)
    return Plan(one) if hooked or mark % _apart(share, SHARE) == 0 else Plan()


def _work(model: nn.Module, known: ModelInfo, layers: Sequence[str], vectors: int) -> tuple[int, int, int]:
    """Work per token of a forward, of plain autograd and of the batch, in passes of one row through one block."""
    order, blocks = list(known.parts.call_order), len(decoder_blocks(model))
    above = max(len(order) - 1 - order.index(layer) if layer in order else blocks for layer in layers)
    return blocks, blocks + above, blocks + above * (1 + vectors)


def _apart(share: float, most: float) -> int:
    """Audit one in this many, a power of two, so that the audit's share of the work is at most `most`."""
    return int(min(MOST_APART, 2 ** max(0, math.ceil(math.log2(share / most)))))


def due_batch(
    model: nn.Module,
    known: ModelInfo,
    layers: Sequence[str],
    vectors: int,
    number: int,
    batches: Sequence[Sequence[int]],
) -> int:
    """The batch of a shard, counted from 1, whose scores are audited unless an earlier batch's were; 0 means none.

    It is the last batch, which has the shortest prompts. The longest are audited when they are longer than any proven.
    `vectors` is K, `number` is the shard's, which decides whether it is audited, and `batches` are the prompt lengths
    of each batch, longest first.
    """
    _, score, work = _work(model, known, layers, vectors)
    tokens, last = sum(map(sum, batches)), batches[-1]
    share = ALONE * (sum(last) / len(last)) * score / (tokens * work)
    return len(batches) if zlib.crc32(str(number).encode()) % _apart(share, SCORE_SHARE) == 0 else 0


def remember_reach(known: ModelInfo, kernel: str, forms: Mapping[str, Choice], layout: Layout, plan: Plan) -> None:
    """Count a computed batch, and extend the proven length and rows of its forms to the scores that agreed."""
    known.calls += 1
    known.audits += bool(plan.scores or plan.log_probs)
    known.scored = known.scored or bool(plan.scores)
    longest = max((layout.lengths[b] for b in plan.scores), default=0)
    rows = sum(layout.lengths) if len(layout.lengths) - 1 in plan.scores else 0
    for layer, choice in forms.items():
        if (layer, kernel) in known.forms:
            reach = max(choice.length, longest), max(choice.rows, rows)
            known.forms[layer, kernel] = choice._replace(length=reach[0], rows=reach[1])


class ShardForms:
    """The forms of one shard of a run. Every shard starts from the forms chosen when the run was opened.

    So a shard's results depend neither on the process that computes it nor on the shards before it.
    """

    def __init__(self, known: ModelInfo) -> None:
        self._known = known
        self._before = dict(known.forms)
        self._changes = known.changes

    def begin(self) -> None:
        """Call before the first batch, also when the shard is computed again."""
        self._known.calls, self._known.audits, self._known.scored = 0, 0, False
        self._changes = self._known.changes

    def changed(self) -> bool:
        """Whether a form was given up since `begin`, which puts the earlier batches in doubt."""
        return self._known.changes != self._changes

    def given_up(self) -> dict[str, tuple[str, str]]:
        """For each layer whose form has changed since the run was opened: the new form, and why."""
        forms = self._known.forms.items()
        return {
            layer: (choice.form, choice.why)
            for (layer, kernel), choice in forms
            if (layer, kernel) in self._before and self._before[layer, kernel].key != choice.key
        }


@contextmanager
def one_shard(known: ModelInfo, due: int) -> Iterator[ShardForms]:
    """Compute the batches of one shard within the context; `due` is the number, from 1, of the batch to audit."""
    before = known.parts, known.why_no_head, known.forms, known.due
    known.forms, known.due = dict(known.forms), due
    try:
        yield ShardForms(known)
    finally:
        known.parts, known.why_no_head, known.forms, known.due = before


def why_wrong(model: nn.Module, known: ModelInfo, layout: Layout, found: Found, plan: Plan) -> dict[str, str]:
    """For each layer whose results disagree with the model, how. The model must be in the context `as_it_is`."""
    layers = list(found.gradients)
    for b in plan.log_probs:
        reference = reference_of(model, layout, b)
        wrong = _log_probs_wrong(model, known, reference, plain_log_probs(model, reference), found, b)
        if wrong is not None:
            return dict.fromkeys(layers, wrong)
    wrong_at: dict[str, str] = {}
    for b in plan.scores:
        wrong_at |= _scores_wrong(model, known, layout, found, b)
    return wrong_at


def _scores_wrong(model: nn.Module, known: ModelInfo, layout: Layout, found: Found, b: int) -> dict[str, str]:
    layers = list(found.gradients)
    reference = reference_of(model, layout, b)
    rank = _weightiest(found, b)
    token_1 = found.token_ids[b, rank : rank + 1]
    # A hooked module after the blocks, such as the unembedding, must run at all positions, as it did in the form.
    after_blocks = any(id(hook.module) in known.parts.above for hook in hooked(model, layers).values())
    gather = known.parts.gather and not is_hooked(model) and not after_blocks

    def plainly() -> Plain:
        # Some quantised layers have no backward, and autograd does not report it: use that of their matrix.
        with quantized_pullbacks(model):
            return plain_autograd(model, reference, layers, token_1, gather)

    reason = ""
    try:
        plain = plainly()
    except Exception as error:  # a user's hook may raise anything; plain autograd may need more memory than the kernel
        reason = "out of memory" if is_out_of_memory(error) else first_line(error)
    if reason:  # outside of the handler, whose traceback keeps the tensors of the failed pass alive
        level = logging.DEBUG if ("audit", reason) in known.logged else logging.WARNING
        log.log(level, "scores of prompts of %d tokens could not be audited: %s", layout.lengths[b], reason)
        known.logged.add(("audit", reason))
        plain = Plain(plain_log_probs(model, reference), {}, {})
    if (wrong := _log_probs_wrong(model, known, reference, plain.log_probs, found, b)) is not None:
        return dict.fromkeys(layers, wrong)
    wrong_at: dict[str, str] = {}
    measured: tuple[Plain, dict[str, float]] | None = None
    for layer, expected in plain.scores.items():
        got, norm = found.gradients[layer][b, rank : rank + 1], found.norms[layer][b]
        distance = distance_at(layer, got, norm, plain)
        allowed = budget_of(model, layer, known).scores
        if distance <= allowed or not bool(expected.isfinite().all()):
            continue
        if can_be_widened(model) and measured is None and (again := in_wide(model, plainly)) is not None:
            measured = again, noise_between([plain], [again], token_1[None])[0]
        if measured is not None:  # the noise of this prompt itself
            distance = distance_at(layer, got, norm, measured[0])
            allowed = measured_budget(known.arithmetic, measured[1][layer], 0.0).scores
        if not distance <= allowed:
            wrong_at[layer] = (
                f"the audit found the score of token {int(token_1)} of a prompt of {layout.lengths[b]} tokens "
                f"{distance:.1e} away from plain autograd, more than {allowed:.0e}"
            )
    return wrong_at


def _weightiest(found: Found, b: int) -> int:
    """The index of the token that contributes most to F: a score near zero would be mostly rounding."""
    first = next(iter(found.gradients.values()))
    p_K = in_float64(found.log_probs[b]).exp()
    weight_K = p_K * in_float64(first[b]).square().sum(1).to(p_K.device)
    weight_K = torch.where((found.token_ids[b] >= 0).to(weight_K.device), weight_K.nan_to_num(), -1.0)
    return int(weight_K.argmax())


def _log_probs_wrong(
    model: nn.Module, known: ModelInfo, reference: Reference, log_probs_V: Tensor, found: Found, b: int
) -> str | None:
    if bool(log_probs_V.isnan().any()):
        return None
    distance = _log_probs_distance(found, b, log_probs_V)
    layer = next(iter(found.gradients))
    allowed = budget_of(model, layer, known).log_probs
    if distance > allowed and can_be_widened(model):
        wide = in_wide(model, lambda: plain_log_probs(model, reference))
        if wide is not None:  # the noise of this prompt itself
            tokens = found.token_ids[b][found.token_ids[b] >= 0]
            noise = deviations(log_probs_V[tokens], wide, tokens)
            distance = _log_probs_distance(found, b, wide)
            allowed = measured_budget(known.arithmetic, 0.0, noise).log_probs
    if distance <= allowed:
        return None
    return (
        f"the audit found the log-probabilities of a prompt of {reference.layout.lengths[reference.b]} tokens "
        f"{distance:.1e} standard deviations away from the model's own, more than {allowed:.0e}"
    )


def _log_probs_distance(found: Found, b: int, log_probs_V: Tensor) -> float:
    """The largest distance of a log-probability, or by which a token left out is likelier than one that was taken."""
    tokens, log_probs_V = found.token_ids[b], log_probs_V.to(found.token_ids.device)
    real = tokens >= 0
    distance = deviations(found.log_probs[b][real], log_probs_V, tokens[real])
    if not found.likeliest:
        return distance
    others_V = log_probs_V.index_fill(0, tokens[real], -torch.inf)
    least, other = log_probs_V[tokens[real]].min(), others_V.max()
    if bool(other > least):
        finite_V = log_probs_V[log_probs_V.isfinite()]
        distance = max(distance, float((other - least) / in_float64(finite_V).std().clamp(min=1e-30)))
    if not bool(real.all()):
        rest, expected = found.log_probs[b][~real], others_V.logsumexp(0)
        scale = max(1.0, abs(float(expected)))
        distance = max(distance, float((rest[0] - expected).abs()) / scale if bool(expected.isfinite()) else 0.0)
    return distance
