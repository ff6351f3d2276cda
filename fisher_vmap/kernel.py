"""`fisher_scores`: the one public function of the kernel.

The k backward passes of "gradient of log p_t for each of the top-k tokens" are one batched pullback: `torch.func.vmap`
over `torch.func.vjp` with one-hot cotangents. The probe finds out which form of it a model may be trusted with.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisher_vmap.attention_interface import attention_set_to
from fisher_vmap.blocks import resolve_layers
from fisher_vmap.forms import Wanted
from fisher_vmap.layout import lay_out
from fisher_vmap.positions import position_mask
from fisher_vmap.probe import KERNELS, choose_forms, probe, run_form, undisturbed
from fisher_vmap.recording import StructureChanged
from fisher_vmap.scores import Scores

log = logging.getLogger(__name__)


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
) -> Scores:
    """The scores g_t = d log p_t / d theta of the likeliest next tokens, for a whole batch of prompts in one call.

    theta is a bias vector, zero, added to the output of a hooked module; p is the distribution of the token after the
    last token of each prompt. The Fisher matrix of a prompt is F = sum_t p_t g_t g_t^T. A prompt's scores do not depend
    on the other prompts of its batch. The model's mode, requires_grad, hooks and attention are as before afterwards.

    Args:
        model: a causal LM of transformers.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: names of modules whose output is a tensor [B, T, D] or a tuple that starts with one; or numbers of
            decoder blocks, negative from the top; or "all" blocks.
        top_k: K, how many of the likeliest tokens.
        token_ids: [B, K] int64, the tokens, where the caller chooses them; `top_k` is then not read.
        positions: where the bias is added: "all", "last" (the last real token) or a mask [B, T].
        kernel: "auto", or a form by name: "layerwise", "whole" or "loop".
        chunk_size: how many cotangents to pull back at a time; None: all of them.

    Returns:
        Scores: log_probs [B, K] in nats, token_ids [B, K], and for each layer gradients [B, K, D] and
        position_energy [B, T]; float32, or float64 for a float64 model.

    Raises:
        ValueError: an argument is not as described, or the kernel asked for cannot be trusted with this model.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; expected 'auto', 'layerwise', 'whole' or 'loop'")
    names = resolve_layers(model, layers)
    layout = lay_out(input_ids, attention_mask)
    position_mask(positions, layout)  # raises now what is wrong with it
    if token_ids is not None and (token_ids.dim() != 2 or len(token_ids) != len(layout.lengths)):
        raise ValueError(f"token_ids has shape {tuple(token_ids.shape)}; expected [{len(layout.lengths)}, K]")
    wanted = Wanted(top_k, token_ids, positions, chunk_size)
    with torch.no_grad(), undisturbed(model):
        known = probe(model, layout)
        forms = choose_forms(model, known, layout, names, kernel)
        with attention_set_to(model, known.attention):
            groups = {form: [name for name in names if forms[name] == form] for form in set(forms.values())}
            results = []
            for form, group in groups.items():
                try:
                    results.append(run_form(form, model, known.parts, layout, group, wanted))
                except StructureChanged as reason:
                    if kernel != "auto":
                        raise ValueError(f"kernel {kernel} broke off: {reason}; use kernel auto") from reason
                    log.warning("the kernel fell back to the whole form: %s", reason)
                    for name in group:
                        known.forms[name, kernel] = ("whole", str(reason))
                    results.append(run_form("whole", model, known.parts, layout, group, wanted))
    return _joined(results, names)


def _joined(results: Sequence[Scores], names: Sequence[str]) -> Scores:
    """One record of several that differ in their layers alone."""
    merged = results[0]
    for other in results[1:]:
        merged = merged._replace(
            gradients=merged.gradients | other.gradients,
            position_energy=merged.position_energy | other.position_energy,
            residual_norm=merged.residual_norm | other.residual_norm,
        )
    return merged._replace(
        gradients={name: merged.gradients[name] for name in names},
        position_energy={name: merged.position_energy[name] for name in names},
        residual_norm={name: merged.residual_norm[name] for name in names},
    )
