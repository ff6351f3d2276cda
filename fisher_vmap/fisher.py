"""`fisher_scores`: the gradients of log p_t of the top-k tokens for a batch of prompts.

The k backward passes of these gradients are one batched pullback: `torch.func.vmap` over `torch.func.vjp` with one-hot
cotangents. Which form of it is right for a model is found by the probe and proven against plain autograd.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
from torch import Tensor, nn

from fisher_vmap.linearize.audit import Found, plan_audit, remember_reach, why_wrong
from fisher_vmap.linearize.linear_map import KernelOptions, Options, as_it_is, differentiable
from fisher_vmap.linearize.model_info import Choice, ModelInfo
from fisher_vmap.linearize.output import Probes
from fisher_vmap.linearize.plain import first_line
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.scores import Scores, Wanted, run_choice
from fisher_vmap.linearize.select import choose_forms, give_up
from fisher_vmap.model.layers import layers_of, resolve_layers
from fisher_vmap.model.layout import Layout, lay_out
from fisher_vmap.model.offload import input_device
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.targets import at_one_target, most_targets
from fisher_vmap.model.validation import check_tensor, check_whole, is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked, names_inside, unwrapped

Record = TypeVar("Record", bound=NamedTuple)


def fisher_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: str | int | Sequence[str | int],
    top_k: int = 10,
    token_ids: Tensor | None = None,
    include_rest: bool = False,
    trace_samples: int = 0,
    **options: Unpack[Options],
) -> Scores:
    """The scores g_t = d log p_t / d theta of the likeliest next tokens, for a whole batch of prompts in one call.

    theta is a bias vector, zero, added to the output of a hooked module; p is the distribution of the token after the
    last token of each prompt, or after each of its targets. The Fisher matrix of a prompt is F = sum_t p_t g_t g_t^T.
    With several targets it is the sum of their matrices, and `top_k` vectors are pulled back for each of them. A
    prompt's scores do not depend on the other prompts of its batch. The model's mode, requires_grad, hooks and
    attention are restored afterwards.

    Args:
        model: a causal LM of transformers, or a PeftModel, nnsight's LanguageModel or a TransformerBridge around one.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: names of modules whose output is a tensor [B, T, D] or a tuple that starts with one; or numbers of
            decoder blocks, negative from the top; or "all" blocks.
        top_k: K, how many of the likeliest tokens.
        token_ids: [B, K] int64, tokens chosen by the caller; `top_k` is then ignored.
        include_rest: treat "any other token" as one more outcome, the last, with token id -1.
        trace_samples: S, how many random vectors to use for estimating the trace of what these outcomes leave out.
        options: how it is computed, any of the following.
        positions: where the bias is added: "all" (the default), "last" (the last real token) or a mask [B, T].
        targets: the positions whose next-token distribution is read: "last" (the default), "all", or a mask [B, T]. The
            position before a token is the one that predicts it.
        kernel: "auto" (the default), or a form by name: "layerwise", "whole" or "loop".
        chunk_size: how many cotangents to pull back at a time; None (the default): as many as suit the device.
        precision: the format to compute in, from the same weights: "model", their own; "float32"; "mixed", only the
            forward in float32; or "auto" (the default), float32 if this processor is faster in it, else "model".
        audit: how often results are compared with the unchanged model and plain autograd: "auto" (the default), rarely
            enough to cost next to nothing; "always", in every call; "off", only when a batch is larger than any proven
            one.

    Returns:
        Scores: log_probs [B, K] in nats, token_ids [B, K], and for each layer gradients [B, K, D] and
        position_energy [B, T]; float32, or float64 for a float64 model. With `include_rest`, K is one larger; with
        several targets, K is theirs together (see `Scores`).

    Raises:
        ValueError: an argument is not as described, the kernel asked for cannot be trusted with this model, or no
            form of the kernel agrees with the model itself.
    """
    how = KernelOptions(**options)
    check_whole("trace_samples", trace_samples, 0)
    if token_ids is None:
        check_whole("top_k", top_k)
    given, model = model, unwrapped(model)
    input_device(model)  # raises if no weights are loaded
    how = how.on(model)
    with torch.inference_mode(False), torch.no_grad(), as_it_is(model, how.precision):
        with differentiable(model):
            names = resolve_layers(model, names_inside(given, model, layers))
            layout = lay_out(input_ids, attention_mask, how.positions, how.targets)
            _check_several(layout, token_ids, include_rest)
            last = layout._replace(targets=None)  # forms are chosen on these
            check_inputs(model, layout)
            known = probe(model, last)
            _check_chosen(token_ids, layout, known.parts.vocabulary)
            forms = choose_forms(model, known, last, names, how.kernel)
        probes = Probes(trace_samples, prompt_seeds(layout)) if trace_samples else None
        wanted = Wanted(top_k, token_ids, include_rest, probes, most_targets(layout))
        while True:
            results, wrong = _computed(model, known, layout, names, forms, wanted, how)
            if not wrong:
                plan = plan_audit(model, known, layout, forms, wanted.vectors, how.audit)
                for scores in results:
                    wrong |= why_wrong(model, known, *_to_audit(scores, layout, token_ids is None), plan)
            if not wrong:
                remember_reach(known, how.kernel, forms, layout, plan)
                return join_layers(results, names)
            with differentiable(model):
                forms |= give_up(model, known, last, how.kernel, wrong)


def _to_audit(scores: Scores, layout: Layout, likeliest: bool) -> tuple[Layout, Found]:
    """What an audit compares: of several targets the one that each prompt's matrix hangs on most."""
    m = most_targets(layout)
    if m == 1:
        one = at_one_target(layout, [0] * len(layout.lengths))
        return one, Found(scores.log_probs, scores.token_ids, scores.gradients, scores.residual_norm, likeliest)
    B, O = scores.log_probs.shape
    first = next(iter(scores.gradients.values()))
    weight_BO = scores.log_probs.exp() * first.square().sum(2).to(scores.log_probs)
    rank_B = weight_BO.nan_to_num().view(B, m, O // m).sum(2).argmax(1)

    def taken(x: Tensor) -> Tensor:
        return x.view(B, m, O // m, *x.shape[2:])[torch.arange(B, device=x.device), rank_B.to(x.device)]

    gradients = {layer: taken(x) for layer, x in scores.gradients.items()}
    found = Found(taken(scores.log_probs), taken(scores.token_ids), gradients, scores.residual_norm, likeliest)
    return at_one_target(layout, rank_B.tolist()), found


def _check_several(layout: Layout, token_ids: Tensor | None, include_rest: bool) -> None:
    """Raise ValueError for what has no meaning with several targets."""
    if layout.targets is not None and max(map(len, layout.targets)) > 1:
        if token_ids is not None:
            raise ValueError("token_ids are those of one target, and some prompt has several; leave token_ids out")
        if include_rest:
            raise ValueError("include_rest is for one target, and some prompt has several; leave it out, or use full")


def _computed(
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    names: Sequence[str],
    forms: Mapping[str, Choice],
    wanted: Wanted,
    options: KernelOptions,
) -> tuple[list[Scores], dict[str, str]]:
    """The scores, one record for each form; or the layers whose form broke off, and why."""
    results: list[Scores] = []
    for key in sorted({choice.key for choice in forms.values()}):
        group = [name for name in names if forms[name].key == key]
        try:
            with differentiable(model):
                results.append(run_choice(forms[group[0]], model, known, layout, group, wanted, options))
        except StructureChanged as reason:
            return [], broken_off(known, forms, group, options.kernel, reason)
        except Exception as error:
            if is_out_of_memory(error) or is_our_fault(error) or not is_hooked(model):
                raise
            # A hook that worked on the prompts of the proof may fail on these prompts in this form's layout.
            return [], dict.fromkeys(group, f"it broke off: {first_line(error)}")
        # Forms may break ties differently, and all layers of a batch must have the same tokens.
        tokens = results[0].token_ids
        wanted = replace(wanted, token_ids=tokens[:, :-1] if wanted.include_rest else tokens)
    return results, {}


def prompt_seeds(layout: Layout) -> list[int]:
    """A seed for each prompt that depends only on its tokens."""
    ids_N = layout.input_ids.flatten().cpu()
    return [zlib.crc32(ids_N[first:stop].numpy().tobytes()) for first, stop in layout.ranges()]


def broken_off(
    known: ModelInfo, forms: Mapping[str, Choice], group: Sequence[str], kernel: str, reason: StructureChanged
) -> dict[str, str]:
    """Rule out the blockwise forms of this model from now on: for each layer that needs another form, the reason.

    Raises:
        ValueError: a form was asked for by name.
    """
    if kernel != "auto":
        raise ValueError(f"kernel {kernel} broke off: {reason}; use kernel auto") from reason
    known.parts, known.why_no_head = replace(known.parts, head=None), str(reason)
    blockwise = ("packed", "layerwise")
    wrong = {name for name, choice in forms.items() if name in group or choice.form in blockwise}
    keys = {(name, kernel) for name in wrong}
    known.forms = {key: choice for key, choice in known.forms.items() if key in keys or choice.form not in blockwise}
    return {name: f"it broke off: {reason}" for name in forms if name in wrong}


def check_inputs(model: Any, layout: Layout) -> None:
    """Raise ValueError for tokens outside of the vocabulary, or for prompts longer than the table of positions."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    lowest, highest = torch.stack(torch.aminmax(layout.input_ids)).tolist()
    if lowest < 0 or (size is not None and highest >= size):
        raise ValueError(f"input_ids run from {lowest} to {highest}; expected 0 to {size - 1 if size else '...'}")
    room, longest = layers_of(model).positions, max(layout.lengths)
    if room is not None and longest > room:
        raise ValueError(
            f"prompt {layout.lengths.index(longest)} of the batch has {longest} tokens, but this model has {room} "
            f"positions; cut it to {room} tokens"
        )


def _check_chosen(token_ids: Tensor | None, layout: Layout, vocabulary: int) -> None:
    if token_ids is None:
        return
    B = len(layout.lengths)
    check_tensor("token_ids", token_ids, f"[{B}, K] int64")
    if token_ids.dim() != 2 or len(token_ids) != B or token_ids.shape[1] == 0:
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; expected [{B}, K]")
    if token_ids.dtype != torch.int64:
        raise ValueError(f"token_ids has dtype {token_ids.dtype}; expected int64")
    if bool(((token_ids < 0) | (token_ids >= vocabulary)).any()):
        raise ValueError(f"token_ids has an entry outside 0 to {vocabulary - 1}, the model's vocabulary")


def join_layers(parts: Sequence[Record], names: Sequence[str]) -> Record:
    """Join records that differ only in their layers, in the order of `names`."""
    merged = {}
    for field, values in zip(parts[0]._fields, zip(*parts, strict=True), strict=True):
        if isinstance(values[0], dict):
            every = {layer: value for part in values for layer, value in part.items()}
            merged[field] = {name: every[name] for name in names if name in every}
    return parts[0]._replace(**merged)
