"""What arrives at the hooked layers, gathered into the record of a batch's scores."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.outcomes import Outcomes
from fisher_vmap.scores import Scores
from fisher_vmap.upper_network.positions import energy_of_one, position_mask, sum_positions


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
