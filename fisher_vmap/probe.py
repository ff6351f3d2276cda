"""Which form of the kernel a model may be trusted with: a structural proof, then a comparison with plain autograd.

Both are made once for a model object and remembered for as long as it lives.
"""

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisher_vmap import attention_interface
from fisher_vmap.attention_interface import (
    UnsupportedAttention,
    attention_set_to,
    noting_odd_masks,
    prompts_packed,
    supports_ours,
)
from fisher_vmap.blocks import decoder_blocks
from fisher_vmap.forms import Parts, Wanted, layerwise, whole
from fisher_vmap.fused import Forward, fused_forward
from fisher_vmap.layout import Layout, lay_out, pack_rows
from fisher_vmap.proof import Reach, block_reach, chain_is_whole
from fisher_vmap.recording import StructureChanged
from fisher_vmap.scores import Scores
from fisher_vmap.tail import watch
from fisher_vmap.whole import hooked_outputs, rows_from_logits, with_biases

log = logging.getLogger(__name__)

KERNELS = ("auto", "layerwise", "whole", "loop")
FORMS = ("packed", "layerwise", "whole", "loop")  # fastest first; packed is layerwise on prompts laid end to end
CHECK_TOKENS = 64  # of each prompt that is compared with plain autograd
# Largest relative distance of a form's scores from plain autograd's in the same dtype; both round on their way down
# through the blocks, and a wrong chain is wrong by order one. Many models compute parts in float32 in any dtype.
BUDGET = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.3}


@dataclass
class Probe:
    """What is known of one model.

    Attributes:
        parts: its blocks, their order and its head.
        reach: the structural proof.
        attention: the attention implementation that the forms run under.
        why_no_head: why the head could not be taken apart; empty where it could.
        forms: the form chosen for each (layer, kernel asked for), and why.
    """

    parts: Parts
    reach: Reach
    attention: str | None
    why_no_head: str
    forms: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)


_PROBES: weakref.WeakKeyDictionary[nn.Module, Probe] = weakref.WeakKeyDictionary()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def probe(model: nn.Module, layout: Layout) -> Probe:
    """What is known of the model; found out at the first call with a few tokens of the batch."""
    found = _PROBES.get(model)
    if found is None:
        found = _PROBES[model] = _look(model, _excerpt(layout, tokens=8).input_ids)
    return found


def _look(model: nn.Module, input_ids: Tensor) -> Probe:
    blocks = decoder_blocks(model)
    attention = _attention_for(model)
    why_not_packed = "the model does not run under our attention"
    if attention == attention_interface.NAME:
        try:
            with attention_set_to(model, attention), noting_odd_masks() as odd:
                watched = watch(model, blocks, input_ids)
            why_not_packed = odd[0] if odd else ""
        except UnsupportedAttention as reason:
            log.info("attention: eager, because %s", reason)
            attention = "eager"
    if attention != attention_interface.NAME:
        with attention_set_to(model, attention):
            watched = watch(model, blocks, input_ids)
    parts = Parts(blocks, tuple(watched.call_order), watched.head, watched.vocabulary, why_not_packed, _fused(blocks))
    with attention_set_to(model, attention):
        reach = block_reach(model, blocks, input_ids)
    return Probe(parts, reach, attention, watched.why_not)


def _fused(blocks: Mapping[str, nn.Module]) -> list[tuple[nn.Module, Forward]]:
    """The modules inside the blocks that have a fused pullback."""
    inside = {id(module): module for block in blocks.values() for module in block.modules()}
    return [(module, forward) for module in inside.values() if (forward := fused_forward(module)) is not None]


def layer_widths(model: nn.Module, layers: Sequence[str]) -> dict[str, int]:
    """D of each hooked module, by running the model on two tokens.

    Raises:
        ValueError: a module's output is not [B, T, D], or it is not called.
    """
    device = next(model.parameters()).device
    layout = lay_out(torch.zeros(1, 2, dtype=torch.int64, device=device), None)
    modules = {layer: model.get_submodule(layer) for layer in layers}
    with torch.no_grad(), undisturbed(model):
        outputs = hooked_outputs(rows_from_logits(model, layout), modules, layout)
    return {layer: hidden.shape[-1] for layer, hidden in outputs.items()}


def _attention_for(model: nn.Module) -> str | None:
    if supports_ours(model):
        return attention_interface.NAME
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return "eager" if current is not None else None


