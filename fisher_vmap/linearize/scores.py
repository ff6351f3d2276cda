"""The scores of a batch's outcomes: the K likeliest tokens and, if asked for, "any other token".

Outcomes that cover the whole vocabulary obey sum p g = 0. So with "any other token" as an outcome, one score follows
from the others and no more vectors are pulled back than without it. That one is the likeliest outcome, because the
rounding errors of the others are divided by its probability.

`opened` opens the linear map of a batch in one of four forms:

packed      layerwise, on prompts laid end to end
layerwise   one block at a time
whole       everything above the hooked modules in one piece
loop        K backward passes of plain autograd
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.hf_attention import UnsupportedAttention
from fisher_vmap.linearize.blockwise import Blockwise
from fisher_vmap.linearize.linear_map import Derived, KernelOptions, LinearMap
from fisher_vmap.linearize.model_info import Choice, ModelInfo
from fisher_vmap.linearize.output import Asked, Probes, Reading, distribution
from fisher_vmap.linearize.whole import Loop, Whole
from fisher_vmap.model.layout import Layout, as_given, pack_rows, select
from fisher_vmap.model.rope_scaling import batches_apart
from fisher_vmap.model.targets import NO_TOKEN, TargetGrid, Targets, grid_of, target_seeds, targets_read
from fisher_vmap.model.wrappers import has_hooks

log = logging.getLogger(__name__)

Record = TypeVar("Record", bound=NamedTuple)

REST = -1  # the token id of "any other token"
FIELD_ELEMENTS = 2**27  # most numbers of the cotangents at all rows that are pulled back in one pass


def groups_of(choice: Choice, model: nn.Module, layout: Layout) -> list[tuple[list[int], Layout]]:
    """The groups of prompts that a form computes together, and the layout of each."""
    every = list(range(len(layout.lengths)))
    if choice.prompts == "given":
        return [(every, as_given(layout))]
    groups = [[b] for b in every] if choice.prompts == "alone" else batches_apart(model, layout.lengths)
    return [(group, select(layout, group)) for group in groups]


@contextmanager
def opened(
    choice: Choice,
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    options: KernelOptions,
    *,
    vectors: int | None = None,
) -> Iterator[LinearMap]:
    """The linear map of a padded layout in a form; within the context the model is prepared for its products.

    A batch that cannot be packed (a prompt is longer than an attention window) is padded, with the same result.
    `vectors` announces a single pull, of so many, and no push.
    """
    parts, attention = known.under(choice.attention).parts, known.attention_of(choice)
    # The rule of a block does not include hooks on the block or inside it.
    rules = {block: rule for block, rule in parts.rules.items() if not has_hooks(block)}
    parts = parts if len(rules) == len(parts.rules) else replace(parts, rules=rules)

    def made(kind: type[LinearMap], laid_out: Layout) -> LinearMap:
        net = kind(model, parts, attention, laid_out, layers, options, vectors=vectors)
        net.note = partial(known.note, log)
        return net

    with ExitStack() as stack:
        if choice.form == "packed":
            net = made(Blockwise, pack_rows(layout))
            try:
                with ExitStack() as tried:
                    tried.enter_context(net.prepared())
                    net.open()
                    stack.push(tried.pop_all())
            except UnsupportedAttention as reason:
                known.note(log, "padded", f"a batch is padded, not packed: {reason}")
            else:
                yield net
                return
        kinds: dict[str, type[LinearMap]] = {"whole": Whole, "loop": Loop}
        net = made(kinds.get(choice.form, Blockwise), layout)
        stack.enter_context(net.prepared())
        net.open()
        yield net


class Scores(NamedTuple):
    """Scores g_t = d log p_t / d theta of the K likeliest next tokens, theta a bias on the residual stream.

    float32, or float64 where the model is float64. log p is in nats, scores in nats per unit of residual stream.

    With several targets a prompt the outcomes of all its m targets stand one after the other: K is m times the number
    of tokens, outcome j K / m + t is token t at target j, and a prompt with fewer targets than others is padded with
    log p = -inf, token id -2 and gradient 0. F = sum p g g^T holds as before.

    Attributes:
        log_probs: [B, K], highest first at each target.
        token_ids: [B, K] int64.
        gradients: for each hooked layer, [B, K, D].
        position_energy: for each hooked layer, [B, T] in the caller's columns: sum_t p_t |g_t at this position|^2.
        residual_norm: for each hooked layer, [B]: the median norm of its output over the prompt's tokens.
        remainder: for each hooked layer, [B, S, D]: S random vectors r, as many as were asked for, with E[r r^T] = the
            Fisher matrix of the whole vocabulary minus that of the K tokens.
        targets: the positions whose next-token distribution was read: columns, log p of the next token and entropy.
    """

    log_probs: Tensor
    token_ids: Tensor
    gradients: dict[str, Tensor]
    position_energy: dict[str, Tensor]
    residual_norm: dict[str, Tensor]
    remainder: dict[str, Tensor]
    targets: Targets

    def factor(self, layer: str | None = None) -> Tensor:
        """A = diag(sqrt p) G, [B, K, D]: the Fisher matrix of each prompt is A^T A.

        Args:
            layer: the name of a hooked layer; may be left out if there is only one.

        Raises:
            ValueError: the layer was not hooked, or it was left out and there are several.
        """
        if layer is None and len(self.gradients) == 1:
            layer = next(iter(self.gradients))
        if layer not in self.gradients:
            raise ValueError(f"layer {layer!r} has no scores here; expected one of {list(self.gradients)}")
        return torch.exp(self.log_probs / 2)[:, :, None] * self.gradients[layer]


@dataclass(frozen=True)
class Wanted:
    """The outcomes asked for.

    Attributes:
        top_k: the number of likeliest tokens.
        token_ids: [B, m K], tokens chosen by the caller for each of m targets; None: the likeliest.
        include_rest: whether "any other token" is an outcome as well.
        probes: random vectors for the part of the Fisher matrix that the outcomes leave out, with a seed a prompt;
            None: none.
        most_targets: m, the most targets of a prompt.
    """

    top_k: int
    token_ids: Tensor | None = None
    include_rest: bool = False
    probes: Probes | None = None
    most_targets: int = 1

    @property
    def vectors(self) -> int:
        """How many cotangents are pulled back."""
        tokens = self.top_k * self.most_targets if self.token_ids is None else self.token_ids.shape[1]
        return tokens + (0 if self.probes is None else self.probes.vectors)

    def of_prompts(self, prompts: Sequence[int]) -> "Wanted":
        """The same for some prompts of the batch."""
        token_ids = None if self.token_ids is None else self.token_ids[list(prompts)]
        probes = self.probes and self.probes._replace(seeds=[self.probes.seeds[b] for b in prompts])
        return replace(self, token_ids=token_ids, probes=probes)


class Outcomes(NamedTuple):
    """O outcomes of each prompt, and the C cotangents from which their scores follow.

    Attributes:
        log_probs: [B, O].
        token_ids: [B, O]; the last one is `REST` if included.
        cotangents: [C, B, X]: those of all outcomes except the derived one, then the random vectors.
        derived: [B], the index of the outcome that is not pulled back; None: all are pulled back.
    """

    log_probs: Tensor
    token_ids: Tensor
    cotangents: Tensor
    derived: Tensor | None

    @property
    def pulled(self) -> Tensor:
        """[B, n] int64, the outcomes that are pulled back."""
        B, O = self.log_probs.shape
        if self.derived is None:
            return torch.arange(O, device=self.log_probs.device).expand(B, O)
        others = torch.arange(O - 1, device=self.log_probs.device)
        return others + (others >= self.derived[:, None])

    def weights(self) -> Tensor:
        """[B, C]: the probability of each outcome that is pulled back; 0 for random vectors."""
        p_Bn = self.log_probs.exp().gather(1, self.pulled)
        return torch.nn.functional.pad(p_Bn, (0, len(self.cotangents) - p_Bn.shape[1]))

    def derivation(self) -> Derived | None:
        """The derived score as a combination of the others, and its probability; None if there is none."""
        if self.derived is None:
            return None
        p_B = self.log_probs.gather(1, self.derived[:, None])[:, 0].exp()
        return Derived(-self.weights() / p_B[:, None], p_B)

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
        combination_BC = derivation.combination.to(gradients)
        derived_B1D = torch.einsum("bc,bcd->bd", combination_BC, pulled_BCD)[:, None]
        at_B1D = self.derived.to(gradients.device)[:, None, None].expand_as(derived_B1D)
        return scores_BOD.scatter_(1, at_B1D, derived_B1D), random


def outcomes_of(reading: Reading, include_rest: bool) -> Outcomes:
    """The outcomes of a reading."""
    log_probs, token_ids, cotangents_KBX, derived = reading.log_probs, reading.token_ids, reading.cotangents, None
    if include_rest:
        log_probs = torch.cat([log_probs, reading.log_rest[:, None]], 1)
        token_ids = torch.cat([token_ids, torch.full_like(token_ids[:, :1], REST)], 1)
        derived = log_probs.argmax(1)
        every_OBX = torch.cat([cotangents_KBX, reading.rest])
        pulled = Outcomes(log_probs, token_ids, every_OBX, derived).pulled
        cotangents_KBX = every_OBX.gather(0, pulled.T[:, :, None].expand(-1, -1, every_OBX.shape[2]))
    if len(reading.random):
        cotangents_KBX = torch.cat([cotangents_KBX, reading.random])
    return Outcomes(log_probs, token_ids, cotangents_KBX, derived)


def scores_of(net: LinearMap, wanted: Wanted) -> Scores:
    """The scores from an open linear map: one pull, or several if there are many targets."""
    layout = net.layout
    grid = grid_of(layout, wanted.most_targets)
    probes = wanted.probes and wanted.probes._replace(seeds=target_seeds(layout, grid, wanted.probes.seeds))
    token_ids = wanted.token_ids
    if token_ids is not None:  # [B, m K] -> [M, K]
        token_ids = token_ids.view(*grid.shape, -1)[list(grid.prompts), list(grid.ranks)]
    c = distribution(net.head, net.rows, Asked(wanted.top_k, token_ids, wanted.include_rest, probes, True))
    targets = targets_read(layout, grid, c.log_probs, c.probs)
    if wanted.most_targets == 1:
        outcomes = outcomes_of(c.reading, wanted.include_rest)
        found = net.pull(outcomes.cotangents.transpose(0, 1), None, outcomes.weights(), outcomes.derivation())
        scores = {layer: outcomes.scores(found[layer].gradients) for layer in net.layers}
        log_probs, token_ids = outcomes.log_probs, outcomes.token_ids
        energy = {layer: found[layer].energy for layer in net.layers}
    else:
        log_probs, token_ids, scores, energy = _of_several(net, c.reading, grid)
    device = layout.device
    return Scores(
        log_probs.to(device),
        token_ids.to(device),
        {layer: gradients for layer, (gradients, _) in scores.items()},
        energy,
        net.residual_norm,
        {layer: random for layer, (_, random) in scores.items()},
        targets,
    )


def _of_several(
    net: LinearMap, reading: Reading, grid: TargetGrid
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Log p and ids of the outcomes of several targets, [B, m K]; each layer's scores and random vectors; its energy.

    A field of cotangents is one token's at one target of each prompt, and zero at the others.
    """
    K, M, X = reading.cotangents.shape
    m = grid.shape[1]
    log_p_BO = grid.spread(reading.log_probs, -torch.inf).flatten(1)
    token_ids_BO = grid.spread(reading.token_ids, NO_TOKEN).flatten(1)
    cotangents_MKX = reading.cotangents.transpose(0, 1)
    together = targets_together(K, max(net.layout.input_ids.numel(), M), X)
    gradients: dict[str, list[Tensor]] = {layer: [] for layer in net.layers}
    energy: dict[str, Tensor] = {}
    for first in range(0, m, together):
        stop = min(m, first + together)
        fields = cotangents_MKX.new_zeros(M, stop - first, K, X)
        for i in grid.with_ranks(first, stop):
            fields[i, grid.ranks[i] - first] = cotangents_MKX[i]
        weights_BK = log_p_BO[:, first * K : stop * K].exp()
        fields = fields.flatten(1, 2)
        if stop == m:
            fields = torch.cat([fields, reading.random.transpose(0, 1)], 1)
            weights_BK = torch.nn.functional.pad(weights_BK, (0, len(reading.random)))
        for layer, found in net.pull(fields, None, weights_BK).items():
            gradients[layer].append(found.gradients)
            energy[layer] = energy[layer] + found.energy if layer in energy else found.energy
    joined = {layer: torch.cat(parts, 1) for layer, parts in gradients.items()}
    return log_p_BO, token_ids_BO, {layer: (g[:, : m * K], g[:, m * K :]) for layer, g in joined.items()}, energy


