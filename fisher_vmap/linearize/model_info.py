"""What is known of a model: its parts, how it may be computed, and how far that is proven.

`probe` finds it out once; it lives as long as the model.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fisher_vmap.kernels.decoder_block import Forward, Rules
from fisher_vmap.model.head import UnembeddingHead
from fisher_vmap.model.patches import OldFunction
from fisher_vmap.model.wrappers import has_hooks

Places = frozenset[tuple[Any, ...]]
"""Where among a call's arguments tensors have a row for each position: keys and indices from the outside in."""

Reach = list[set[int]]
"""For each block call, and last for the logits: the block calls whose output it can reach directly."""


@dataclass(frozen=True)
class Parts:
    """What there is in a model, and what may be done with it.

    Attributes:
        blocks: the decoder blocks by name.
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart; None where only the model itself can make its logits.
        vocabulary: V, the number of logits.
        why_not_packed: why prompts cannot be packed end to end; empty where nothing is known to speak against it.
        gather: whether what follows the output embedding looks at each position alone.
        above: the ids of the modules that return after the last block has: the final norm, the model itself.
        fused: modules inside the blocks that have a fused pullback, with the forward that has it.
        rules: blocks that are pulled back as a whole by hand, where prompts are packed.
        old_functions: the model's autograd functions that torch.func cannot transform as they are.
        top_places: where the last block's arguments have a row for each position; None: it is not known to be right
            if its forward is cut at the last rows.
        no_rule: for each block that is not pulled back by hand, why, where prompts can be packed.
        not_cut: why the last block's forward is not cut; empty where that has not been looked at.
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


class Choice(NamedTuple):
    """How the scores at a layer are computed, and how far that is proven.

    Attributes:
        form: "packed", "layerwise", "whole" or "loop".
        attention: "ours", "plain" (transformers' eager, or the model's own), or "own".
        prompts: "together", "alone" (one at a time) or "given" (as the caller's tensor has them).
        why: this one.
        length: of the longest prompt that it was proven on.
        rows: of the largest packed batch that it was proven on.
    """

    form: str
    attention: str
    prompts: str
    why: str
    length: int = 0
    rows: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """What is run."""
        return self.form, self.attention, self.prompts


@dataclass
class ModelInfo:
    """What is known of one model.

    Attributes:
        parts: its blocks, their order and its head.
        reach: the structural proof.
        attention: the attention implementation that the forms run under.
        why_no_head: why the head could not be taken apart; empty where it could.
        made_of: the signature of the model that was looked at.
        finite: whether what was seen were numbers; else it holds for one batch alone.
        forms: the form chosen for each (layer, kernel asked for), and why.
        adjoint: the (layer, form) whose forward derivatives have been found adjoint to the backward ones.
        plain: what is known of the model under an attention other than ours; None: not looked at, or this is it.
        arithmetic: the narrowest format that it was found to compute in.
        noise: for each layer, the relative distance that rounding accounts for, where it was measured.
        log_probs_noise: the same of log-probabilities, in standard deviations over the vocabulary.
        calls: how many batches have been computed.
        audits: how many of them were compared with the model as it is, or with plain autograd, and agreed.
        due: the batch of a run's shard whose scores are audited, or 0; None: of a process, those numbered 1, 2, 4, ...
        scored: whether a score of the shard, or of the process, has been audited.
        changes: how often a form was given up after it had been chosen.
        told: the changes that have been told.
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
    told: set[tuple[str, str]] = field(default_factory=set)

    def under(self, attention: str) -> "ModelInfo":
        """What is known under "ours", or "plain": the model's own attention, or transformers' eager in its place."""
        return self if attention == "ours" or self.plain is None else self.plain

    def note(self, log: logging.Logger, what: str, line: str) -> None:
        """Log a way that was not taken, once for each kind."""
        log.log(logging.DEBUG if (what, "") in self.told else logging.INFO, line)
        self.told.add((what, ""))

    def ran(self, layer: str, kernel: str) -> dict[str, str] | None:
        """How a layer is computed, in words; None where it has not been."""
        if (layer, kernel) not in self.forms:
            return None
        choice = self.forms[layer, kernel]
        parts = self.under(choice.attention).parts
        blockwise = choice.form in ("packed", "layerwise")
        return {
            "form": choice.form,
            "why": choice.why,
            "attention": "the model's own"
            if choice.attention == "own"
            else self.under(choice.attention).attention or "the model's own",
            "prompts": {"alone": "one at a time", "given": "as the batch was given"}.get(choice.prompts, "together"),
            "rules": _rules(parts, layer) if choice.form == "packed" else "none: prompts are not packed",
            "last_block": _last_block(parts, layer)
            if choice.form == "packed"
            else ("at all positions" if blockwise else "not by itself"),
            "audit": f"{self.audits} of {self.calls} batches compared, and they agreed",
        }


def _rules(parts: Parts, layer: str) -> str:
    """Which blocks above a layer are pulled back by hand, and why others are not; the last block never is."""
    above = list(dict.fromkeys(parts.call_order[parts.call_order.index(layer) + 1 : -1]))
    left = {name: parts.no_rule.get(name, "not proven") for name in above if parts.blocks[name] not in parts.rules}
    left |= {name: "it has a hook" for name in above if has_hooks(parts.blocks[name])}
    text = f"{len(above) - len(left)} of {len(above)} blocks by hand"
    reasons = [f"{name}: {why}" for name, why in left.items()]
    return "; not ".join([text, *reasons[:3]]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")


def _last_block(parts: Parts, layer: str) -> str:
    """What is run and pulled back of the last block."""
    if layer == parts.call_order[-1]:
        return "not needed"
    if parts.top_places is not None:
        return "at the last row, in forward and pullback"
    return "at the last row in the pullback alone" + (f": {parts.not_cut}" if parts.not_cut else "")
