"""Linear layers with quantised weights, differentiated without unpacking the model.

Few formats of quantised weights can be differentiated with respect to their input, and hardly any under `torch.func`.
But a layer with quantised weights is still an affine map, y = W x + b, and applying the layer to the identity gives W:
W^T = layer(1) - b. So the forward is the layer's own, to the bit, and the pullback is g W, with W unpacked only for
that product. Some formats have a quicker way to W, which is used if it gives the same matrix.

Each layer is tested first. A layer that also rounds its inputs is not linear, and has no gradient except one that its
own backward defines.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, cotangent_dim
from fisher_vmap.model.offload import FLOATS, input_device, is_offloaded, model_dtype
from fisher_vmap.model.patches import Remembered
from fisher_vmap.model.recording import forwards_set

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]
Found = TypeVar("Found")

IDENTITY_ROWS = 2048  # rows of the identity that go through a layer at a time
# Largest relative distance between the outputs of a layer and of its matrix: about twice the rounding of bfloat16, in
# which some kernels compute for any input. A layer that rounds its inputs to 8 bits is off by more than 1%.
TOLERANCE = 6e-3
FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, AttributeError, KeyError)

_FOUND: dict[tuple[Any, ...], Any] = {}  # results of tests, by kind of layer
_FORWARDS: Remembered[dict[nn.Module, Forward]] = Remembered()  # by layer


class CannotDifferentiate(ValueError):
    """A layer has no gradient with respect to its input; the message is for the user."""


class Kind(NamedTuple):
    """Which of its `unpackings` a kind of layer uses; `reason` says why it cannot be differentiated, or is empty."""

    unpacking: int
    reason: str


def matrix_of(layer: nn.Module, forward: Forward, dtype: torch.dtype) -> Tensor:
    """W, [out, in], of a linear layer without its bias: its own forward applied to the identity in `dtype`."""
    features = int(layer.in_features)  # type: ignore[arg-type]
    columns = []
    for start in range(0, features, IDENTITY_ROWS):
        rows = torch.zeros(min(IDENTITY_ROWS, features - start), features, dtype=dtype, device=device_of(layer))
        rows.diagonal(start).fill_(1)
        columns.append(forward(rows))
    return torch.cat(columns).T


@contextmanager
def without_bias(layer: nn.Module) -> Iterator[Tensor | None]:
    """Temporarily remove the layer's bias and yield it: added to a large bias, a matrix would lose digits."""
    owners: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    for owner in owners:
        if isinstance(bias := owner.get("bias"), Tensor):
            owner["bias"] = None
            try:
                yield bias
            finally:
                owner["bias"] = bias
            return
    yield None


