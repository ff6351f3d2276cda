"""`ModelInfo`: what is known of a model, such as its parts, the form chosen for each layer, and the proven sizes.

`probe` finds it out once; it is kept as long as the model lives.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fisher_vmap.kernels.decoder_block import Forward, Rules
from fisher_vmap.kernels.hf_attention import NAME
from fisher_vmap.model.head import UnembeddingHead
from fisher_vmap.model.patches import OldFunction
from fisher_vmap.model.wrappers import has_hooks

Places = frozenset[tuple[Any, ...]]
"""Paths (keys and indices, outermost first) to the arguments of a call that have a row for each position."""

Reach = list[set[int]]
"""For each block call, and last for the logits: the block calls whose output it can reach directly."""


@dataclass(frozen=True)
class Parts:
    """The parts of a model, and how each may be computed.

    Attributes:
        blocks: the decoder blocks by name.
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart; None if only the model itself can compute its logits.
        vocabulary: V, the number of logits.
        why_not_packed: why prompts cannot be packed end to end; empty if no reason is known.
        gather: whether everything after the output embedding treats positions independently.
        above: the ids of the modules that return after the last block: the final norm, the model itself.
        fused: modules inside the blocks that have a fused pullback, each with the forward that provides it.
        rules: the blocks that have a rule for their whole pullback on packed prompts.
        old_functions: the model's autograd functions that `torch.func` cannot transform unchanged.
        top_places: the last block's arguments that have a row for each position; None: running its forward at the
            last rows alone is not proven.
        no_rule: for each block without a rule, why, if prompts can be packed.
        not_cut: why the last block's forward is not run at the last rows alone; empty if not tried.
        not_narrow: for each block that was tried at some rows only, why it needs all of them; empty if it does not.
    """

    blocks: Mapping[str, nn.Module]
    call_order: Sequence[str]
    head: UnembeddingHead | None
    vocabulary: int
    why_not_packed: str
    gather: bool
    above: frozenset[int]
    fused: Sequence[tuple[nn.Module, Forward]]
    rules: Rules
    old_functions: Sequence[OldFunction]
    top_places: Places | None = None
    no_rule: Mapping[str, str] = field(default_factory=dict)
    not_cut: str = ""
    not_narrow: dict[str, str] = field(default_factory=dict)


class Choice(NamedTuple):
    """How the scores at a layer are computed, and the sizes for which that is proven.

    Attributes:
        form: "packed", "layerwise", "whole" or "loop".
        attention: "ours", "plain" (transformers' eager, or the model's own), or "own".
        prompts: "together", "alone" (one at a time) or "given" (laid out as in the caller's tensor).
        why: the reason for this choice.
        length: tokens of the longest prompt that it was proven on.
        rows: tokens of the largest packed batch that it was proven on.
    """

    form: str
    attention: str
    prompts: str
    why: str
    length: int = 0
    rows: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """The computation alone, without reason and proven sizes."""
        return self.form, self.attention, self.prompts


@dataclass
class ModelInfo:
    """What is known of one model.

    Attributes:
        parts: its blocks, their order and its head.
        reach: which block outputs reach which: the proof of structure.
        attention: the attention implementation that the forms run under.
        why_no_head: why the head could not be taken apart; empty if it could.
        made_of: the signature of the model when it was probed.
        finite: whether all values seen were finite; if not, the findings hold for one batch only.
        forms: the form chosen for each (layer, kernel asked for).
        adjoint: each (layer, form) whose forward derivatives were found adjoint to its backward ones.
        plain: the same under an attention other than ours; None: not probed, or this is it.
        arithmetic: the narrowest format that it was found to compute in.
        noise: for each layer where it was measured, the relative distance of scores that rounding explains.
        log_probs_noise: the same for log-probabilities, in standard deviations over the vocabulary.
        calls: how many batches have been computed.
        audits: how many of them were compared with the unchanged model or with plain autograd, and agreed.
        due: in a run, the batch of the shard whose scores are audited, or 0; None: outside runs, where batches 1, 2, 4,
            8, ... of the process are audited.
        scored: whether scores of the shard, or of the process, have been audited.
        changes: how often a chosen form was given up.
        logged: the messages that have been logged.
    """

    parts: Parts
    reach: Reach
    attention: str | None
    why_no_head: str
    made_of: int
    finite: bool
    forms: dict[tuple[str, str], Choice] = field(default_factory=dict)
    adjoint: set[tuple[str, tuple[str, str, str]]] = field(default_factory=set)
    plain: "ModelInfo | None" = None
    arithmetic: torch.dtype = torch.float32
    noise: dict[str, float] = field(default_factory=dict)
    log_probs_noise: float = 0.0
    calls: int = 0
    audits: int = 0
    due: int | None = None
    scored: bool = False
    changes: int = 0
    logged: set[tuple[str, str]] = field(default_factory=set)

    def under(self, attention: str) -> "ModelInfo":
        """What is known under "ours", or under "plain": the model's own attention, or transformers' eager."""
        return self if attention == "ours" or self.plain is None else self.plain

    def attention_of(self, choice: Choice) -> str | None:
        """The attention implementation that a form runs under; None: the model's own."""
        return None if choice.attention == "own" else self.under(choice.attention).attention

    def note(self, log: logging.Logger, what: str, line: str) -> None:
        """Log why a slower path is taken, at level INFO once for each kind, then DEBUG."""
        log.log(logging.DEBUG if (what, "") in self.logged else logging.INFO, line)
        self.logged.add((what, ""))

    def ran(self, layer: str, kernel: str) -> dict[str, str] | None:
        """How a layer is computed, in words; None if it has not been computed."""
        if (layer, kernel) not in self.forms:
            return None
        choice = self.forms[layer, kernel]
        parts = self.under(choice.attention).parts
        rules, last_block = "none: prompts are not packed", "not by itself"
        if choice.form == "packed":
            rules, last_block = _rules(parts, layer), _last_block(parts, layer)
        elif choice.form == "layerwise" and self.attention_of(choice) == NAME:
            last_block = "not needed" if layer == parts.call_order[-1] else "at the last row in the pullback alone"
        elif choice.form == "layerwise":
            last_block = "at all positions"
        return {
            "form": choice.form,
            "why": choice.why,
            "attention": self.attention_of(choice) or "the model's own",
            "prompts": {"alone": "one at a time", "given": "as the batch was given"}.get(choice.prompts, "together"),
            "rules": rules,
            "last_block": last_block,
            "rows": self._rows(choice, layer),
            "audit": f"{self.audits} of {self.calls} batches compared, and they agreed",
        }

    def _rows(self, choice: Choice, layer: str) -> str:
        """The rows that are pulled back, in words: from the first of the bias to the last target, or all."""
        if choice.form not in ("packed", "layerwise"):
            return f"all: the form is {choice.form}"
        if self.attention_of(choice) != NAME:
            return "all: the attention is not ours"
        parts = self.under(choice.attention).parts
        above = parts.call_order[parts.call_order.index(layer) + 1 :]
        whole = {name: why for name in above if (why := parts.not_narrow.get(name))}
        if not whole:
            return "live rows only"
        name, why = next(iter(whole.items()))
        return f"all in {len(whole)} of {len(set(above))} blocks: {name}: {why}"


def _rules(parts: Parts, layer: str) -> str:
    """Which blocks above a layer are pulled back by a rule, and why others are not; the last block never is."""
    above = list(dict.fromkeys(parts.call_order[parts.call_order.index(layer) + 1 : -1]))
    left = {name: parts.no_rule.get(name, "not proven") for name in above if parts.blocks[name] not in parts.rules}
    left |= {name: "it has a hook" for name in above if has_hooks(parts.blocks[name])}
    text = f"{len(above) - len(left)} of {len(above)} blocks by rule"
    reasons = [f"{name}: {why}" for name, why in left.items()]
    text = "; not ".join([text, *reasons[:3]]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    ruled = [parts.rules[parts.blocks[name]] for name in above if name not in left]
    by_autograd = Counter(f"{part} by autograd: {why}" for rule in ruled for part, why in rule.by_autograd().items())
    return "; ".join([text, *(f"in {count} of them {line}" for line, count in by_autograd.items())])


def _last_block(parts: Parts, layer: str) -> str:
    """At which positions the last block is run and pulled back, in words."""
    if layer == parts.call_order[-1]:
        return "not needed"
    if parts.top_places is not None:
        return "at the last row, in forward and pullback"
    return "at the last row in the pullback alone" + (f": {parts.not_cut}" if parts.not_cut else "")
