"""Which form of the kernel a layer gets: what the structure allows, once it has agreed with plain autograd."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.layers import hooked, layers_of
from fisher_vmap.anatomy.layout import Layout, lay_out, pack_rows, select
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.old_functions import modernised
from fisher_vmap.anatomy.placement import model_dtype, put_aside, saved_aside, weights_ready
from fisher_vmap.anatomy.recording import StructureChanged, run_blocks
from fisher_vmap.anatomy.rotary import batches_apart, forget_lengths, join_prompts
from fisher_vmap.anatomy.streams import Place
from fisher_vmap.outcomes import Wanted
from fisher_vmap.proofs.probe import Probe, excerpt, look_again_under_eager
from fisher_vmap.proofs.proof import chain_is_whole
from fisher_vmap.pullbacks.attention_interface import NAME, UnsupportedAttention, attention_set_to, prompts_packed
from fisher_vmap.pullbacks.quantized import quantized_linears
from fisher_vmap.scores import Scores
from fisher_vmap.upper_network.forms import layerwise, whole
from fisher_vmap.upper_network.forward import prove_top
from fisher_vmap.upper_network.model_parts import Parts
from fisher_vmap.upper_network.whole import hooked_outputs, rows_from_logits, with_biases

log = logging.getLogger(__name__)

KERNELS = ("auto", "layerwise", "whole", "loop")
FORMS = ("packed", "layerwise", "whole", "loop")  # fastest first; packed is layerwise on prompts laid end to end
CHECK_TOKENS = 64  # of each prompt that is compared with plain autograd
# Largest relative distance of a form's scores from plain autograd's in the same dtype; both round on their way down
# through the blocks, and a wrong chain is wrong by order one. Many models compute parts in float32 in any dtype, and
# kernels for quantised weights take another path, with other rounding, for a few rows than for many.
BUDGET = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


def choose_forms(model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], kernel: str) -> dict[str, str]:
    """The form for each layer, proven on this batch where it has not been before.

    Raises:
        ValueError: the kernel asked for by name cannot be trusted with one of the layers, or no form agrees with
            plain autograd.
    """
    places = layers_of(model).places
    new = [layer for layer in layers if (layer, kernel) not in known.forms]
    found = {layer: _by_structure(known, places, layer, kernel) for layer in new}
    unchecked, not_finite = set(found), set[str]()
    while unchecked:
        form = min((found[layer][0] for layer in unchecked), key=FORMS.index)
        group = [layer for layer in layers if layer in unchecked and found[layer][0] == form]
        wrong, compared = _compare(model, known, layout, group, form)
        if wrong is None:
            unchecked -= set(group)
            not_finite |= set() if compared else set(group)
            if form == "packed" and known.parts.top_places is None and not put_aside(model):
                _prove_top(model, known, layout)
            continue
        if form != "packed" and known.attention == NAME:
            log.info(
                "attention: eager, because under ours the %s kernel disagrees with plain autograd (%s)", form, wrong
            )
            look_again_under_eager(
                model, known, layout, f"under our attention {form} disagreed with plain autograd: {wrong}"
            )
            return choose_forms(model, known, layout, layers, kernel)
        if form == FORMS[-1] or (kernel != "auto" and form != "packed"):
            raise ValueError(
                f"the {form} kernel disagrees with plain autograd: {wrong}; try another `kernel`, or float32"
            )
        lower = FORMS[FORMS.index(form) + 1]
        level = logging.INFO if form == "packed" else logging.WARNING
        log.log(level, "the %s kernel disagrees with plain autograd (%s): using %s for %s", form, wrong, lower, group)
        found |= dict.fromkeys(group, (lower, f"{form} disagreed with plain autograd: {wrong}"))
    for layer, choice in found.items():
        if layer not in not_finite:  # what held for these prompts alone is not kept
            known.forms[layer, kernel] = choice
    return {layer: (found.get(layer) or known.forms[layer, kernel])[0] for layer in layers}


def _by_structure(known: Probe, places: Mapping[str, Place], layer: str, kernel: str) -> tuple[str, str]:
    """The best form that the structure allows for a layer, and the reason."""
    why_not = ""
    if layer not in known.parts.call_order:
        why_not = "the hooked module is not a decoder block"
    elif not places[layer].plain:
        why_not = "what the hooked block returns is not [B, T, D]"
    elif known.parts.head is None:
        why_not = known.why_no_head
    elif not chain_is_whole(known.reach, known.parts.call_order.index(layer)):
        why_not = "above the hook a block reaches back past its own input"
    if kernel == "layerwise" and why_not:
        raise ValueError(f"kernel layerwise cannot be trusted with {layer}: {why_not}; use kernel auto or whole")
    if kernel in ("whole", "loop"):
        return kernel, "asked for"
    if why_not:
        return "whole", why_not
    if not known.parts.why_not_packed:
        return "packed", "the chain of blocks is whole, and positions meet in our attention alone"
    return "layerwise", f"the chain of blocks is whole; not packed: {known.parts.why_not_packed}"


def run_form(
    form: str, model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted
) -> Scores:
    """The scores by the form of that name.

    A batch that cannot be packed (a prompt longer than an attention window) is padded instead, to the same result.
    """
    groups = batches_apart(model, layout.lengths)
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


def budget_of(model: nn.Module) -> float:
    """The distance that rounding accounts for."""
    return BUDGET[torch.bfloat16 if quantized_linears(model) else model_dtype(model)]


def _of_prompts(wanted: Wanted, prompts: list[int]) -> Wanted:
    token_ids = None if wanted.token_ids is None else wanted.token_ids[prompts]
    positions = wanted.positions[prompts] if isinstance(wanted.positions, Tensor) else wanted.positions
    probes = wanted.probes and wanted.probes._replace(seeds=[wanted.probes.seeds[b] for b in prompts])
    return replace(wanted, token_ids=token_ids, positions=positions, probes=probes)


def _compare(
    model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], form: str
) -> tuple[str | None, bool]:
    """None where a form agrees with plain autograd on an excerpt of the batch, else how it fails.

    And whether there were numbers to compare.
    """
    few = excerpt(layout, CHECK_TOKENS)
    try:
        with attention_set_to(model, known.attention):
            if form == "packed":
                few = _packable(model, known.parts, layout)
            found = run_form(form, model, known.parts, few, layers, Wanted(2, None, "all", None))
    except (StructureChanged, RuntimeError, NotImplementedError, TypeError, AttributeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        if form == FORMS[-1] and known.attention != NAME:
            raise _not_differentiable(model, layers, error) from error
        return _first_line(error), True
    compared = False
    for b, length in enumerate(few.lengths):
        forget_lengths(model)
        one = lay_out(few.input_ids[b : b + 1, :length], None)
        try:
            expected = plain_autograd(model, one, layers, found.token_ids[b])
        except (RuntimeError, NotImplementedError, TypeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            raise _not_differentiable(model, layers, error) from error
        for layer in layers:
            got, want = found.gradients[layer][b].double(), expected[layer].double().to(found.token_ids.device)
            if not bool(want.isfinite().all()):
                log.warning("the scores of a prompt are not finite under plain autograd: it could not be compared")
                continue
            compared = True
            distance = float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny))
            log.debug("%s at %s: %.1e from plain autograd", form, layer, distance)
            budget = budget_of(model)
            if not distance <= budget:
                return f"scores at {layer} are {distance:.1e} away, more than {budget:.0e}", True
    return None, compared


def _prove_top(model: nn.Module, known: Probe, layout: Layout) -> None:
    """Find out whether forwards may be cut at the last rows of the last block, on an excerpt of the batch."""
    with attention_set_to(model, known.attention):
        few = pack_rows(_packable(model, known.parts, layout))
        with prompts_packed(few):
            known.parts = replace(known.parts, top_places=prove_top(model, known.parts, few))


def _not_differentiable(model: nn.Module, layers: Sequence[str], error: Exception) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be differentiated with respect to the output of {', '.join(layers)}, not even "
        f"by plain autograd ({_first_line(error)}); hook another module, or give another model"
    )


def _packable(model: nn.Module, parts: Parts, layout: Layout) -> Layout:
    """An excerpt of the batch that can be packed: what were padded instead (a window is short) would prove nothing.

    Raises:
        StructureChanged: none can, however short.
    """
    tokens = CHECK_TOKENS
    while tokens >= 2:
        few = excerpt(layout, tokens)
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def plain_autograd(model: nn.Module, layout: Layout, layers: Sequence[str], token_ids: Tensor) -> Mapping[str, Tensor]:
    """Scores [K, D] of one unpadded prompt by the plainest means: the model's own attention, logits and backward."""
    modules = hooked(model, layers)
    run = rows_from_logits(model, layout, gather=False)
    with torch.enable_grad(), saved_aside(model):
        outputs = hooked_outputs(run, modules, layout)
        biases = {layer: x.new_zeros(1, 1, x.shape[-1]).requires_grad_() for layer, x in outputs.items()}
        rows = with_biases(run, modules)(biases)
        log_p_V = rows[0].to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(0)
        grads = [
            torch.autograd.grad(log_p_V[token], list(biases.values()), retain_graph=True)
            for token in token_ids.tolist()
        ]
    return {layer: torch.stack([g[i][0, 0] for g in grads]) for i, layer in enumerate(biases)}
