"""What arrives at the hooked layers, gathered into the record of a batch's scores.

From a cotangent at every position to the score: the bias is one vector, so its gradient is a sum over positions.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_vmap.linearize.output import Outcomes, Scores
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.validation import check_tensor


class Summed(NamedTuple):
    """A layer's share of the scores: gradients [B, K, D] and the position energy of each row, [N]."""

    gradients: Tensor
    energy: Tensor


def position_mask(positions: str | Tensor, layout: Layout) -> Tensor | None:
    """[N] of 0 and 1, the rows where the bias is added; None for every one.

    Args:
        positions: "all", "last" (the last real token), or a mask [B, width] in the caller's columns.
        layout: the batch.

    Raises:
        ValueError: neither of these, or a mask that is zero on a whole prompt.
    """
    if isinstance(positions, Tensor):
        expected = (len(layout.lengths), layout.width)
        if positions.shape != expected:
            raise ValueError(f"positions has shape {tuple(positions.shape)}; expected that of input_ids, {expected}")
        mask_N = layout.from_caller((positions.to(layout.device) != 0).float())
        if not bool(layout.to_caller(mask_N).any(1).all()):
            raise ValueError("positions selects no real token of some prompt; give at least one for each")
        return mask_N
    if not isinstance(positions, str):
        check_tensor("positions", positions, "[B, T], or 'all' or 'last'")
    if positions == "last":
        mask_N = torch.zeros(layout.input_ids.numel(), device=layout.device)
        mask_N[layout.last_rows(layout.device)] = 1
        return mask_N
    if positions != "all":
        raise ValueError(f"positions is {positions!r}; expected 'all', 'last' or a mask [B, T]")
    return None


def sum_positions(
    cotangents: Tensor, layout: Layout, norm_KB: Tensor, probs_BK: Tensor, mask_N: Tensor | None
) -> Summed:
    """Sum over each prompt's biased positions, in float32, and undo the scaling of the cotangents.

    Args:
        cotangents: [b, T, K, D] in the model's dtype, zero at padding.
        layout: of the batch.
        norm_KB: [K, B], what the cotangents had been divided by.
        probs_BK: [B, K], the weights of the energy.
        mask_N: [N], where the bias is added; None for everywhere.
    """
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    norm_BK, weight_BK = norm_KB.T.to(device, wide), probs_BK.to(device, wide)
    cotangents_NKD = cotangents.flatten(0, 1)
    if mask_N is not None:
        cotangents_NKD = cotangents_NKD * mask_N.to(device, cotangents.dtype)[:, None, None]
    gradients_BKD = layout.sum_prompts(cotangents_NKD, wide) * norm_BK[:, :, None]
    squared_NK = torch.linalg.vector_norm(cotangents_NKD, dim=-1, dtype=wide) ** 2
    weight_BK = weight_BK * norm_BK**2
    energy_N = squared_NK.new_zeros(len(squared_NK))
    for b, (first, stop) in enumerate(layout.ranges()):
        energy_N[first:stop] = squared_NK[first:stop] @ weight_BK[b]
    return Summed(gradients_BKD, energy_N)


def energy_of_one(
    cotangents: Tensor,
    layout: Layout,
    norm_KB: Tensor,
    combination_BK: Tensor,
    weight_B: Tensor,
    mask_N: Tensor | None,
) -> Tensor:
    """The energy of each row, [N], of one more cotangent a prompt, which is a combination of those that were pulled.

    Args:
        cotangents: [b, T, K, D], as for `sum_positions`.
        layout: of the batch.
        norm_KB: [K, B].
        combination_BK: [B, K].
        weight_B: [B], its weight.
        mask_N: [N], where the bias is added; None for everywhere.
    """
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    cotangents_NKD = cotangents.flatten(0, 1)
    factor_BK = (combination_BK.to(norm_KB.device) * norm_KB.T).to(device, wide)
    energy_N = cotangents_NKD.new_zeros(len(cotangents_NKD), dtype=wide)
    for b, (first, stop) in enumerate(layout.ranges()):
        row_nD = torch.einsum("nkd,k->nd", cotangents_NKD[first:stop].to(wide), factor_BK[b])
        energy_N[first:stop] = row_nD.square().sum(1) * weight_B[b].to(device, wide)
    return energy_N if mask_N is None else energy_N * mask_N.to(device, wide)


def unit_rows(cotangents_KBX: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents scaled to unit norm, and their norms [K, B]: low precision keeps its digits, linearity undoes it."""
    norm_KB = torch.linalg.vector_norm(cotangents_KBX, dim=-1)
    return cotangents_KBX / norm_KB.clamp(min=torch.finfo(norm_KB.dtype).tiny)[..., None], norm_KB


def residual_norm(hidden: Tensor, layout: Layout) -> Tensor:
    """The mean norm of a residual stream, [b, T, D], over each prompt's tokens, [B]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    length_N = torch.linalg.vector_norm(hidden.flatten(0, 1), dim=-1, dtype=wide)
    length_N = length_N.view(len(length_N), -1).mean(1)  # of several streams their mean
    return torch.stack([length_N[a:z].mean() for a, z in layout.ranges()]).to(layout.device)


class Collected:
    """Gathers what arrives at each hooked layer; what arrives at several calls of one block is added up first."""

    def __init__(
        self,
        layout: Layout,
        outcomes: Outcomes,
        norm_KB: Tensor,
        positions: str | Tensor,
        called_often: Collection[str] = (),
    ) -> None:
        self.layout, self.outcomes, self.norm_KB = layout, outcomes, norm_KB
        self.pending: dict[str, Tensor | float] = dict.fromkeys(called_often, 0.0)
        self.mask_N = position_mask(positions, layout)
        self.gradients: dict[str, Tensor] = {}
        self.remainder: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.residual_norm: dict[str, Tensor] = {}

    def add(self, layer: str, hidden: Tensor, cotangents: Tensor) -> None:
        """Take one arrival; the last call of a block comes first."""
        if layer not in self.residual_norm:
            self.residual_norm[layer] = residual_norm(hidden, self.layout)
        if layer in self.pending:
            self.pending[layer] = cotangents + self.pending[layer]
        else:
            self._sum(layer, cotangents)

    def _sum(self, layer: str, cotangents: Tensor) -> None:
        layout, outcomes = self.layout, self.outcomes
        pulled, energy = sum_positions(cotangents, layout, self.norm_KB, outcomes.weights(), self.mask_N)
        if (derivation := outcomes.derivation()) is not None:
            combination_BC, p_B = derivation
            energy += energy_of_one(cotangents, layout, self.norm_KB, combination_BC, p_B, self.mask_N)
        self.gradients[layer], self.remainder[layer] = outcomes.scores(pulled.to(layout.device))
        self.energy[layer] = layout.to_caller(energy.to(layout.device))

    def scores(self, layers: Sequence[str]) -> Scores:
        """The record, with the layers in the order given."""
        for layer, cotangents in self.pending.items():
            assert isinstance(cotangents, Tensor)
            self._sum(layer, cotangents)
        device = self.layout.device
        return Scores(
            self.outcomes.log_probs.to(device),
            self.outcomes.token_ids.to(device),
            {layer: self.gradients[layer] for layer in layers},
            {layer: self.energy[layer] for layer in layers},
            {layer: self.residual_norm[layer] for layer in layers},
            {layer: self.remainder[layer] for layer in layers},
        )
