"""The record that the kernel returns: scores of the top-k tokens at every hooked layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    """Scores g_t = d log p_t / d theta of the K likeliest next tokens, theta a bias on the residual stream.

    float32, or float64 where the model is float64. log p is in nats, scores in nats per unit of residual stream.

    Attributes:
        log_probs: [B, K], highest first.
        token_ids: [B, K] int64.
        gradients: for each hooked layer, [B, K, D].
        position_energy: for each hooked layer, [B, T] in the caller's columns: sum_t p_t |g_t at this position|^2.
        residual_norm: for each hooked layer, [B]: the mean norm of its output over the prompt's tokens.
        remainder: for each hooked layer, [B, S, D]: random vectors r with E[r r^T] = the Fisher matrix of the whole
            vocabulary less that of the K tokens; S is what was asked for.
    """

    log_probs: Tensor
    token_ids: Tensor
    gradients: dict[str, Tensor]
    position_energy: dict[str, Tensor]
    residual_norm: dict[str, Tensor]
    remainder: dict[str, Tensor]

    def factor(self, layer: str | None = None) -> Tensor:
        """A = diag(sqrt p) G, [B, K, D]: the Fisher matrix of each prompt is A^T A.

        Args:
            layer: the name of a hooked layer; may be left out where there is only one.

        Raises:
            ValueError: the layer was not hooked, or none was named and there are several.
        """
        if layer is None and len(self.gradients) == 1:
            layer = next(iter(self.gradients))
        if layer not in self.gradients:
            raise ValueError(f"layer {layer!r} has no scores here; expected one of {list(self.gradients)}")
        return torch.exp(self.log_probs / 2)[:, :, None] * self.gradients[layer]
