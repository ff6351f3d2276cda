"""The matrix of a linear layer in any format of weights, and the layer's forward with that matrix's pullback.

W is what a layer makes of the identity: W^T = layer(1) - b. Some formats offer a quicker way; it is taken where it
gives the same.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.pullbacks.pullback import Derived, Pullback, Pushforward, cotangent_dim

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]

IDENTITY_ROWS = 2048  # of the identity, put through a layer at a time
# Largest relative distance between a layer's output and that of its matrix: about twice what bfloat16 makes of it, in
# which some kernels compute whatever their inputs are. One that rounds its inputs to 8 bits is off by more than 1%.
TOLERANCE = 6e-3
FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError, AttributeError, KeyError)


class Kind(NamedTuple):
    """How layers of one kind are unpacked; `reason` is empty, or says why they cannot be differentiated."""

    unpacking: int
    reason: str


def matrix_of(layer: nn.Module, forward: Forward, dtype: torch.dtype) -> Tensor:
    """W, [out, in]: what a linear layer, without its bias, makes of the identity.

    Args:
        layer: with `in_features`.
        forward: its own forward.
        dtype: of the inputs that it takes.
    """
    features = int(layer.in_features)  # type: ignore[arg-type]
    columns = []
    for start in range(0, features, IDENTITY_ROWS):
        rows = torch.zeros(min(IDENTITY_ROWS, features - start), features, dtype=dtype, device=device_of(layer))
        rows.diagonal(start).fill_(1)
        columns.append(forward(rows))
    return torch.cat(columns).T


@contextmanager
def without_bias(layer: nn.Module) -> Iterator[Tensor | None]:
    """Gives a layer's bias, which it has not within the context: beside a large one a matrix would lose its digits."""
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
    """Ways to a layer's matrix, the quickest first; only the last is sure to be right."""
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
    if getattr(weight, "quant_state", None) is not None and weight.device.type != "cpu":  # there it repacks itself
        ways.insert(0, by_bitsandbytes)
    elif isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize:
        ways.insert(0, by_tensor)
    return ways


def examine(layer: nn.Module, own: Forward, dtype: torch.dtype) -> Kind:
    """Compare a layer with its matrix, and its backward with that of the matrix where it is not the same."""
    generator = torch.Generator().manual_seed(0)
    features = int(layer.in_features)  # type: ignore[arg-type]
    x = torch.randn(8, features, generator=generator, device="cpu")
    # An outlier in each row: a format of 8 bits that has to reach it leaves little for the rest.
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
    reason = f"is no matrix (it is {gap:.1%} off: it rounds its inputs as well), so that it has no gradient"
    if not has_own_pullback(layer, own, dtype):
        return Kind(0, reason)
    log.info("%s rounds its inputs: its gradient is that of its own backward, straight through", type(layer).__name__)
    return Kind(len(ways) - 1, "")


def has_own_pullback(layer: nn.Module, own: Forward, dtype: torch.dtype) -> bool:
    """Whether a layer's own backward is the pullback of its matrix; some formats have none, or none that is right."""
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
    """A failure of a layer's own forward, in words."""
    return f"does not run here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer is: its first tensor that is loaded."""
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta]
    return tensors[0].device if tensors else torch.device("cpu")


def with_pullback(own: Forward, matrix: Callable[[], Tensor]) -> Forward:
    """A layer's own forward, to the bit, with the pullback of the matrix that a function gives."""
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
    """G W; with the transpose of W, the pushforward."""

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
    """T W^T."""


def _product(g: Tensor, matrix: Callable[[], Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.no_grad():
        return (g @ matrix().to(g)).to(device, dtype)
