"""Selects the form of the kernel for each layer: the fastest the structure allows that agrees with plain autograd."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import dropwhile

from torch import nn

from fisher_vmap.kernels.hf_attention import NAME, UnsupportedAttention, attention_set_to, prompts_packed
from fisher_vmap.linearize.blockwise import prove_top
from fisher_vmap.linearize.compare import Expected, excerpts_for, expected_on, packable, why_wrong
from fisher_vmap.linearize.model_info import Choice, ModelInfo
from fisher_vmap.linearize.plain import first_line
from fisher_vmap.linearize.probe import chain_is_whole, look_under_plain
from fisher_vmap.model.layers import Place, layers_of
from fisher_vmap.model.layout import Layout, NotPositionwise, pack_rows
from fisher_vmap.model.offload import is_offloaded
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.validation import is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked

log = logging.getLogger(__name__)


class NoFormAgrees(ValueError):
    """No form of the kernel agrees with the model itself."""


def choose_forms(
    model: nn.Module, known: ModelInfo, layout: Layout, layers: Sequence[str], kernel: str
) -> dict[str, Choice]:
    """The form for each layer, proven on this batch unless it was proven before.

    Raises:
        ValueError: the kernel asked for by name cannot be trusted with one of the layers, or no form agrees with
            plain autograd.
    """
    new = [layer for layer in layers if (layer, kernel) not in known.forms]
    found = _first_that_agree(model, known, layout, kernel, dict.fromkeys(new, "")) if new else {}
    return {layer: found.get(layer) or known.forms[layer, kernel] for layer in layers}


def give_up(
    model: nn.Module, known: ModelInfo, layout: Layout, kernel: str, wrong: Mapping[str, str]
) -> dict[str, Choice]:
    """The next form for each layer whose form turned out wrong, proven on this batch.

    `wrong` tells for each of the layers how its form is wrong.

    Raises:
        NoFormAgrees: there is none.
    """
    for layer, reason in wrong.items():
        form = known.forms[layer, kernel].form if (layer, kernel) in known.forms else "present"
        log.log(logging.DEBUG if (layer, form) in known.logged else logging.WARNING,
                "the %s kernel at %s is given up from here on: %s", form, layer, reason)  # fmt: skip
        known.logged.add((layer, form))
    found = _first_that_agree(model, known, layout, kernel, wrong)
    known.changes += 1
    return found


def _first_that_agree(
    model: nn.Module, known: ModelInfo, layout: Layout, kernel: str, wrong: Mapping[str, str]
) -> dict[str, Choice]:
    """For each layer the first form that agrees with plain autograd; with a reason in `wrong`, after its last form."""
    left = {layer: _left(model, known, layout, layer, kernel, bool(reason)) for layer, reason in wrong.items()}
    found: dict[str, Choice] = {}
    reasons, excerpts = dict(wrong), dict[tuple[int, ...], Expected]()
    waiting = {layer: _next(left[layer], layer, kernel, reasons[layer]) for layer in left}
    while waiting:
        choice = next(iter(waiting.values()))
        group = [layer for layer, other in waiting.items() if other.key == choice.key]
        why_not, few, finite = _compare(model, known, layout, list(left), group, choice, excerpts)
        for layer in group:
            candidate = waiting.pop(layer)
            if why_not is None:
                why = f"{reasons[layer]}; {candidate.why}" if reasons[layer] else candidate.why
                length, rows = (max(few.lengths), sum(few.lengths)) if few is not None else (0, 0)
                found[layer] = candidate._replace(why=why, length=length, rows=rows)
                log.debug("kernel at %s: %s, since %s", layer, candidate.form, why)
                if finite:  # values that are not finite prove nothing beyond these prompts
                    known.forms[layer, kernel] = found[layer]
            else:
                reasons[layer] = f"{choice.form} disagreed with plain autograd: {why_not}"
                waiting[layer] = _next(left[layer], layer, kernel, reasons[layer])
        if why_not is not None:
            expected = choice.form == "packed" or (choice.attention == "ours" and known.attention == NAME)
            level = logging.INFO if expected else logging.WARNING
            log.log(level, "the %s kernel disagrees with plain autograd at %s (%s)", choice.form, group, why_not)
    return found


def _left(
    model: nn.Module, known: ModelInfo, layout: Layout, layer: str, kernel: str, given_up: bool
) -> Iterator[Choice]:
    """The forms that a layer may still have: all, or those after the one that was given up."""
    if given_up and (layer, kernel) in known.forms:
        gone = known.forms[layer, kernel].key
        after = dropwhile(lambda choice: choice.key != gone, _candidates(model, known, layout, layer, kernel))
        if next(after, None) is not None:
            return after
    # If its old form is no longer a candidate, the structure was found to be different: try all of them again.
    return _candidates(model, known, layout, layer, kernel)


def _next(left: Iterator[Choice], layer: str, kernel: str, reason: str) -> Choice:
    choice = next(left, None)
    if choice is not None:
        return choice
    if kernel == "auto":
        what, other = "no form of the kernel agrees", "try precision float32, or another layer"
    else:
        what, other = f"the {kernel} kernel disagrees", "use kernel auto"
    raise NoFormAgrees(f"{what} with plain autograd at {layer}: {reason}; {other}")


def _compare(
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    group: Sequence[str],
    choice: Choice,
    excerpts: dict[tuple[int, ...], Expected],
) -> tuple[str | None, Layout | None, bool]:
    """How a form fails (None if it agrees), on which excerpt, and whether the expected values were finite."""
    try:
        excerpted = excerpts_for(model, known, layout, choice)
    except Exception as error:  # a user's hook may raise anything
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        return first_line(error), None, True
    why_not, finite = None, True
    for few in excerpted:
        if few.lengths not in excerpts:
            excerpts[few.lengths] = expected_on(model, few, layers)
        expected = excerpts[few.lengths]
        finite = finite and expected.finite
        why_not = why_not or why_wrong(model, known, expected, group, choice)
    if why_not is None and choice.form == "packed" and not (known.parts.top_places or known.parts.not_cut):
        _prove_top(model, known, layout, choice)
    return why_not, excerpted[0], finite


def _prove_top(model: nn.Module, known: ModelInfo, layout: Layout, choice: Choice) -> None:
    """Find out, on an excerpt of the batch, whether the last block's forward may run at the last rows alone."""
    try:
        if is_offloaded(model):
            raise NotPositionwise("weights are offloaded")
        with attention_set_to(model, known.attention_of(choice)):
            few = pack_rows(packable(model, known.parts, layout))
            with prompts_packed(few):
                known.parts = replace(known.parts, top_places=prove_top(model, known.parts, few))
    except (NotPositionwise, StructureChanged, UnsupportedAttention) as reason:
        why = str(reason)
    except Exception as error:
        if is_out_of_memory(error) or is_our_fault(error) or not is_hooked(model):
            raise
        why = first_line(error)  # a user's hook may raise anything
    else:
        return
    log.info("the last block's forward runs at all positions: %s", why)
    known.parts = replace(known.parts, not_cut=why)


