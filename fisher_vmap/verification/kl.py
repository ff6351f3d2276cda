"""How far a step along a direction really moves the next-token distribution, to set beside what F predicts."""

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.arguments import check_tensor
from fisher_vmap.anatomy.layers import hooked, resolve_layers
from fisher_vmap.anatomy.layout import lay_out
from fisher_vmap.anatomy.precision import choose_precision
from fisher_vmap.anatomy.wrappers import names_inside, unwrapped
from fisher_vmap.kernel import check_inputs
from fisher_vmap.proofs.probe import layer_widths, undisturbed
from fisher_vmap.upper_network.positions import position_mask
from fisher_vmap.upper_network.whole import rows_from_logits, with_biases

ROWS_AT_A_TIME = 1024  # tokens of all steps that go through the model together


def measured_kl(
    model: nn.Module,
    input_ids: Tensor,
    layer: str | int,
    steps: Tensor,
    positions: str | Tensor = "all",
    precision: str = "auto",
) -> Tensor:
    """KL(p_0 || p_step) of one prompt for each step added to the residual stream.

    To second order it is 1/2 step^T F step with the Fisher matrix F of the whole vocabulary. It is summed in float64 as
    sum_v p_v (e^d - 1 - d) with d = log p_step - log p_0: no term is negative, so that small values do not cancel.

    Args:
        model: a causal LM.
        input_ids: [T] int64, the prompt.
        layer: the hooked layer.
        steps: [N, D], the steps.
        positions: where they are added: "all", "last", or a mask [1, T].
        precision: as for `fisher_scores`; "float32" if small steps are to be seen.

    Returns:
        [N] float64, in nats.

    Raises:
        ValueError: an argument is not as described.
    """
    for argument, value, shape in (("input_ids", input_ids, "[T] int64"), ("steps", steps, "[N, D]")):
        check_tensor(argument, value, shape)
        if value.dim() != shape.count(",") + 1:
            raise ValueError(f"{argument} has shape {tuple(value.shape)}; expected {shape}, of one prompt")
    given, model = model, unwrapped(model)
    precision = choose_precision(model, precision).name
    T, prompt = len(input_ids), lay_out(input_ids[None], None)
    with undisturbed(model, precision):
        (name,) = resolve_layers(model, names_inside(given, model, layer))
        check_inputs(model, prompt, positions, None)
    if steps.shape[1] != (width := layer_widths(model, [name], precision)[name]):
        raise ValueError(f"steps has shape {tuple(steps.shape)}; expected [N, {width}], the width of {name}")
    mask_T = position_mask(positions, prompt)
    where_1T1 = (torch.ones(T) if mask_T is None else mask_T).to(input_ids.device)[None, :, None]

    def log_p(steps_nD: Tensor) -> Tensor:
        layout = lay_out(input_ids.expand(len(steps_nD), T), None)
        function = with_biases(rows_from_logits(model, layout, gather=True), modules)
        biases = steps_nD.to(input_ids.device)[:, None] * where_1T1.to(steps_nD.dtype)
        return function({name: biases}).double().log_softmax(1)

    with torch.no_grad(), undisturbed(model, precision):
        modules = hooked(model, [name])
        (origin_V,) = log_p(torch.zeros_like(steps[:1]))
        found = []
        for some in steps.split(max(1, ROWS_AT_A_TIME // T)):
            change_nV = log_p(some) - origin_V
            terms_nV = origin_V.exp() * (torch.expm1(change_nV) - change_nV)
            found.append(torch.where(origin_V > -torch.inf, terms_nV, 0).sum(1))  # a token that is banned stays so
    return torch.cat(found).cpu()
