"""A batch's scores by the form of a name: its prompts together, one at a time, or as the caller's tensor has them."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from fisher_vmap.anatomy.layout import Layout, as_given, pack_rows, select
from fisher_vmap.anatomy.old_functions import modernised
from fisher_vmap.anatomy.placement import weights_ready
from fisher_vmap.anatomy.rotary import batches_apart, forget_lengths, join_prompts
from fisher_vmap.outcomes import Wanted
from fisher_vmap.pullbacks.attention_interface import UnsupportedAttention, prompts_packed
from fisher_vmap.scores import Scores
from fisher_vmap.upper_network.forms import layerwise, whole
from fisher_vmap.upper_network.model_parts import Parts

log = logging.getLogger(__name__)


def run_form(
    form: str, prompts: str, model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    """The scores by a form.

    A batch that cannot be packed (a prompt longer than an attention window) is padded instead, to the same result.

    Args:
        form: "packed", "layerwise", "whole" or "loop".
        prompts: "together", "alone" (one at a time) or "given" (as the caller's tensor has them).
        model: a causal LM.
        parts: of it.
        layout: the batch, padded.
        layers: names of hooked modules.
        wanted: what is asked of the batch.
    """
    if prompts == "given":
        forget_lengths(model)
        with modernised(() if form == "loop" else parts.old_functions):
            return _run_together(form, model, parts, as_given(layout), layers, wanted)
    groups = [[b] for b in range(len(layout.lengths))] if prompts == "alone" else batches_apart(model, layout.lengths)
    parts_of = []
    for group in groups:
        forget_lengths(model)
        together = select(layout, group)
        with modernised(() if form == "loop" else parts.old_functions):
            parts_of.append(_run_together(form, model, parts, together, layers, _of_prompts(wanted, group)))
    return join_prompts(parts_of, groups)


def _run_together(
    form: str, model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    if form == "packed":
        try:
            packed = pack_rows(layout)
            with prompts_packed(packed):
                return layerwise(model, parts, packed, layers, wanted)
        except UnsupportedAttention as reason:
            log.debug("a batch is padded, not packed: %s", reason)
    if form in ("packed", "layerwise"):
        return layerwise(model, parts, layout, layers, wanted)
    with weights_ready(model):
        return whole(model, parts, layout, layers, wanted, loop=form == "loop")


def _of_prompts(wanted: Wanted, prompts: list[int]) -> Wanted:
    token_ids = None if wanted.token_ids is None else wanted.token_ids[prompts]
    positions = wanted.positions[prompts] if isinstance(wanted.positions, Tensor) else wanted.positions
    probes = wanted.probes and wanted.probes._replace(seeds=[wanted.probes.seeds[b] for b in prompts])
    return replace(wanted, token_ids=token_ids, positions=positions, probes=probes)