def _candidates(model: nn.Module, known: ModelInfo, layout: Layout, layer: str, kernel: str) -> Iterator[Choice]:
    """The forms that a layer may have, the fastest first; evaluated lazily."""
    places = layers_of(model).places
    form, why = _by_structure(known, places, layer, kernel)
    attention = "ours"
    if kernel != "loop":
        if form == "packed":
            yield Choice("packed", attention, "together", why)
            form, why = "layerwise", "the chain of blocks is whole"
        yield Choice(form, attention, "together", why)
        plain = look_under_plain(model, known, layout) or known
        if plain is not known:
            attention = "plain"
            form, why = _by_structure(plain, places, layer, kernel)
            why = f"under {plain.attention or 'its own'} attention; {why}"
            yield Choice(form, attention, "together", why)
        if form == "layerwise" and kernel == "auto":
            yield Choice("whole", attention, "together", why)
    if kernel in ("auto", "loop"):
        yield Choice("loop", "own", "together", "asked for" if kernel == "loop" else "plain autograd, token by token")
    by_itself = "each prompt by itself"
    if kernel in ("auto", "layerwise") and form == "layerwise":
        yield Choice("layerwise", attention, "alone", by_itself)
    if kernel in ("auto", "whole"):
        yield Choice("whole", attention, "alone", by_itself)
    if kernel in ("auto", "loop"):
        yield Choice("loop", "own", "alone", by_itself)
    if layout.given is not None and kernel != "layerwise":
        why = "the prompts as laid out in the caller's batch, since a hook works for no other"
        if kernel != "loop":
            yield Choice("whole", attention, "given", why)
        if kernel != "whole":
            yield Choice("loop", "own", "given", why)


def _by_structure(known: ModelInfo, places: Mapping[str, Place], layer: str, kernel: str) -> tuple[str, str]:
    """The best form that the structure allows for a layer, and the reason."""
    why_not = ""
    if layer not in known.parts.call_order:
        why_not = "the hooked module is not a decoder block"
    elif not places[layer].plain:
        why_not = "the hooked block's output is not [B, T, D]"
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
        return "packed", "the chain of blocks is whole, and positions interact only in our attention"
    return "layerwise", f"the chain of blocks is whole; not packed: {known.parts.why_not_packed}"