def unpackings(layer: nn.Module, own: Forward, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """Functions that return a layer's matrix, the quickest first; only the last is always right."""
    weight: Any = getattr(layer, "weight", None)

    def by_tensor() -> Tensor:
        return layer.weight.dequantize().to(dtype)  # type: ignore[operator, union-attr, no-any-return]

    def by_bitsandbytes() -> Tensor:
        packed: Any = layer.weight
        library = sys.modules["bitsandbytes"]
        return library.functional.dequantize_4bit(packed.data, packed.quant_state).to(dtype)  # type: ignore[no-any-return]

    def by_identity() -> Tensor:
        with without_bias(layer):
            return matrix_of(layer, own, dtype)

    ways: list[Callable[[], Tensor]] = [by_identity]
    if getattr(weight, "quant_state", None) is not None and weight.device.type != "cpu":  # repacked on a CPU
        ways.insert(0, by_bitsandbytes)
    elif isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        ways.insert(0, by_tensor)
    return ways


def examine(layer: nn.Module, own: Forward, dtype: torch.dtype) -> Kind:
    """Compare a layer with its matrix, and if they differ, the layer's backward with that of the matrix."""
    generator = torch.Generator().manual_seed(0)
    features = int(layer.in_features)  # type: ignore[arg-type]
    x = torch.randn(8, features, generator=generator, device="cpu")
    # An outlier in each row: an 8-bit format whose range includes it has little precision left for the rest.
    outliers = x * torch.where(
        torch.arange(features, device="cpu") == torch.arange(8, device="cpu")[:, None] * 5 % features, 100, 1
    )
    x, outliers = x.to(device_of(layer), dtype), outliers.to(device_of(layer), dtype)
    try:
        with torch.no_grad():
            with without_bias(layer):
                outputs = [(inputs, own(inputs)) for inputs in (x, outliers)]
            ways = [way() for way in unpackings(layer, own, dtype)]
        wide = torch.promote_types(outputs[0][1].dtype, torch.float32)
        for number, weight in enumerate(ways):
            gap = max(_distance(y, inputs.to(wide) @ weight.to(wide).T) for inputs, y in outputs)
            if gap <= TOLERANCE:
                return Kind(number, "")
    except FAILURES as error:
        return Kind(0, does_not_run(error))
    reason = f"is not linear (it is {gap:.1%} off: it rounds its inputs as well), so it has no gradient"
    if not has_own_pullback(layer, own, dtype):
        return Kind(0, reason)
    log.info("%s rounds its inputs: its gradient is that of its own straight-through backward", type(layer).__name__)
    return Kind(len(ways) - 1, "")


def has_own_pullback(layer: nn.Module, own: Forward, dtype: torch.dtype) -> bool:
    """Whether a layer's own backward is the pullback of its matrix; some formats have none, or a wrong one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, int(layer.in_features), generator=generator, device="cpu").to(device_of(layer), dtype)  # type: ignore[arg-type]
    try:
        with torch.no_grad(), without_bias(layer):
            weight = matrix_of(layer, own, dtype)
        with torch.enable_grad():
            y = own(x.requires_grad_())
            g = torch.randn(y.shape, generator=generator, device="cpu").to(y)
            (dx,) = torch.autograd.grad(y, x, g)
    except FAILURES:
        return False
    wide = torch.promote_types(dtype, torch.float32)
    return _distance(dx, g.to(wide) @ weight.to(wide)) <= TOLERANCE


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.to(expected.dtype) - expected).norm() / expected.norm().clamp(min=1e-30))


def does_not_run(error: Exception) -> str:
    """The error of a layer's own forward, in words."""
    return f"does not run here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def device_of(layer: nn.Module) -> torch.device:
    """The device of a layer's first loaded tensor."""
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta]
    return tensors[0].device if tensors else torch.device("cpu")


def with_pullback(own: Forward, matrix: Callable[[], Tensor]) -> Forward:
    """A layer's own forward, to the bit, with the pullback of the matrix that a function returns."""
    return lambda x: _Quantized.apply(x, own, matrix)  # type: ignore[no-any-return]


