"""`fisher_scores`: the one public function of the kernel.

The k backward passes of "gradient of log p_t for each of the top-k tokens" are one batched pullback: `torch.func.vmap`
over `torch.func.vjp` with one-hot cotangents. The probe finds out which form of it a model may be trusted with.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.linearize.audit import Found, check_audit, plan_audit, remember_reach, why_wrong
from fisher_vmap.linearize.compare import run_choice
from fisher_vmap.linearize.output import Probes, Scores, Wanted
from fisher_vmap.linearize.plain import first_line
from fisher_vmap.linearize.positions import position_mask
from fisher_vmap.linearize.probe import Choice, Probe, as_it_is, differentiable, probe
from fisher_vmap.linearize.select import KERNELS, choose_forms, give_up
from fisher_vmap.model.layers import layers_of, resolve_layers
from fisher_vmap.model.layout import Layout, lay_out
from fisher_vmap.model.offload import input_device
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.validation import check_tensor, check_whole, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked, names_inside, unwrapped


def fisher_scores(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: str | int | Sequence[str | int],
    top_k: int = 10,
    token_ids: Tensor | None = None,
    positions: str | Tensor = "all",
    kernel: str = "auto",
    chunk_size: int | None = None,
    include_rest: bool = False,
    trace_samples: int = 0,
    precision: str = "auto",
    audit: str = "auto",
) -> Scores:
    """The scores g_t = d log p_t / d theta of the likeliest next tokens, for a whole batch of prompts in one call.

    theta is a bias vector, zero, added to the output of a hooked module; p is the distribution of the token after the
    last token of each prompt. The Fisher matrix of a prompt is F = sum_t p_t g_t g_t^T. A prompt's scores do not depend
    on the other prompts of its batch. The model's mode, requires_grad, hooks and attention are as before afterwards.

    Args:
        model: a causal LM of transformers, or a PeftModel, nnsight's LanguageModel or a TransformerBridge around one.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: names of modules whose output is a tensor [B, T, D] or a tuple that starts with one; or numbers of
            decoder blocks, negative from the top; or "all" blocks.
        top_k: K, how many of the likeliest tokens.
        token_ids: [B, K] int64, the tokens, where the caller chooses them; `top_k` is then not read.
        positions: where the bias is added: "all", "last" (the last real token) or a mask [B, T].
        kernel: "auto", or a form by name: "layerwise", "whole" or "loop".
        chunk_size: how many cotangents to pull back at a time; None: as many as the device does well with.
        include_rest: take "any other token" for one more outcome, the last, with token id -1.
        trace_samples: S, random vectors by which the trace of what these outcomes leave out is estimated.
        precision: what the model is computed in, from the same weights: "model", their own format; "float32"; "mixed",
            the forward alone in float32; or "auto", float32 where this processor is faster in it, else "model".
        audit: how often what is computed is compared with the model as it is and plain autograd: "auto", as often as
            costs next to nothing; "always", in every call; or "off", only where a call reaches further than the proof.

    Returns:
        Scores: log_probs [B, K] in nats, token_ids [B, K], and for each layer gradients [B, K, D] and
        position_energy [B, T]; float32, or float64 for a float64 model. With `include_rest`, K is one more.

    Raises:
        ValueError: an argument is not as described, the kernel asked for cannot be trusted with this model, or no
            form of it agrees with the model itself.
    """
    check_kernel(kernel)
    check_audit(audit)
    check_whole("trace_samples", trace_samples, 0)
    if token_ids is None:
        check_whole("top_k", top_k)
    given, model = model, unwrapped(model)
    input_device(model)  # raises where no weights are loaded
    precision = choose_precision(model, precision).name
    with torch.inference_mode(False), torch.no_grad(), as_it_is(model, precision):
        with differentiable(model):
            names = resolve_layers(model, names_inside(given, model, layers))
            layout = lay_out(input_ids, attention_mask)
            check_inputs(model, layout, positions, chunk_size)
            known = probe(model, layout)
            _check_chosen(token_ids, layout, known.parts.vocabulary)
            forms = choose_forms(model, known, layout, names, kernel)
        probes = Probes(trace_samples, prompt_seeds(layout)) if trace_samples else None
        wanted = Wanted(top_k, token_ids, positions, chunk_size, include_rest, probes, precision)
        while True:
            results, wrong = _computed(model, known, layout, names, forms, wanted, kernel)
            if not wrong:
                plan = plan_audit(model, known, layout, forms, top_k + trace_samples, audit)
                for scores in results:
                    norms, likeliest = scores.residual_norm, token_ids is None
                    found = Found(scores.log_probs, scores.token_ids, scores.gradients, norms, likeliest)
                    wrong |= why_wrong(model, known, layout, found, plan, positions)
            if not wrong:
                remember_reach(known, kernel, forms, layout, plan)
                return _joined(results, names)
            with differentiable(model):
                forms |= give_up(model, known, layout, kernel, wrong)


def _computed(
    model: nn.Module,
    known: Probe,
    layout: Layout,
    names: Sequence[str],
    forms: Mapping[str, Choice],
    wanted: Wanted,
    kernel: str,
) -> tuple[list[Scores], dict[str, str]]:
    """A record for each form; or the layers whose form broke off, and why."""
    results: list[Scores] = []
    for key in sorted({choice.key for choice in forms.values()}):
        group = [name for name in names if forms[name].key == key]
        try:
            with differentiable(model):
                results.append(run_choice(forms[group[0]], model, known, layout, group, wanted))
        except StructureChanged as reason:
            return [], broken_off(known, forms, group, kernel, reason)
        except Exception as error:
            if is_out_of_memory(error) or not is_hooked(model):
                raise
            # A hook that worked on the prompts of the proof, and does not on these as the form lays them out.
            return [], dict.fromkeys(group, f"it broke off: {first_line(error)}")
        # Two forms may round ties another way: the layers of a batch speak of the same tokens.
        tokens = results[0].token_ids
        wanted = replace(wanted, token_ids=tokens[:, :-1] if wanted.include_rest else tokens)
    return results, {}


def check_kernel(kernel: str) -> None:
    """Raise ValueError unless a kernel has this name."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; expected 'auto', 'layerwise', 'whole' or 'loop'")


