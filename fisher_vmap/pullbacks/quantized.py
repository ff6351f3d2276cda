"""Linear layers whose weights are quantised, differentiated without unpacking the model.

Of the many formats of quantised weights few can be differentiated with respect to their input, and hardly one under
`torch.func`. But a layer with quantised weights is a matrix still, y = W x + b, and W is what the layer itself makes of
the identity: W^T = layer(1) - b. So its forward stays its own, to the bit, and its pullback is g W, with W unpacked for
as long as that product takes. That a layer is such a matrix is tested before it is relied on: one that rounds its
inputs as well is none, and has no gradient but the one that its own backward may define.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.placement import FLOATS, input_device, model_dtype, put_aside
from fisher_vmap.anatomy.recording import forwards_set
from fisher_vmap.anatomy.remembered import Remembered
from fisher_vmap.pullbacks.unpacking import (
    FAILURES,
    Forward,
    device_of,
    does_not_run,
    examine,
    has_own_pullback,
    matrix_of,
    unpackings,
    with_pullback,
    without_bias,
)

Found = TypeVar("Found")


class CannotDifferentiate(ValueError):
    """A layer has no gradient with respect to its input; the message is for the user."""


_FOUND: dict[tuple[Any, ...], Any] = {}
_FORWARDS: Remembered[dict[nn.Module, Forward]] = Remembered()  # by layer


@contextmanager
def quantized_pullbacks(model: nn.Module) -> Iterator[None]:
    """Within the context every linear layer with quantised weights can be differentiated by its input, under vmap too.

    Raises:
        CannotDifferentiate: the model has quantised weights for which that cannot be done.
    """
    if model not in _FORWARDS:
        _settle(model)
    forwards = _FORWARDS.setdefault(model, {})
    layers = quantized_linears(model) | _patched_linears(model)
    check_others(model)
    for name, layer in layers.items():
        if layer not in forwards:
            forwards[layer] = _differentiable(name, layer, model_dtype(model))
    with forwards_set((layer, forwards[layer]) for layer in layers.values()):
        yield


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model, by name, whose weights are not ordinary tensors of floats."""
    return {name: module for name, module in model.named_modules() if _is_quantized(module) and _is_linear(module)}


def has_matrix(module: nn.Module | None) -> bool:
    """Whether a module is an ordinary linear layer whose `weight` is its matrix; torchao exchanges the tensor alone."""
    return type(module) is nn.Linear and "weight" in module._parameters and _is_float(module.weight)


def runs_as_made(module: nn.Module | None) -> bool:
    """Whether nothing has been put between a module's caller and its class: no hook, no other forward, all weights."""
    if module is None:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module) and not put_aside(module)


def _patched_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Layers of ordinary weights whose forward somebody has exchanged for one that loses the gradient, or bends it."""
    patched = {n: m for n, m in model.named_modules() if "forward" in vars(m) and _is_linear(m) and not put_aside(m)}
    dtype = model_dtype(model)
    return {name: m for name, m in patched.items() if not _is_quantized(m) and not _kind(m, dtype, has_own_pullback)}


def _settle(model: nn.Module) -> None:
    """Run a model once: some formats are unpacked, or packed in another way, at the first call."""
    if hasattr(model, "config") and quantized_linears(model):
        with torch.no_grad(), suppress(*FAILURES):  # where a layer does not run is found out layer by layer
            model(input_ids=torch.tensor([[0, 0]], device=input_device(model)), use_cache=False)


def check_others(model: nn.Module) -> None:
    """Raise CannotDifferentiate for quantised weights that are in neither a linear layer nor an embedding."""
    for name, module in model.named_modules():
        if type(module._parameters).__module__.partition(".")[0] == "compressed_tensors":
            raise CannotDifferentiate(
                f"{name} keeps its weights in compressed-tensors' own storage, which does not work under torch.func; "
                "load the model with CompressedTensorsConfig(dequantize=True), or by path with dequantize: true"
            )
        if isinstance(module, nn.Embedding):
            continue
        for own, parameter in module._parameters.items():
            odd = parameter is not None and parameter.dim() >= 2 and not _is_float(parameter)
            if odd and not _is_linear(module):
                reason = "is neither a linear layer nor an embedding, so that its quantised weights cannot be unpacked"
                raise CannotDifferentiate(_refusal(f"{name}.{own}", module, reason))


def unpack(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace every linear layer with quantised weights by an ordinary one of the same matrix; returns their names.

    Raises:
        CannotDifferentiate: quantised weights that are in no linear layer, or in one that does not run here.
    """
    layers = quantized_linears(model)
    check_others(model)
    for name, layer in layers.items():
        try:
            with torch.no_grad(), without_bias(layer) as bias:
                weight = matrix_of(layer, layer.forward, model_dtype(model)).to(dtype).contiguous()
        except FAILURES as error:
            raise CannotDifferentiate(_refusal(name, layer, does_not_run(error))) from error
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().to(weight), requires_grad=False)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain.eval())
    return list(layers)


def _is_linear(module: nn.Module) -> bool:
    """Whether a module says of itself that it is one linear layer."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and next(module.children(), None) is None


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module itself has a tensor that is not of floats, but for masks and numbers."""
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(t is not None and t.dtype != torch.bool and t.dim() > 0 and not _is_float(t) for t in tensors)


def _is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds the numbers that it stands for: not packed, nor of a class that says how to unpack it."""
    return tensor.dtype in FLOATS and type(tensor).dequantize is Tensor.dequantize


def _differentiable(name: str, layer: nn.Module, dtype: torch.dtype) -> Forward:
    """The layer's forward with the pullback of its matrix.

    Raises:
        CannotDifferentiate: it is no matrix.
    """
    kind = _kind(layer, dtype, examine)
    if kind.reason:
        raise CannotDifferentiate(_refusal(name, layer, kind.reason))
    own: Forward = layer.forward
    return with_pullback(own, unpackings(layer, own, dtype)[kind.unpacking])


def _kind(layer: nn.Module, dtype: torch.dtype, test: Callable[[nn.Module, Forward, torch.dtype], Found]) -> Found:
    """What a test finds of a layer; the same for all of one make, format and size."""
    own: Forward = layer.forward
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    made = (type(layer), type(own), getattr(own, "__qualname__", ""), dtype, device_of(layer))
    key = (test, *made, *((name, type(t), t.dtype, t.shape) for name, t in tensors))
    if key not in _FOUND:
        _FOUND[key] = test(layer, own, dtype)
    return _FOUND[key]  # type: ignore[no-any-return]


def _refusal(name: str, module: nn.Module, reason: str) -> str:
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    if isinstance(weight, Tensor):
        kind += f" with {type(weight).__name__} weights of {str(weight.dtype).removeprefix('torch.')}"
    return f"{name} ({kind}) {reason}; load the model with its weights unpacked (dequantize: true)"