class _Quantized(Derived):
    @staticmethod
    def forward(x: Tensor, own: Forward, matrix: Callable[[], Tensor]) -> Tensor:
        return own(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _own, ctx.matrix = inputs
        ctx.y_dtype, ctx.y_device = output.dtype, output.device
        ctx.x_dtype, ctx.x_device = x.dtype, x.device

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _QuantizedPullback.apply(g, ctx.matrix, ctx.x_dtype, ctx.x_device), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        matrix = ctx.matrix
        return _QuantizedPush.apply(tangent, lambda: matrix().T, ctx.y_dtype, ctx.y_device)  # type: ignore[no-any-return]


class _QuantizedPullback(Pullback):
    """The product g W; with the transpose of W, the pushforward."""

    @staticmethod
    def forward(g: Tensor, matrix: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
        return _product(g, matrix, dtype, device)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        batched = cotangent_dim(in_dims)
        if batched == g.dim() - 1:
            g, batched = g.movedim(-1, 0), 0
        return _product(g, *shared), batched


class _QuantizedPush(_QuantizedPullback, Pushforward):
    """The product t W^T."""


def _product(g: Tensor, matrix: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.no_grad():
        return (g @ matrix().to(g)).to(device, dtype)


@contextmanager
def quantized_pullbacks(model: nn.Module) -> Iterator[None]:
    """Within the context linear layers with quantised weights can be differentiated by their input, also under vmap.

    Raises:
        CannotDifferentiate: this is impossible for some of the model's quantised weights.
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
    """The linear layers of a model, by name, whose weights are not plain tensors of floats."""
    return {name: module for name, module in model.named_modules() if _is_quantized(module) and _is_linear(module)}


def has_matrix(module: nn.Module | None) -> bool:
    """Whether a module is a plain linear layer whose `weight` is its matrix; torchao replaces only the tensor."""
    return type(module) is nn.Linear and "weight" in module._parameters and is_float(module.weight)


def plain_matrix(module: nn.Module | None) -> Tensor | None:
    """W, [out, in], of a plain linear layer, nn.Linear or transformers' Conv1D; None for other modules."""
    if has_matrix(module):
        return module.weight.detach()  # type: ignore[union-attr, operator, return-value]
    made = (type(module).__module__, type(module).__qualname__)
    if made == ("transformers.pytorch_utils", "Conv1D") and is_float(module.weight):  # type: ignore[union-attr, arg-type]
        return module.weight.detach().T  # type: ignore[union-attr, operator, return-value]
    return None


def is_affine(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer, or transformers' `Conv1D`, that runs its class's forward."""
    return plain_matrix(module) is not None and runs_as_made(module)


def weight_matrix(module: nn.Module) -> Tensor:
    """The matrix of a module that `is_affine`, [out, in]."""
    matrix = plain_matrix(module)
    assert matrix is not None
    return matrix


def runs_as_made(module: nn.Module | None) -> bool:
    """Whether a module runs its class's forward on loaded weights: no hook, no replaced forward, not offloaded."""
    if module is None:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and "forward" not in vars(module) and not is_offloaded(module)


def _patched_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers with plain weights whose replaced forward has no gradient or a wrong one."""
    patched = {n: m for n, m in model.named_modules() if "forward" in vars(m) and _is_linear(m) and not is_offloaded(m)}
    dtype = model_dtype(model)
    return {name: m for name, m in patched.items() if not _is_quantized(m) and not _kind(m, dtype, has_own_pullback)}


def _settle(model: nn.Module) -> None:
    """Run a model once, because some formats are unpacked or repacked at the first call."""
    if hasattr(model, "config") and quantized_linears(model):
        with torch.no_grad(), suppress(*FAILURES):  # later each layer is tested by itself
            model(input_ids=torch.tensor([[0, 0]], device=input_device(model)), use_cache=False)


def check_others(model: nn.Module) -> None:
    """Raise CannotDifferentiate if quantised weights are in a module other than a linear layer or an embedding."""
    for name, module in model.named_modules():
        if type(module._parameters).__module__.partition(".")[0] == "compressed_tensors":
            raise CannotDifferentiate(
                f"{name} keeps its weights in compressed-tensors' own storage, which does not work under torch.func; "
                "load the model with CompressedTensorsConfig(dequantize=True), or by path with dequantize: true"
            )
        if isinstance(module, nn.Embedding):
            continue
        for own, parameter in module._parameters.items():
            odd = parameter is not None and parameter.dim() >= 2 and not is_float(parameter)
            if odd and not _is_linear(module):
                reason = "is neither a linear layer nor an embedding, so its quantised weights cannot be unpacked"
                raise CannotDifferentiate(_refusal(f"{name}.{own}", module, reason))


def unpack(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace every linear layer with quantised weights by a plain one with the same matrix; returns their names.

    Raises:
        CannotDifferentiate: quantised weights are outside of linear layers, or a layer does not run here.
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
    """Whether a module looks like a single linear layer: it has in and out features and no children."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) for size in sizes) and next(module.children(), None) is None


def _is_quantized(module: nn.Module) -> bool:
    """Whether a module itself has a tensor other than of floats; masks and scalars do not count."""
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(t is not None and t.dtype != torch.bool and t.dim() > 0 and not is_float(t) for t in tensors)


def is_float(tensor: Tensor) -> bool:
    """Whether a tensor holds plain numbers: it has a float format, and its class does not override `dequantize`."""
    return tensor.dtype in FLOATS and type(tensor).dequantize is Tensor.dequantize


def _differentiable(name: str, layer: nn.Module, dtype: torch.dtype) -> Forward:
    """The layer's forward with the pullback of its matrix."""
    kind = _kind(layer, dtype, examine)
    if kind.reason:
        raise CannotDifferentiate(_refusal(name, layer, kind.reason))
    own: Forward = layer.forward
    return with_pullback(own, unpackings(layer, own, dtype)[kind.unpacking])


def _kind(layer: nn.Module, dtype: torch.dtype, test: Callable[[nn.Module, Forward, torch.dtype], Found]) -> Found:
    """The result of a test of a layer, run once for all layers of the same class, format and size."""
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
