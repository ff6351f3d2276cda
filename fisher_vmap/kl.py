"""How far a step along a direction really moves the next-token distribution, to set beside what F predicts."""

import torch
from torch import Tensor, nn

from fisher_vmap.layers import hooked, resolve_layers
from fisher_vmap.layout import lay_out
from fisher_vmap.probe import undisturbed
from fisher_vmap.whole import rows_from_logits, with_biases


def measured_kl(model: nn.Module, input_ids: Tensor, layer: str | int, steps: Tensor) -> Tensor:
    """KL(p_0 || p_step) of one prompt for each step added to the residual stream at every position.

    To second order it is 1/2 step^T F step with the Fisher matrix F of the whole vocabulary. It is summed in float64 as
    sum_v p_v (e^d - 1 - d) with d = log p_step - log p_0: no term is negative, so that small values do not cancel.

    Args:
        model: a causal LM; float32 if small steps are to be seen.
        input_ids: [T] int64, the prompt.
        layer: the hooked layer.
        steps: [N, D], the steps.

    Returns:
        [N] float64, in nats.
    """
    (name,) = resolve_layers(model, layer)
    layout = lay_out(input_ids[None], None)
    function = with_biases(rows_from_logits(model, layout, gather=True), hooked(model, [name]))
    with torch.no_grad(), undisturbed(model):

        def log_p(step_D: Tensor) -> Tensor:
            return function({name: step_D.to(input_ids.device)[None, None]})[0].double().log_softmax(0)

        origin = log_p(torch.zeros_like(steps[0]))
        change_NV = torch.stack([log_p(step) for step in steps]) - origin
    return (origin.exp() * (torch.expm1(change_NV) - change_NV)).sum(1).cpu()