def targets_together(tokens: int, rows: int, width: int) -> int:
    """How many targets of a prompt are pulled back in one pass, of so many tokens each."""
    return max(1, FIELD_ELEMENTS // (tokens * rows * width))


def run_choice(
    choice: Choice,
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    wanted: Wanted,
    options: KernelOptions,
) -> Scores:
    """The scores of a padded batch in one form."""
    parts, groups = [], groups_of(choice, model, layout)
    vectors = wanted.vectors if wanted.most_targets == 1 else None  # several targets may take several pulls
    for group, together in groups:
        with opened(choice, model, known, together, layers, options, vectors=vectors) as net:
            parts.append(scores_of(net, wanted.of_prompts(group)))
    return join_prompts(parts, [group for group, _ in groups])


def join_prompts(parts: list[Record], groups: list[list[int]]) -> Record:
    """The record of a batch from those of its groups: its tensors, one row per prompt, in the order of the batch."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([b for group in groups for b in group], device="cpu").argsort()

    def joined(pieces: Any) -> Any:
        if isinstance(pieces[0], dict):
            return {layer: joined([piece[layer] for piece in pieces]) for layer in pieces[0]}
        if isinstance(pieces[0], Targets):
            return Targets(*(joined(fields) for fields in zip(*pieces, strict=True)))
        return torch.cat(pieces)[order.to(pieces[0].device)]

    return type(parts[0])(*(joined(pieces) for pieces in zip(*parts, strict=True)))
