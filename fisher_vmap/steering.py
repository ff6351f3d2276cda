"""`steer`: adds a vector to the residual stream at a layer within a context."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fisher_vmap.model.layers import resolve_layers
from fisher_vmap.model.recording import output_of, with_output
from fisher_vmap.model.wrappers import names_inside, unwrapped


@contextmanager
def steer(
    model: nn.Module, layer: str | int, direction: Any, scale: float, *, residual_norm: float | None = None
) -> Iterator[None]:
    """Add a step along a direction to the output of a layer, at every position of every forward pass inside the block.

    step = scale * residual_norm * v, with v = direction / |direction|. It is the bias theta of the Fisher matrix F, so
    a small step changes the next-token distribution by a KL divergence of 1/2 step^T F step, in nats. `model.generate`
    works inside, with its cache: later tokens are steered too.

    Args:
        model: a causal LM, in a wrapper or not; it is restored at the end of the block, also after an error.
        layer: a module's name, or a block's number (negative from the top).
        direction: [D], a numpy array, tensor or list; its length does not matter. The sign of a Fisher matrix's
            direction is arbitrary: try both.
        scale: the step's length in units of `residual_norm`; a negative one steers the other way.
        residual_norm: the unit of `scale`, such as `record.residual_norm`; 1.0 for a step of length `scale`.
            None: each position's own norm, so that all are turned by the same angle.

    Raises:
        ValueError: no such layer, a direction that is zero or not finite, or a scale that is not finite; in the first
            forward pass, a direction whose width is not the layer's.
    """
    inner = unwrapped(model)
    given = names_inside(model, inner, layer)
    if isinstance(given, str) and given in dict(inner.named_modules()):
        name = given
    else:  # a number, or a wrong name: this runs the model
        (name,) = resolve_layers(inner, given)
    unit_D = torch.as_tensor(direction, dtype=torch.float64, device="cpu").detach()
    length = float(unit_D.norm()) if unit_D.numel() else 0.0
    if unit_D.dim() != 1 or not 0 < length < float("inf"):
        raise ValueError(
            f"the direction has shape {tuple(unit_D.shape)} and length {length:.3g}; expected [D] and a length above 0"
        )
    factor = scale * (1.0 if residual_norm is None else residual_norm)
    if not np.isfinite(factor):
        raise ValueError(f"scale is {scale} and residual_norm {residual_norm}; expected finite numbers")
    step_D = factor * unit_D / length

    # `model.wrappers.is_step` recognises this hook, which is the same at every position, by its Python module.
    def add_step(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        # Checked here, since running the model beforehand would call the user's hooks.
        stream = output_of(output)
        if stream is None or stream.shape[-1] != len(unit_D):
            shape = None if stream is None else tuple(stream.shape)
            raise ValueError(f"the direction has {len(unit_D)} entries, but {name} gives {shape}; expected as many")
        step = step_D.to(stream.device, stream.dtype)
        if residual_norm is None:
            step = step * stream.norm(dim=-1, keepdim=True)
        return with_output(output, stream + step)

    handle = inner.get_submodule(name).register_forward_hook(add_step)
    try:
        yield
    finally:
        handle.remove()