def prompt_seeds(layout: Layout) -> list[int]:
    """A number for each prompt that depends on its tokens alone."""
    ids_N = layout.input_ids.flatten().cpu()
    return [zlib.crc32(ids_N[first:stop].numpy().tobytes()) for first, stop in layout.ranges()]


def broken_off(
    known: Probe, forms: Mapping[str, Choice], group: Sequence[str], kernel: str, reason: StructureChanged
) -> dict[str, str]:
    """From now on the model's own forward to the end, whatever its blocks do: for each layer that needs it, why.

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


def check_inputs(model: Any, layout: Layout, positions: str | Tensor, chunk_size: int | None) -> None:
    """Raise ValueError for tokens or places that the model does not know, a bias nowhere, or a chunk of nothing."""
    if chunk_size is not None:
        check_whole("chunk_size", chunk_size, 1)
    position_mask(positions, layout)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(embedding, "num_embeddings", None)
    lowest, highest = int(layout.input_ids.min()), int(layout.input_ids.max())
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


def _joined(results: Sequence[Scores], names: Sequence[str]) -> Scores:
    """One record of several that differ in their layers alone."""
    merged = results[0]
    for other in results[1:]:
        merged = merged._replace(
            gradients=merged.gradients | other.gradients,
            position_energy=merged.position_energy | other.position_energy,
            residual_norm=merged.residual_norm | other.residual_norm,
            remainder=merged.remainder | other.remainder,
        )
    return merged._replace(
        gradients={name: merged.gradients[name] for name in names},
        position_energy={name: merged.position_energy[name] for name in names},
        residual_norm={name: merged.residual_norm[name] for name in names},
        remainder={name: merged.remainder[name] for name in names},
    )
