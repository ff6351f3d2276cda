"""`steer`: adds vectors to the residual stream within a context. `Step`: such a vector, and where it belongs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fisher_vmap.errors import UserError
from fisher_vmap.model.layers import resolve_layers
from fisher_vmap.model.recording import hooks
from fisher_vmap.model.steps import OF_THE_BIAS, POSITIONS, AddStep, Passes
from fisher_vmap.model.validation import check_tensor
from fisher_vmap.model.wrappers import names_inside, unwrapped


@dataclass(frozen=True, eq=False)
class Step:
    """A vector for the residual stream.

    Attributes:
        step: [D], float32 or float64, on the CPU, in the units of the residual stream.
        layer: the name of the module to whose output it is added.
        positions: at which positions: see `steer`.
    """

    step: Tensor
    layer: str
    positions: str | Tensor = "all"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """[D], for numpy."""
        array: NDArray[Any] = self.step.numpy()
        return array.copy() if copy else array if dtype is None else array.astype(dtype)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Step":
        """Read a file of `fisher-vmap steer-to`: safetensors with a tensor `step` and where it belongs.

        Raises:
            UserError: there is no such file, or it is another kind of file.
        """
        from safetensors import SafetensorError, safe_open

        path = os.path.expanduser(path)
        try:
            with safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                return Step(file.get_tensor("step"), notes["layer"], notes.get("positions", "all"))
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"{path} holds no step ({' '.join(str(error).split())[:120]}); expected a .safetensors file of "
                "fisher-vmap steer-to"
            ) from error


@contextmanager
def steer(
    model: nn.Module,
    layer: str | int | Step | Sequence[Step] | Mapping[Any, Any],
    direction: Any = None,
    scale: float | None = None,
    *,
    residual_norm: float | None = None,
    positions: str | Tensor | None = None,
) -> Iterator[None]:
    """Add steps to the output of layers in every forward pass inside the block.

    For a direction v, step = scale * residual_norm * v / |v|. It is the bias theta of the Fisher matrix F, so a small
    step changes the next-token distribution by a KL divergence of 1/2 step^T F step, in nats. A `Step`, such as
    `natural_step` gives, has its own length and layer. `model.generate` works inside, with a cache or without.

    Args:
        model: a causal LM, in a wrapper or not, on one device or several; it is restored at the end of the block, also
            after an error.
        layer: a module's name, or a block's number (negative from the top). Or a `Step`, or several, each for its own
            layer; or directions by layer, {15: v, 20: w}, all with the same `scale`.
        direction: [D], a numpy array, tensor or list; its length does not matter. The sign of a Fisher matrix's
            direction is arbitrary: try both. Or a `Step` for that layer.
        scale: the step's length in units of `residual_norm`; a negative one steers the other way. Of a `Step` a factor,
            1 if not given.
        residual_norm: the unit of `scale`, such as `record.residual_norm`; 1.0 for a step of length `scale`.
            None: each position's own norm, so that all are turned by the same angle. Not for a `Step`.
        positions: where a step is added: "all" (the default) positions; the "last" token of each prompt; every token of
            the "prompt", or of its "completion"; or a mask [B, T] of the prompts. What the first forward pass over a
            sequence takes is its prompt; all that later passes add is its completion. None: as the `Step` says.

    Raises:
        ValueError: no such layer, a direction that is zero or not finite, a scale that is missing or not finite, or
            unknown positions; in the first forward pass, a direction whose width is not the layer's.
    """
    inner, passes = unwrapped(model), Passes()
    how = (scale, residual_norm, positions)
    steps = [_hook(model, inner, passes, at, vector, *how) for at, vector in _each(layer, direction)]
    handles = [inner.get_submodule(name).register_forward_hook(hook) for name, hook in steps]
    if not all(hook.fits_any_batch for _, hook in steps):
        handles.append(inner.register_forward_pre_hook(passes, with_kwargs=True))
    with hooks(*handles):
        yield


@contextmanager
def at_point(model: nn.Module, layer: str, point_D: Tensor) -> Iterator[None]:
    """The network at a bias other than zero: the point is added where the layout of a run has the bias.

    What is known of the model holds there as well. The model must be the one inside any wrapper.
    """
    hook = AddStep(layer, point_D.double().cpu(), OF_THE_BIAS, False, Passes())
    with hooks(model.get_submodule(layer).register_forward_hook(hook)):
        yield


def _each(layer: Any, direction: Any) -> list[tuple[str | int, Any]]:
    """(layer, direction or `Step`) of what `steer` was given."""
    if isinstance(layer, str | int):
        if direction is None:
            raise ValueError("steer was given a layer and no direction; give [D], or a Step in place of the layer")
        return [(layer, direction)]
    if direction is not None:
        raise ValueError(f"direction was given beside {type(layer).__name__}; give it with a layer's name or number")
    if isinstance(layer, Mapping):
        return list(layer.items())
    steps = [layer] if isinstance(layer, Step) else list(layer)
    if bad := [step for step in steps if not isinstance(step, Step)]:
        raise ValueError(f"{bad[0]!r} is no Step; expected a layer's name or number, Steps, or directions by layer")
    return [(step.layer, step) for step in steps]


def _hook(
    model: nn.Module,
    inner: nn.Module,
    passes: Passes,
    layer: str | int,
    direction: Any,
    scale: float | None,
    residual_norm: float | None,
    positions: str | Tensor | None,
) -> tuple[str, AddStep]:
    """The name of a layer's module, and its hook."""
    given = names_inside(model, inner, layer)
    if isinstance(given, str) and given in dict(inner.named_modules()):
        name = given
    else:  # a number, or a wrong name: this runs the model
        (name,) = resolve_layers(inner, given)
    own = direction.positions if isinstance(direction, Step) else "all"
    where = own if positions is None else positions
    if isinstance(where, str) and where not in POSITIONS:
        raise ValueError(f"positions is {where!r}; expected one of {', '.join(POSITIONS)}, or a mask [B, T]")
    if not isinstance(where, str):
        check_tensor("positions", where, "[B, T]")
    vector_D, in_norms = _vector(direction, scale, residual_norm)
    return name, AddStep(name, vector_D, where, in_norms, passes)


def _vector(direction: Any, scale: float | None, residual_norm: float | None) -> tuple[Tensor, bool]:
    """The step, [D] float64, and whether it is in units of each position's norm."""
    vector_D = torch.as_tensor(direction.step if isinstance(direction, Step) else direction)
    vector_D = vector_D.detach().to("cpu", torch.float64)
    length = float(vector_D.norm()) if vector_D.numel() else 0.0
    if vector_D.dim() != 1 or not 0 < length < float("inf"):
        shape = tuple(vector_D.shape)
        raise ValueError(f"the direction has shape {shape} and length {length:.3g}; expected [D] and a length above 0")
    if isinstance(direction, Step):
        if residual_norm is not None:
            raise ValueError("residual_norm was given with a Step, which has its own length; leave it out")
        factor, length = 1.0 if scale is None else scale, 1.0
    elif scale is None:
        raise ValueError("scale is missing; a direction has no length of its own: give the step's length")
    else:
        factor = scale * (1.0 if residual_norm is None else residual_norm)
    if not np.isfinite(factor):
        raise ValueError(f"scale is {scale} and residual_norm {residual_norm}; expected finite numbers")
    return factor * vector_D / length, residual_norm is None and not isinstance(direction, Step)
