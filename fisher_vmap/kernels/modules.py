"""Rules for norms and gated MLPs, and tests that recognise these modules by their output on random rows.

Everything that does not depend on the cotangent g or the tangent t is computed once. The forward is the module's own,
to the bit.

Norms: the pullback is one dot product and a fused multiply-add,

    y = w * n,  n = (x - m) r      dx = g * (w r)  -  (n r) mean(g * w * n)  -  r mean(g * w), the last if m != 0

and the pushforward has the same form with other factors:

    dy = t * (w r)  -  (w n r) mean(t * n)  -  (w r) mean(t), the last if m != 0

This saves time because elementwise operations are limited by memory, with K times the data of one backward pass:
autograd's backward of a norm makes about ten passes over [K, N, D], most of them in float32.

Gated MLPs: each derivative is three matrix products with two elementwise products between them.

    y = (act(a) * b) W_d^T,  a = x W_a^T,  b = x W_b^T

    dx = (h * b act'(a)) W_a  +  (h * act(a)) W_b,   h = g W_d
    dy = ((t W_a^T) * b act'(a)  +  (t W_b^T) * act(a)) W_d^T
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp

from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, Scratch, cotangent_dim, norm_pullback
from fisher_vmap.kernels.quantized import has_matrix, runs_as_made


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

    The last term is that of a mean that the norm subtracts; without one `mean` is None.
    """

    scale: Tensor
    along: Tensor
    back: Tensor
    mean: Tensor | None
    r: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "NormRows":
        """The same change applied to every tensor."""
        return NormRows(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

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
    mean = (weight / n.shape[-1]).expand_as(n) if kind.centred else None
    return NormRows(weight * r, weight * n / n.shape[-1], n * r, mean, r).each(lambda row: row.to(dtype))


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
        mean = torch.full_like(r, 1 / n.shape[-1]).expand_as(n) if ctx.kind.centred else None
        rows = NormRows(weight * r, n / n.shape[-1], weight * n * r, mean, weight * r)
        return _NormPushforward.apply(t, *rows.each(lambda row: row.to(t.dtype)))  # type: ignore[no-any-return]


class _NormPullback(Pullback):
    @staticmethod
    def forward(g: Tensor, *rows: Tensor | None) -> Tensor:
        return _pull_norm(g, *rows)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        g = g.movedim(cotangent_dim(in_dims), -2)
        rows = (None if x is None else x.unsqueeze(-2) for x in shared)
        return _pull_norm(g, *rows), g.dim() - 2


class _NormPushforward(_NormPullback):
    """The same three products with other factors."""


def _pull_norm(g: Tensor, *rows: Tensor | None) -> Tensor:
    return NormRows(*rows).pull(g, Scratch(), "dx")  # type: ignore[arg-type]


@dataclass(frozen=True)
class MlpParts:
    """The parts of a gated MLP, down(act(gate(x)) * up(x)).

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.
    """

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    act: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, module: Any) -> "MlpParts":
        """The present parts of a module, by their names."""
        return cls(module.gate_proj, module.up_proj, module.down_proj, module.act_fn)

    def weights(self) -> tuple[Tensor, ...]:
        """W_a and W_b, [M, D], and W_d, [D, M]."""
        return tuple(part.weight.detach() for part in (self.gate, self.up, self.down))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The module's output at x, and a and b, which its derivatives need."""
        a, b = self.gate(x), self.up(x)
        return self.down(self.act(a) * b), a, b

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of act(a) * b: b act'(a) with respect to a, act(a) with respect to b."""
        act_a, pull = vjp(self.act, a)  # type: ignore[misc]
        (slope,) = pull(torch.ones_like(a))
        return slope * b, act_a


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is a gated MLP, by its parts and by its output on random rows."""
    linears = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    # A subclass of Linear may do more.
    if not all(isinstance(part, nn.Linear) and has_matrix(part) and runs_as_made(part) for part in linears):
        return False
    if getattr(module, "act_fn", None) is None or "forward" in vars(module):
        return False
    parts = MlpParts.of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, parts.gate.in_features, generator=generator, device="cpu").to(parts.gate.weight)
    with torch.no_grad():
        try:
            return torch.equal(module(x), parts.forward(x)[0])
        except (RuntimeError, TypeError, ValueError):
            return False


def fused_gated_mlp(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a gated MLP, with the rules of this file."""
    parts = MlpParts.of(module)
    return lambda x: _GatedMlp.apply(x, parts)[0]  # type: ignore[no-any-return]


class _GatedMlp(Derived):
    @staticmethod
    def forward(x: Tensor, parts: MlpParts) -> tuple[Tensor, Tensor, Tensor]:
        return parts.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _x, ctx.parts = inputs
        _y, a, b = output
        ctx.mark_non_differentiable(a, b)
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _ga: Any, _gb: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _GatedMlpPullback.apply(g, *ctx.parts.factors(*ctx.saved_tensors), *ctx.parts.weights()), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        moved = _GatedMlpPushforward.apply(t, *ctx.parts.factors(*ctx.saved_tensors), *ctx.parts.weights())
        return moved, None, None


class _GatedMlpPullback(Pullback):
    @staticmethod
    def forward(g: Tensor, to_gate: Tensor, to_up: Tensor, *weights: Tensor) -> Tensor:
        return pull_mlp(g, to_gate, to_up, weights, Scratch())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        to_gate, to_up, *weights = shared
        g = g.movedim(cotangent_dim(in_dims), -2)
        return pull_mlp(g, to_gate.unsqueeze(-2), to_up.unsqueeze(-2), weights, Scratch()), g.dim() - 2


def pull_mlp(g: Tensor, to_gate: Tensor, to_up: Tensor, weights: Sequence[Tensor], scratch: Scratch) -> Tensor:
    """The pullback of g, [..., D], through a gated MLP, in scratch memory.

    `to_gate` is b act'(a) and `to_up` is act(a), which broadcast to [..., M]; `weights` are those of gate, up and down.
    """
    w_gate, w_up, w_down = weights
    rows = g.flatten(0, -2)
    h = torch.mm(rows, w_down, out=scratch("h", (len(rows), w_down.shape[1]), g)).view(*g.shape[:-1], -1)
    gated = torch.mul(h, to_gate, out=scratch("h2", h.shape, g)).flatten(0, -2)
    dn = torch.mm(gated, w_gate, out=scratch("dn", (len(rows), w_gate.shape[1]), g))
    return dn.addmm_(h.mul_(to_up).flatten(0, -2), w_up).view(*g.shape[:-1], -1)


class _GatedMlpPushforward(Pushforward):
    @staticmethod
    def forward(t: Tensor, from_gate: Tensor, from_up: Tensor, *weights: Tensor) -> Tensor:
        return _push_mlp(t, from_gate, from_up, weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, *shared: Any) -> tuple[Tensor, int]:
        from_gate, from_up, *weights = shared
        t = t.movedim(cotangent_dim(in_dims), -2)
        return _push_mlp(t, from_gate.unsqueeze(-2), from_up.unsqueeze(-2), weights), t.dim() - 2


def _push_mlp(t: Tensor, from_gate: Tensor, from_up: Tensor, weights: Sequence[Tensor]) -> Tensor:
    w_gate, w_up, w_down = weights
    rows, width = t.flatten(0, -2), (*t.shape[:-1], -1)
    h = (rows @ w_gate.T).view(width).mul_(from_gate).addcmul_((rows @ w_up.T).view(width), from_up)
    return (h.flatten(0, -2) @ w_down.T).view(width)
