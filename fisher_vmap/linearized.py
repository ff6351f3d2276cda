"""The upper network as the linear map J that it is to first order, with its two products open to any vectors.

J = dh / dtheta for each prompt: theta a bias at a hooked layer, h the last token's residual stream after the last
block, before the final norm. `pullback` is J^T times vectors, `pushforward` is J times vectors.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fisher_vmap.layout import Layout

Biases = dict[str, Tensor]


class LinearizedNetwork:
    """J of one batch of prompts, for each hooked layer. `FisherModel.linearize` makes it.

    Attributes:
        output: [B, D], h at bias zero.
        layers: the names of the hooked layers.
    """

    def __init__(
        self, function: Callable[[Biases], Tensor], zeros: Mapping[str, Tensor], layout: Layout, mask_N: Tensor | None
    ) -> None:
        self._layout, self._zeros = layout, dict(zeros)
        self._function = function
        everywhere = torch.ones(len(layout.lengths), layout.width, device=layout.device)
        mask_N = layout.from_caller(everywhere) if mask_N is None else mask_N
        self._mask_BT1 = mask_N.view(*layout.input_ids.shape, 1)
        self.output, self._pull = vjp(function, self._zeros)  # type: ignore[misc]
        self.output = self.output.detach()

    @property
    def layers(self) -> list[str]:
        """The names of the hooked layers."""
        return list(self._zeros)

    def pullback(self, cotangents: Tensor, layer: str | None = None) -> Tensor:
        """J^T u for each cotangent u of h.

        Args:
            cotangents: [B, K, D], any K.
            layer: which hooked layer's J; may be left out where there is one.

        Returns:
            [B, K, D], the gradients of u . h with respect to the bias, in the model's dtype or wider.
        """
        name = self._layer(layer)
        self._check(cotangents, self.output.shape[-1])
        cotangents_KBD = cotangents.transpose(0, 1).to(self.output)
        with torch.no_grad():
            (pulled,) = vmap(self._pull)(cotangents_KBD)
        wide = torch.promote_types(pulled[name].dtype, torch.float32)
        mask = self._mask_BT1.to(pulled[name].device, pulled[name].dtype)
        return (pulled[name] * mask).sum(2, dtype=wide).transpose(0, 1)  # type: ignore[no-any-return]

    def pushforward(self, tangents: Tensor, layer: str | None = None) -> Tensor:
        """J v for each direction v of the bias.

        Args:
            tangents: [B, K, D], any K.
            layer: at which hooked layer the bias is; may be left out where there is one.

        Returns:
            [B, K, D], the derivatives of h along v.
        """
        name = self._layer(layer)
        self._check(tangents, self._zeros[name].shape[-1])

        def push(tangent_BD: Tensor) -> Tensor:
            moved = {other: torch.zeros_like(zero) for other, zero in self._zeros.items()}
            moved[name] = tangent_BD[:, None].to(self._zeros[name]) * self._mask_BT1.to(self._zeros[name])
            return jvp(self._function, (self._zeros,), (moved,))[1]  # type: ignore[no-any-return]

        with torch.no_grad():
            return vmap(push)(tangents.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    def _layer(self, layer: str | None) -> str:
        if layer is None and len(self._zeros) == 1:
            return next(iter(self._zeros))
        if layer is None or layer not in self._zeros:
            raise ValueError(f"layer is {layer!r}; expected one of the hooked layers, {self.layers}")
        return layer

    def _check(self, vectors: Tensor, width: int) -> None:
        B = len(self._layout.lengths)
        if vectors.dim() != 3 or vectors.shape[0] != B or vectors.shape[2] != width:
            raise ValueError(f"the vectors have shape {tuple(vectors.shape)}; expected [{B}, K, {width}]")
