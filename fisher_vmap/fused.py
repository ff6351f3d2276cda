"""Pullbacks of the common norms and of the gated MLP in as few passes over memory as they need.

What is not a matrix product is bound by memory, and it is K times as much as in one backward pass: autograd's backward
of a norm makes about ten passes over [K, N, D], most of them in float32. With everything that does not depend on the
cotangent g computed once, each rule here is a dot product and a fused multiply-add away from its result:

    norm   y = w * n,  n = (x - m) r      dx = g * (w r)  -  (n r) mean(g * w * n)  -  r mean(g * w), the last if m != 0
    MLP    y = (act(a) * b) W_d^T         dx = (h * b act'(a)) W_a  +  (h * act(a)) W_b,   h = g W_d

and the pushforward of a tangent t is the same from the other side:

    norm   dy = t * (w r)  -  (w n r) mean(t * n)  -  (w r) mean(t), the last if m != 0
    MLP    dy = ((t W_a^T) * b act'(a)  +  (t W_b^T) * act(a)) W_d^T

The forward of each is the model's own, to the bit. A module is taken for one of these only if its output on random
input is what the formula says.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp

from fisher_vmap.pointwise import add_norm_pullback, norm_pullback
from fisher_vmap.pullback import Derived, Pullback, Pushforward, cotangent_dim
from fisher_vmap.quantized import has_matrix, runs_as_made
from fisher_vmap.scratch import Scratch

Forward = Callable[..., Any]


class NormKind(NamedTuple):
    """What is added to a norm's weight (0 or 1), its epsilon, and whether the mean is taken off."""

    offset: float
    eps: float
    centred: bool