def choose_forms(model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], kernel: str) -> dict[str, str]:
    """The form for each layer, proven on this batch where it has not been before.

    Raises:
        ValueError: the kernel asked for by name cannot be trusted with one of the layers, or no form agrees with
            plain autograd.
    """
    unknown = [layer for layer in layers if (layer, kernel) not in known.forms]
    for layer in unknown:
        known.forms[layer, kernel] = _by_structure(known, layer, kernel)
    while unchecked := [layer for layer in unknown if known.forms[layer, kernel][0] in FORMS]:
        form = min((known.forms[layer, kernel][0] for layer in unchecked), key=FORMS.index)
        group = [layer for layer in unchecked if known.forms[layer, kernel][0] == form]
        wrong = _compare(model, known, layout, group, form)
        if wrong is None:
            unknown = [layer for layer in unknown if layer not in group]
            continue
        if form == FORMS[-1] or (kernel != "auto" and form != "packed"):
            for layer in group:
                del known.forms[layer, kernel]
            raise ValueError(
                f"the {form} kernel disagrees with plain autograd: {wrong}; try another `kernel`, or float32"
            )
        lower = FORMS[FORMS.index(form) + 1]
        level = logging.INFO if form == "packed" else logging.WARNING
        log.log(level, "the %s kernel disagrees with plain autograd (%s): using %s for %s", form, wrong, lower, group)
        for layer in group:
            known.forms[layer, kernel] = (lower, f"{form} disagreed with plain autograd: {wrong}")
    return {layer: known.forms[layer, kernel][0] for layer in layers}


def _by_structure(known: Probe, layer: str, kernel: str) -> tuple[str, str]:
    """The best form that the structure allows for a layer, and the reason."""
    why_not = ""
    if layer not in known.parts.call_order:
        why_not = "the hooked module is not a decoder block"
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
    if form == "packed":
        try:
            packed = pack_rows(layout)
            with prompts_packed(packed):
                return layerwise(model, parts, packed, layers, wanted)
        except UnsupportedAttention as reason:
            log.debug("a batch is padded, not packed: %s", reason)
    if form in ("packed", "layerwise"):
        return layerwise(model, parts, layout, layers, wanted)
    return whole(model, parts, layout, layers, wanted, loop=form == "loop")


def _excerpt(layout: Layout, tokens: int) -> Layout:
    """Two short prompts of unequal length out of a batch: its shortest and its longest, cut to a few tokens."""
    order = sorted(layout.ranges(), key=lambda r: r[0] - r[1])
    longest, shortest = (layout.input_ids.flatten()[a : min(z, a + tokens)] for a, z in (order[0], order[-1]))
    if len(shortest) == len(longest) and len(shortest) > 1:
        shortest = shortest[: (len(shortest) + 1) // 2]
    mask = torch.zeros(2, len(longest), dtype=torch.int64, device=longest.device)
    mask[0], mask[1, : len(shortest)] = 1, 1
    return lay_out(torch.stack([longest, torch.nn.functional.pad(shortest, (0, len(longest) - len(shortest)))]), mask)


def _compare(model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], form: str) -> str | None:
    """None where a form agrees with plain autograd on an excerpt of the batch, else how it fails."""
    excerpt = _excerpt(layout, CHECK_TOKENS)
    try:
        with attention_set_to(model, known.attention):
            found = run_form(form, model, known.parts, excerpt, layers, Wanted(2, None, "all", None))
    except (StructureChanged, RuntimeError, NotImplementedError, TypeError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    for b, length in enumerate(excerpt.lengths):
        one = lay_out(excerpt.input_ids[b : b + 1, :length], None)
        expected = plain_autograd(model, one, layers, found.token_ids[b])
        for layer in layers:
            got, want = found.gradients[layer][b].double(), expected[layer].double().to(found.token_ids.device)
            if not bool(want.isfinite().all()):
                log.warning("the scores of a prompt are not finite under plain autograd: it could not be compared")
                continue
            distance = float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny))
            log.debug("%s at %s: %.1e from plain autograd", form, layer, distance)
            budget = BUDGET[next(p.dtype for p in model.parameters() if p.is_floating_point())]
            if not distance <= budget:
                return f"scores at {layer} are {distance:.1e} away, more than {budget:.0e}"
    return None


def plain_autograd(model: nn.Module, layout: Layout, layers: Sequence[str], token_ids: Tensor) -> Mapping[str, Tensor]:
    """Scores [K, D] of one unpadded prompt by the plainest means: the model's own attention, logits and backward."""
    modules = {layer: model.get_submodule(layer) for layer in layers}
    run = rows_from_logits(model, layout)
    with torch.enable_grad():
        outputs = hooked_outputs(run, modules, layout)
        biases = {layer: torch.zeros_like(x[:, :1]).requires_grad_() for layer, x in outputs.items()}
        rows = with_biases(run, modules)(biases)
        log_p_V = rows[0].to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(0)
        grads = [
            torch.autograd.grad(log_p_V[token], list(biases.values()), retain_graph=True)
            for token in token_ids.tolist()
        ]
    return {layer: torch.stack([g[i][0, 0] for g in grads]) for i, layer in enumerate(biases)}
