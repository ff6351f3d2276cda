"""Rules for norms, and a test that recognises them by their output on random rows.

Everything that does not depend on the cotangent g or the tangent t is computed once. The forward is the module's own,
to the bit.

The pullback is one dot product and a fused multiply-add,

    y = w * n,  n = (x - m) r      dx = g * (w r)  -  (n r) mean(g * w * n)  -  r mean(g * w), the last if m != 0

and the pushforward has the same form with other factors:

    dy = t * (w r)  -  (w n r) mean(t * n)  -  (w r) mean(t), the last if m != 0

This saves time because elementwise operations are limited by memory, with K times the data of one backward pass:
autograd's backward of a norm makes about ten passes over [K, N, D], most of them in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.autograd import Derived, Pullback, Scratch, cotangent_dim, norm_pullback


@dataclass(frozen=True)
class NormKind:
    """The offset added to a norm's weight (0 or 1), its epsilon, and whether it subtracts the mean.

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.
    """

    offset: float
    eps: float
    centred: bool


def norm_kind(module: nn.Module) -> NormKind | None:
    """The kind of norm that a module is, by its output on random rows; None if it is not one of these."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if weight is None or weight.dim() != 1 or next(module.children(), None) is not None or "forward" in vars(module):
        return None
    if set(parameters) - {"weight", "bias"} or not weight.is_floating_point() or weight.is_meta:
        return None
    eps = next((float(v) for name, v in vars(module).items() if "eps" in name and isinstance(v, float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.numel(), generator=generator, device="cpu").add_(0.5).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            y = module(x)
        except (RuntimeError, TypeError, ValueError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        for kind in (NormKind(offset, eps, centred) for centred in (False, True) for offset in (0.0, 1.0)):
            w, n, _ = _normalised(x, weight, kind)
            expected = w * n + (parameters["bias"].to(n.dtype) if "bias" in parameters else 0)
            if (y.to(n.dtype) - expected).norm() <= 4 * torch.finfo(weight.dtype).eps * expected.norm():
                return kind
    return None


def fused_norm(module: nn.Module, kind: NormKind) -> Callable[[Tensor], Tensor]:
    """The forward of a norm of that kind, with the rules of this file."""
    own = module.forward
    weight: Tensor = module.weight  # type: ignore[assignment]
    return lambda x: _Norm.apply(x, weight.detach(), kind, own)  # type: ignore[no-any-return]


class NormRows(NamedTuple):
    """The factors of a norm's pullback at each position: dx = g * scale - back sum(g * along) - r sum(g * mean).

    The last term is that of a mean that the norm subtracts; `mean`, [D], is the same everywhere, and None without one.
    """

    scale: Tensor
    along: Tensor
    back: Tensor
    mean: Tensor | None
    r: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "NormRows":
        """The same change applied to what belongs to a position."""
        return NormRows(change(self.scale), change(self.along), change(self.back), self.mean, change(self.r))

    def to(self, dtype: torch.dtype) -> "NormRows":
        """The same in a format."""
        rows = self.each(lambda row: row.to(dtype))
        return rows if self.mean is None else rows._replace(mean=self.mean.to(dtype))

    def at(self, start: int, stop: int) -> "NormRows":
        """A range of positions, the first dimension."""
        return self.each(lambda x: x[start:stop])

    def pull(self, g: Tensor, scratch: Scratch, name: str) -> Tensor:
        """The pullback of g, in memory of that name; the rows broadcast to g."""
        return norm_pullback(g, *self, scratch, name)

    def add_pull(self, total: Tensor, g: Tensor, scratch: Scratch) -> None:
        """Add the pullback of g to `total`, in place."""
        total += norm_pullback(g, *self, scratch, "through")


def norm_rows(x: Tensor, weight: Tensor, kind: NormKind, dtype: torch.dtype) -> NormRows:
    """The factors of a norm's pullback at x, [..., D], in the dtype of the cotangents; of the shape of x."""
    weight, n, r = _normalised(x, weight, kind)
    mean = weight / n.shape[-1] if kind.centred else None
    return NormRows(weight * r, weight * n / n.shape[-1], n * r, mean, r).to(dtype)


class NormRule(NamedTuple):
    """A norm of a known kind."""

    module: nn.Module
    kind: NormKind

    def rows(self, x: Tensor) -> NormRows:
        """The rows for the pullback at x, [N, 1, ...]; the 1 broadcasts to the cotangents."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return norm_rows(x, weight.detach(), self.kind, x.dtype).each(lambda row: row[:, None])


def _normalised(x: Tensor, weight: Tensor, kind: NormKind) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's weight, n = (x - m) r and r, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + kind.eps)
    return weight.to(wide.dtype) + kind.offset, wide * r, r


class _Norm(Derived):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, kind: NormKind, own: Callable[[Tensor], Tensor]) -> Tensor:
        return own(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.kind, _own = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return _NormPullback.apply(g, *norm_rows(x, weight, ctx.kind, g.dtype)), None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        weight, n, r = _normalised(x, weight, ctx.kind)
        mean = n.new_full((n.shape[-1],), 1 / n.shape[-1]) if ctx.kind.centred else None
        rows = NormRows(weight * r, n / n.shape[-1], weight * n * r, mean, weight * r)
        return _NormPushforward.apply(t, *rows.to(t.dtype))  # type: ignore[no-any-return]


class _NormPullback(Pullback):
    @staticmethod
    def forward(g: Tensor, *rows: Tensor | None) -> Tensor:
        return _pull_norm(g, *rows)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        g = g.movedim(cotangent_dim(in_dims), -2)
        return _pull_norm(g, *NormRows(*shared).each(lambda x: x.unsqueeze(-2))), g.dim() - 2


class _NormPushforward(_NormPullback):
    """The same three products with other factors."""


def _pull_norm(g: Tensor, *rows: Tensor | None) -> Tensor:
    return NormRows(*rows).pull(g, Scratch(), "dx")  # type: ignore[arg-type]
