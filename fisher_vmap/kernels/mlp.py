"""Rules for MLPs, and a test that recognises them by what their linear layers are given and return on random rows.

    gated    y = (act(a) * b) W_d^T,  a = x W_a^T,  b = x W_b^T
    joined   the same, with [a | b] = x W^T from one layer, in either order, or interleaved
    plain    y = act(a) W_d^T,  a = x W_a^T

all with or without biases, with a and b cut off at a limit or not. Between its layers an MLP is a function m of each
column alone, here the `mix`; so its derivatives by a and b are rows ("factors"), computed once for all cotangents, and
each derivative of the MLP is one product for each layer, with elementwise products between:

    dx = (h * dm/da) W_a  +  (h * dm/db) W_b,   h = g W_d
    dy = ((t W_a^T) * dm/da  +  (t W_b^T) * dm/db) W_d^T

For many cotangents of a position it is cheaper to make the MLP's derivative there first, a matrix [D, D], and to
multiply each of them by it: `pull_by_matrices`.

The forward is the module's own, to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp
from torch.nn import functional as F

from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, Scratch, cotangent_dim
from fisher_vmap.kernels.parts import Pull, Seen, Watched
from fisher_vmap.kernels.quantized import FAILURES, plain_matrix, runs_as_made
from fisher_vmap.model.recording import hooks

Activation = Callable[[Tensor], Tensor]
Mix = Callable[..., Tensor]  # of the outputs of the first layers, [..., M] each or one [..., 2M], to [..., M]
Halves = tuple[slice, slice]

# Activations that a forward may call without holding them as an attribute.
INLINE: tuple[Activation, ...] = (F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu)
# Matrices of derivatives are used where they take less than this part of the operations: there is other work on them.
MATRICES_AT = 0.75
# Where the two inputs of a column may lie in the output of one joined layer.
LAYOUTS = ("one after the other", "interleaved")


def halves_of(layout: str, width: int) -> Halves:
    """Where a joined layer's halves, [..., M] each, lie in its output of that width, 2M."""
    if layout == LAYOUTS[0]:
        return slice(0, width // 2), slice(width // 2, width)
    return slice(0, None, 2), slice(1, None, 2)


class Mixing(NamedTuple):
    """What an MLP does between its layers: the function, and the halves of its input if that is of one joined layer."""

    mix: Mix
    halves: Halves | None = None

    def at(self, outs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The mix, [..., M], and its derivatives by each of its inputs, each of the shape of that input."""
        mixed, pull = vjp(self.mix, *outs)  # type: ignore[misc]
        return mixed, pull(torch.ones_like(mixed))

    def factors(self, outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The derivatives alone."""
        return self.at(outs)[1]

    def by_column(self, outs: Sequence[Tensor]) -> bool:
        """Whether the mix is a function of each column alone, at these inputs."""
        if self.halves is None:
            alone = [out.reshape(-1, 1) for out in outs]
        else:
            alone = [torch.stack([outs[0][..., half] for half in self.halves], -1).reshape(-1, 2)]
        pieces = zip(*(out.tensor_split(2) for out in alone), strict=True)  # a mean over all would be seen, too
        mixed = self.mix(*outs)
        return are_close(torch.cat([self.mix(*piece) for piece in pieces]).reshape(mixed.shape), mixed)


@dataclass(frozen=True, eq=False)
class Mlp:
    """The parts of an MLP, a `Part` of a block.

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.

    Attributes:
        first: the layers on the input: gate and up, or one.
        mixing: what is between the layers.
        down: the last layer.
    """

    first: tuple[nn.Module, ...]
    mixing: Mixing
    down: nn.Module

    @property
    def width(self) -> int:
        """The width of the widest row."""
        return max(max(weight.shape) for weight in self.weights())

    def watched(self) -> Watched:
        """The outputs of the first layers."""
        return Watched(outputs=self.first)

    def pull_from(self, seen: Seen, scratch: Scratch) -> Pull:
        """The pullback at the inputs of one forward."""
        factors = [factor[:, None] for factor in self.mixing.factors([seen.outputs[part] for part in self.first])]
        weights, halves = self.weights(), self.mixing.halves

        def pull(g: Tensor, a: int, z: int) -> Tensor:
            by_rows = pull_by_matrices if matrices_pay(weights, g.shape[1]) else pull_mlp
            return by_rows(g, [factor[a:z] for factor in factors], weights, halves, scratch)

        return pull

    def weights(self) -> tuple[Tensor, ...]:
        """W of each first layer, [M, D] or [2M, D], and W_d, [D, M]."""
        found = tuple(plain_matrix(part) for part in (*self.first, self.down))
        return found  # type: ignore[return-value]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The module's output at x, and the outputs of the first layers, which its derivatives need."""
        outs = [part(x) for part in self.first]
        return self.down(self.mixing.mix(*outs)), *outs


def mlp_of(module: nn.Module) -> Mlp | None:
    """The parts of a module that is an MLP and nothing more; None for other modules."""
    return _as_made(module) if runs_as_made(module) else None


def are_close(found: Tensor, expected: Tensor, units: float = 4) -> bool:
    """Whether each row is equal to the other's up to rounding, so many units of the second's dtype."""
    if found.shape != expected.shape:
        return False
    wide = torch.promote_types(expected.dtype, torch.float32)
    gap, size = (found.to(wide) - expected.to(wide)).norm(dim=-1), expected.to(wide).norm(dim=-1)
    return bool((gap <= units * torch.finfo(expected.dtype).eps * size).all())


def random_rows(width: int, like: Tensor) -> Tensor:
    """Three rows of that width, [1, 3, D], with the dtype and the device of another tensor.

    They are of three sizes, since a function that cuts large values off is another function at large values only.
    """
    generator, step = torch.Generator().manual_seed(0), 4 if like.dtype == torch.float16 else 10
    rows = torch.randn(1, 3, width, generator=generator, device="cpu")
    return (rows * torch.tensor([[1], [step], [step**2]], device="cpu")).to(like.device, like.dtype)


def _as_made(module: nn.Module) -> Mlp | None:
    """The parts of an MLP, whether or not the module itself has hooks."""
    layers = {part: weight for part in module.children() if (weight := plain_matrix(part)) is not None}
    if len(layers) not in (2, 3) or "forward" in vars(module) or any(weight.is_meta for weight in layers.values()):
        return None
    inner = [part for part in module.modules() if part is not module]
    if not all(runs_as_made(part) and not drops(part) for part in inner):
        return None
    with torch.no_grad():
        for width in dict.fromkeys(weight.shape[1] for weight in layers.values()):
            try:
                found = _on_rows(module, list(layers), random_rows(width, next(iter(layers.values()))))
            except FAILURES:  # a row of another width, or not a function of rows
                continue
            if found is not None:
                return found
    return None


def drops(module: nn.Module) -> bool:
    """Whether a module is a dropout that is not the identity."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def _on_rows(module: nn.Module, layers: list[nn.Module], x: Tensor) -> Mlp | None:
    calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def note(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[layer].append((args[0], output))

    with hooks(*(layer.register_forward_hook(note) for layer in layers)):
        y = module.forward(x)
    if not isinstance(y, Tensor) or any(len(called) != 1 for called in calls.values()):
        return None
    once = {layer: called[0] for layer, called in calls.items()}
    first = [layer for layer, (given, _) in once.items() if torch.equal(given, x)]
    last = [layer for layer, (_, output) in once.items() if layer not in first and torch.equal(output, y)]
    if len(last) != 1 or len(first) + 1 != len(layers):
        return None
    hidden = once[last[0]][0]
    for order in permutations(first):
        outs = [once[layer][1] for layer in order]
        for act, mixing in mixings(module, outs, hidden.shape[-1]):
            if _mixes_to(mixing, outs, hidden) and holds_only(module, [*layers, act]):
                return Mlp(order, mixing, last[0])
    return None


def _mixes_to(mixing: Mixing, outs: Sequence[Tensor], hidden: Tensor) -> bool:
    try:
        return torch.equal(mixing.mix(*outs), hidden) and mixing.by_column(outs)
    except FAILURES:  # this attribute is no activation
        return False


def holds_only(module: nn.Module, parts: Sequence[Any]) -> bool:
    """Whether all tensors of a module are among its parts, tensors or modules."""
    held = [part for part in parts if isinstance(part, nn.Module)]
    inside = {id(t) for t in parts} | {id(t) for part in held for t in chain(part.parameters(), part.buffers())}
    return all(id(t) in inside for t in chain(module.parameters(), module.buffers()))


def mixings(module: nn.Module, outs: Sequence[Tensor], width: int) -> Iterator[tuple[Activation, Mixing]]:
    """What may be between the layers of an MLP, by each callable of the module that may be its activation.

    `outs` are the outputs of its first layers, and `width` is M.
    """
    limits = [None, *numbers_of(module)]
    wider = (False, True) if outs[0].dtype in (torch.bfloat16, torch.float16) else (False,)
    for act, wide in product(activations(module), wider):
        if len(outs) == 1 and outs[0].shape[-1] == width:
            yield act, Mixing(in_float32(act) if wide else act)
            continue
        for limit in limits:
            gated = in_float32(_gated(act, limit)) if wide else _gated(act, limit)
            if len(outs) == 2:
                yield act, Mixing(gated)
            elif outs[0].shape[-1] == 2 * width:
                for layout, gate in product(LAYOUTS, (0, 1)):
                    yield act, Mixing(_joined(gated, layout, gate), halves_of(layout, 2 * width))


def activations(module: nn.Module) -> list[Activation]:
    """The callables that a module holds, without its linear layers, and those of `INLINE`."""
    held = [value for value in chain(module.children(), vars(module).values()) if callable(value)]
    return [*(value for value in held if plain_matrix(value) is None), *INLINE]  # type: ignore[arg-type]


def numbers_of(module: nn.Module) -> list[float]:
    """The numbers that a module holds as attributes: a limit, a scale."""
    return [value for value in vars(module).values() if isinstance(value, float)]


def in_float32(mix: Mix) -> Mix:
    """The same mix, computed in float32."""
    return lambda *outs: mix(*(out.float() for out in outs)).to(outs[0].dtype)


def _gated(act: Activation, limit: float | None) -> Mix:
    """The mix of a gated MLP, of values cut off at a limit if there is one."""
    if limit is None:
        return lambda a, b: act(a) * b
    return lambda a, b: act(a.clamp(max=limit)) * b.clamp(-limit, limit)


def _joined(gated: Mix, layout: str, gate: int) -> Mix:
    """The mix of a joined layer, whose half of that number is the gate."""

    def mix(joined: Tensor) -> Tensor:
        halves = halves_of(layout, joined.shape[-1])
        return gated(joined[..., halves[gate]], joined[..., halves[1 - gate]])

    return mix


def fused_mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward of an MLP with the rules of this file; None for other modules."""
    parts = _as_made(module)
    return None if parts is None else lambda x: _Mlp.apply(x, parts)[0]  # type: ignore[no-any-return]


class _Mlp(Derived):
    @staticmethod
    def forward(x: Tensor, parts: Mlp) -> tuple[Tensor, ...]:
        return parts.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _x, ctx.parts = inputs
        _y, *outs = output
        ctx.mark_non_differentiable(*outs)
        ctx.save_for_backward(*outs)
        ctx.save_for_forward(*outs)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        parts = ctx.parts
        return _MlpPullback.apply(g, parts, *parts.mixing.factors(ctx.saved_tensors), *parts.weights()), None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        parts, outs = ctx.parts, ctx.saved_tensors
        return _MlpPushforward.apply(t, parts, *parts.mixing.factors(outs), *parts.weights()), *(None for _ in outs)


class _MlpPullback(Pullback):
    @staticmethod
    def forward(g: Tensor, parts: Mlp, *shared: Tensor) -> Tensor:
        factors, weights = shared[: len(parts.first)], shared[len(parts.first) :]
        return pull_mlp(g, factors, weights, parts.mixing.halves, Scratch())

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, parts: Mlp, *shared: Any) -> tuple[Tensor, int]:
        g = g.movedim(cotangent_dim(in_dims), -2)
        factors, weights = [f.unsqueeze(-2) for f in shared[: len(parts.first)]], shared[len(parts.first) :]
        return pull_mlp(g, factors, weights, parts.mixing.halves, Scratch()), g.dim() - 2


def pull_mlp(
    g: Tensor, factors: Sequence[Tensor], weights: Sequence[Tensor], halves: Halves | None, scratch: Scratch
) -> Tensor:
    """The pullback of g, [..., D], through an MLP, in scratch memory.

    `factors` are those of the mix, which broadcast to [..., M] or, for one joined layer of those halves, [..., 2M];
    `weights` are those of the first layers and of the last.
    """
    w_down = weights[-1]
    h = torch.mm(g.flatten(0, -2), w_down, out=scratch("h", (g.shape[:-1].numel(), w_down.shape[1]), g))
    return pull_mixed(h.view(*g.shape[:-1], -1), factors, weights[:-1], halves, scratch)


def matrices_pay(weights: Sequence[Tensor], cotangents: int) -> bool:
    """Whether an MLP of these weights is pulled back faster by a matrix for each position, for K cotangents of it."""
    D, M = weights[-1].shape
    by_layers = cotangents * D * (M + sum(len(weight) for weight in weights[:-1]))
    return D * D * (M + cotangents) < MATRICES_AT * by_layers


def pull_by_matrices(
    g_nKD: Tensor, factors: Sequence[Tensor], weights: Sequence[Tensor], halves: Halves | None, scratch: Scratch
) -> Tensor:
    """As `pull_mlp`, by the derivative of the MLP at each position, W_d (sum of diag(factor) W over the first layers).

    With factors f, F wide in all, that are 2 D D (M + K) operations a position in place of 2 K D (M + F).
    """
    *w_first, w_down = weights
    out = scratch("dx of first", g_nKD.shape[:2] + w_first[0].shape[1:], g_nKD)
    first_MD = scratch("first at a position", (w_down.shape[1], w_first[0].shape[1]), g_nKD)
    matrix_DD = scratch("matrix of a position", (len(w_down), w_first[0].shape[1]), g_nKD)
    if halves is not None:
        w_first, factors = [w_first[0][half] for half in halves], [factors[0][..., half] for half in halves]
    for i, g_KD in enumerate(g_nKD):
        columns = [factor[i, 0, :, None] for factor in factors]
        torch.mul(w_first[0], columns[0], out=first_MD)
        for weight, column in zip(w_first[1:], columns[1:], strict=True):
            first_MD.addcmul_(weight, column)
        torch.mm(g_KD, torch.mm(w_down, first_MD, out=matrix_DD), out=out[i])
    return out


def pull_mixed(
    h: Tensor, factors: Sequence[Tensor], weights: Sequence[Tensor], halves: Halves | None, scratch: Scratch
) -> Tensor:
    """The pullback of h, [..., M], through the mix and the first layers, in scratch memory; overwrites h."""
    shape = (*h.shape[:-1], -1)
    dx = scratch("dx of first", (h.shape[:-1].numel(), weights[0].shape[1]), h)
    if halves is not None:
        both = scratch("h2", (*h.shape[:-1], 2 * h.shape[-1]), h)
        for half in halves:
            torch.mul(h, factors[0][..., half], out=both[..., half])
        return torch.mm(both.flatten(0, -2), weights[0], out=dx).view(shape)
    if len(factors) == 1:
        return torch.mm(h.mul_(factors[0]).flatten(0, -2), weights[0], out=dx).view(shape)
    gated = torch.mul(h, factors[0], out=scratch("h2", h.shape, h)).flatten(0, -2)
    torch.mm(gated, weights[0], out=dx)
    return dx.addmm_(h.mul_(factors[1]).flatten(0, -2), weights[1]).view(shape)


class _MlpPushforward(Pushforward):
    @staticmethod
    def forward(t: Tensor, parts: Mlp, *shared: Tensor) -> Tensor:
        return _push_mlp(t, shared[: len(parts.first)], shared[len(parts.first) :], parts.mixing.halves)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, parts: Mlp, *shared: Any) -> tuple[Tensor, int]:
        t = t.movedim(cotangent_dim(in_dims), -2)
        factors, weights = [f.unsqueeze(-2) for f in shared[: len(parts.first)]], shared[len(parts.first) :]
        return _push_mlp(t, factors, weights, parts.mixing.halves), t.dim() - 2


def _push_mlp(t: Tensor, factors: Sequence[Tensor], weights: Sequence[Tensor], halves: Halves | None) -> Tensor:
    *w_first, w_down = weights
    rows, shape = t.flatten(0, -2), (*t.shape[:-1], -1)
    moved = [(rows @ weight.T).view(shape).mul_(factor) for weight, factor in zip(w_first, factors, strict=True)]
    if halves is not None:
        moved = [moved[0][..., half] for half in halves]
    h = moved[0] if len(moved) == 1 else moved[0].add(moved[1])
    return (h.flatten(0, -2) @ w_down.T).view(shape)
