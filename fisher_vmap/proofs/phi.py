"""What a model does to its logits after the unembedding: a scale, a soft-cap, told by planting logits of every size.

Planted, because a soft-cap is the identity, to rounding, for the small logits that a short prompt may have.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import forward_inputs
from fisher_vmap.anatomy.recording import hooks
from fisher_vmap.head import Phi


def find_phi(model: nn.Module, unembedding: nn.Module, input_ids: Tensor) -> Phi | None:
    """The function from the unembedding's output to the model's logits; None where it is none that its config names.

    Proven on planted logits from 1e-3 to 1e3, on a forward of [B, T] tokens.
    """
    planted: list[Tensor] = []

    def plant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        size = torch.logspace(-3, 3, output.numel(), dtype=torch.float64, device="cpu")
        sign = torch.where(torch.arange(output.numel(), device="cpu") % 2 == 0, 1.0, -1.0)
        planted.append((size * sign).view(output.shape).to(output))
        return planted[-1]

    with torch.no_grad(), hooks(unembedding.register_forward_hook(plant, prepend=True)):
        logits: Tensor = model(**forward_inputs(model, input_ids)).logits
    x, z = planted[0].double(), logits.double().to(planted[0].device)
    eps = max(torch.finfo(planted[0].dtype).eps, torch.finfo(logits.dtype).eps)
    fits = (phi for phi in _candidates(model) if bool(((phi(x) - z).abs() <= 8 * eps * z.abs()).all()))
    return next(fits, None)


def _candidates(model: nn.Module) -> list[Phi]:
    """Every scale and every soft-cap that the model's configuration has a number for, the plainest first."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = _positive_numbers(vars(config) if hasattr(config, "__dict__") else {})
    caps: list[float | None] = [None, *sorted({v for name, v in numbers.items() if "cap" in name})]
    told = {v for name, v in numbers.items() if "logit" in name or "lm_head" in name}
    scales = [1.0, *sorted({*told, *(1 / v for v in told)} - {1.0})]
    return [Phi(scale, cap) for scale in scales for cap in caps]


def _positive_numbers(config: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in config.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