class NormRows(NamedTuple):
    """What the pullback of a norm shares among the cotangents, for each position: dx = g * scale - back sum(g * along).

    `mean` and `r` stand for the share of a mean that the norm takes off, - r sum(g * mean); `mean` is None without one.
    """

    scale: Tensor
    along: Tensor
    back: Tensor
    mean: Tensor | None
    r: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "NormRows":
        """Every tensor changed in the same way."""
        return NormRows(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    def at(self, start: int, stop: int) -> "NormRows":
        """A range of positions, which are the first dimension."""
        return self.each(lambda x: x[start:stop])

    def pull(self, g: Tensor, scratch: Scratch, name: str) -> Tensor:
        """The pullback of g, in memory of that name; a dimension of every row broadcasts against the cotangents."""
        return norm_pullback(g, *self, scratch, name)

    def add_pull(self, total: Tensor, g: Tensor, scratch: Scratch) -> None:
        """Add the pullback of g to `total`, in place."""
        add_norm_pullback(total, g, *self, scratch)


def norm_rows(x: Tensor, weight: Tensor, kind: NormKind, dtype: torch.dtype) -> NormRows:
    """What a norm's pullback at x, [..., D], shares among the cotangents, in their dtype; of the shape of x."""
    weight, n, r = _normalised(x, weight, kind)
    mean = (weight / n.shape[-1]).expand_as(n) if kind.centred else None
    return NormRows(weight * r, weight * n / n.shape[-1], n * r, mean, r).each(lambda row: row.to(dtype))


def _normalised(x: Tensor, weight: Tensor, kind: NormKind) -> tuple[Tensor, Tensor, Tensor]:
    """A norm's weight, n = (x - m) r and r, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind.centred:
        wide = wide - wide.mean(-1, keepdim=True)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + kind.eps)
    return weight.to(wide.dtype) + kind.offset, wide * r, r


class _Norm(Derived):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, offset: float, eps: float, centred: bool, own: Forward) -> Tensor:
        y: Tensor = own(x)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.offset, ctx.eps, ctx.centred, _own = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = norm_rows(x, weight, _kind(ctx), g.dtype)
        return _NormPullback.apply(g, *rows), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> Tensor:
        x, weight = ctx.saved_tensors
        weight, n, r = _normalised(x, weight, _kind(ctx))
        scale, along, back = weight * r, n / n.shape[-1], weight * n * r
        mean = torch.full_like(r, 1 / n.shape[-1]).expand_as(n) if ctx.centred else None
        rows = (x.to(t.dtype) if x is not None else None for x in (scale, along, back, mean, scale))
        return _NormPushforward.apply(t, *rows)  # type: ignore[no-any-return]


def _kind(ctx: Any) -> NormKind:
    return NormKind(ctx.offset, ctx.eps, ctx.centred)


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


def mlp_forward(
    x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: Forward
) -> tuple[Tensor, Tensor, Tensor]:
    """A gated MLP's output, and what its derivatives need: the outputs of gate and up."""
    a, b = gate(x), up(x)
    return down(act(a) * b), a, b


class _GatedMlp(Derived):
    @staticmethod
    def forward(
        x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear, act: Forward
    ) -> tuple[Tensor, Tensor, Tensor]:
        return mlp_forward(x, gate, up, down, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _x, ctx.gate, ctx.up, ctx.down, ctx.act = inputs
        _y, a, b = output
        ctx.mark_non_differentiable(a, b)
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor, _ga: Any, _gb: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _GatedMlpPullback.apply(g, *_mlp_parts(ctx)), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _GatedMlpPushforward.apply(t, *_mlp_parts(ctx)), None, None


def _mlp_parts(ctx: Any) -> tuple[Tensor, ...]:
    """What a gated MLP's derivatives share: act'(a) b, act(a), and the weights."""
    a, b = ctx.saved_tensors
    return *mlp_factors(a, b, ctx.act), *(part.weight.detach() for part in (ctx.gate, ctx.up, ctx.down))


def mlp_factors(a: Tensor, b: Tensor, act: Forward) -> tuple[Tensor, Tensor]:
    """What the derivatives of act(a) * b multiply with: act'(a) b on the side of a, act(a) on the side of b."""
    act_a, pull = vjp(act, a)  # type: ignore[misc]
    (slope,) = pull(torch.ones_like(a))
    return slope * b, act_a


class _GatedMlpPullback(Pullback):
    @staticmethod
    def forward(g: Tensor, to_gate: Tensor, to_up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return _pull_mlp(g, to_gate, to_up, w_gate, w_up, w_down)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        to_gate, to_up, *weights = shared
        g = g.movedim(cotangent_dim(in_dims), -2)
        return _pull_mlp(g, to_gate.unsqueeze(-2), to_up.unsqueeze(-2), *weights), g.dim() - 2


def _pull_mlp(g: Tensor, *shared: Tensor) -> Tensor:
    return pull_mlp(g, *shared, Scratch())  # type: ignore[arg-type, call-arg]


def pull_mlp(
    g: Tensor, to_gate: Tensor, to_up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, scratch: Scratch
) -> Tensor:
    """The pullback of g, [..., D], through a gated MLP; the result stays in scratch memory until it is used again."""
    rows = g.flatten(0, -2)
    h = torch.mm(rows, w_down, out=scratch("h", (len(rows), w_down.shape[1]), g)).view(*g.shape[:-1], -1)
    gated = torch.mul(h, to_gate, out=scratch("h2", h.shape, g)).flatten(0, -2)
    dn = torch.mm(gated, w_gate, out=scratch("dn", (len(rows), w_gate.shape[1]), g))
    return dn.addmm_(h.mul_(to_up).flatten(0, -2), w_up).view(*g.shape[:-1], -1)


class _GatedMlpPushforward(Pushforward):
    @staticmethod
    def forward(t: Tensor, from_gate: Tensor, from_up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return _push_mlp(t, from_gate, from_up, w_gate, w_up, w_down)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, *shared: Any) -> tuple[Tensor, int]:
        from_gate, from_up, *weights = shared
        t = t.movedim(cotangent_dim(in_dims), -2)
        return _push_mlp(t, from_gate.unsqueeze(-2), from_up.unsqueeze(-2), *weights), t.dim() - 2


def _push_mlp(t: Tensor, from_gate: Tensor, from_up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    rows, width = t.flatten(0, -2), (*t.shape[:-1], -1)
    h = (rows @ w_gate.T).view(width).mul_(from_gate).addcmul_((rows @ w_up.T).view(width), from_up)
    return (h.flatten(0, -2) @ w_down.T).view(width)


def norm_kind(module: nn.Module) -> NormKind | None:
    """What kind of norm a module is, by its output on random rows; None if it is not one of ours."""
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
    x = torch.randn(3, weight.numel(), generator=generator).add_(0.5).to(weight.device, weight.dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        try:
            y = module(x)
        except (RuntimeError, TypeError, ValueError):
            return None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return None
        rows = x.to(wide)
        for centred in (False, True):
            n = rows - rows.mean(-1, keepdim=True) if centred else rows
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0):
                expected = (offset + weight.to(wide)) * n + (parameters["bias"].to(wide) if "bias" in parameters else 0)
                if (y.to(wide) - expected).norm() <= 4 * torch.finfo(weight.dtype).eps * expected.norm():
                    return NormKind(offset, eps, centred)
    return None


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether a module is down(act(gate(x)) * up(x)), by its parts and by its output on random rows."""
    gate, up, down, act = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not (isinstance(gate, nn.Linear) and isinstance(up, nn.Linear) and isinstance(down, nn.Linear)):
        return False
    plain = all(has_matrix(part) and runs_as_made(part) for part in (gate, up, down))  # a subclass may do more
    if not plain or act is None or "forward" in vars(module):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, gate.in_features, generator=generator).to(gate.weight)
    with torch.no_grad():
        try:
            return torch.equal(module(x), down(act(gate(x)) * up(x)))
        except (RuntimeError, TypeError, ValueError):
            return False


def fused_forward(module: nn.Module) -> Forward | None:
    """The module's forward with a fused pullback, or None where there is no rule for it."""
    if len(inspect.signature(module.forward).parameters) != 1:  # a gate, say, that it may be given as well
        return None
    if is_gated_mlp(module):
        gate, up, down, act = (getattr(module, n) for n in ("gate_proj", "up_proj", "down_proj", "act_fn"))
        return lambda x: _GatedMlp.apply(x, gate, up, down, act)[0]  # type: ignore[no-any-return]
    kind = norm_kind(module)
    if kind is not None:
        own = module.forward
        weight: Tensor = module.weight  # type: ignore[assignment]
        return lambda x: _Norm.apply(x, weight.detach(), *kind, own)  # type: ignore[no-any-return]
    return None


@contextmanager
def fused_pullbacks(forwards: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Within the context the modules run the forwards given; their hooks and parameters stay as they are."""
    swapped = []
    try:
        for module, forward in forwards:
            module.forward = forward  # type: ignore[method-assign]
            swapped.append(module)
        yield
    finally:
        for module in swapped:
            del module.forward
