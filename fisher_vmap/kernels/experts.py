"""Rules for mixtures of experts, and a test that recognises them by their output on random rows.

For one token, with the routing weights w_j(x) of its experts j, each an MLP f_j, and perhaps a shared MLP s,

    y = c sum_j w_j(x) f_j(x)  +  sigma(x) s(x)

    dx = c sum_j ( w_j f_j^T(g)  +  (g . f_j(x)) dw_j/dx )  +  sigma s^T(g)  +  (g . s(x)) dsigma/dx

where f^T(g) is the pullback of f at x; many models have no sigma, or no s at all. A token's experts are those of the
forward. All cotangents of all tokens of one expert go through it in one product for each of its layers. As for an MLP
h = g W_d, so g . f_j = h . m_j + g . b_d, where m_j is the input of the expert's last layer: no f_j is needed.

The gradients dw_j/dx and dsigma/dx are rows, [N, k, D], taken once for all cotangents by autograd of the router.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap
from torch.nn import functional as F

from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.mlp import (
    LAYOUTS,
    Mixing,
    Mlp,
    are_close,
    drops,
    halves_of,
    holds_only,
    mixings,
    mlp_of,
    numbers_of,
    pull_mixed,
    pull_mlp,
    random_rows,
)
from fisher_vmap.kernels.parts import Pull, Seen, Watched
from fisher_vmap.kernels.quantized import FAILURES, is_float, plain_matrix, runs_as_made
from fisher_vmap.model.patches import experts_apart
from fisher_vmap.model.recording import hooks


class Layers(NamedTuple):
    """The layers of all experts, by the names of their tensors, whose first dimension is the expert.

    Attributes:
        first: [E, 2M, D] or, without a gate, [E, M, D]; with the last two dimensions swapped if `first_turned`.
        first_bias: [E, 2M] or [E, M]; None if there is none.
        down: [E, D, M], or [E, M, D] if `down_turned`.
        down_bias: [E, D]; None if there is none.
    """

    first: str
    first_turned: bool
    first_bias: str | None
    down: str
    down_turned: bool
    down_bias: str | None

    def of(self, experts: nn.Module, expert: int) -> "Expert":
        """The layers of one expert."""
        names = (self.first, self.first_bias, self.down, self.down_bias)
        own: Any = [None if name is None else getattr(experts, name)[expert].detach() for name in names]
        first, down = own[0].T if self.first_turned else own[0], own[2].T if self.down_turned else own[2]
        return Expert(first, own[1], down, own[3])


class Expert(NamedTuple):
    """The layers of one expert: [2M, D] or [M, D], its bias, [D, M], its bias."""

    first: Tensor
    first_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class Routed(NamedTuple):
    """The tokens of one expert and the rows of its pullback.

    Attributes:
        layers: the expert's own.
        token: [n], which tokens it has, in increasing order.
        place: [n], which of the token's k experts it is.
        mixed: [n, M], the input of its last layer.
        factors: [n, 1, 2M] or [n, 1, M], the derivatives of the mix, times the routing weights.
    """

    layers: Expert
    token: Tensor
    place: Tensor
    mixed: Tensor
    factors: Tensor

    def between(self, start: int, stop: int) -> "Routed":
        """The tokens in [start, stop), counted from there."""
        bounds = torch.tensor([start, stop], device=self.token.device)
        first, last = torch.searchsorted(self.token, bounds).tolist()
        own = (row[first:last] for row in (self.place, self.mixed, self.factors))
        return Routed(self.layers, self.token[first:last] - start, *own)


class Router(NamedTuple):
    """A router, which returns a tuple.

    Attributes:
        module: the router.
        weights: which of its outputs are the routing weights, [N, k].
        numbers: which of them are the experts' numbers, [N, k].
        batched: whether it is given x as [1, N, D].
        arguments: what it is given after x: names of the mixture's own tensors, or None.
    """

    module: nn.Module
    weights: int
    numbers: int
    batched: bool
    arguments: tuple[str | None, ...]

    def call(self, mixture: nn.Module, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The routing weights and the experts' numbers at x."""
        further = (None if name is None else getattr(mixture, name) for name in self.arguments)
        output = self.module.forward(x_ND[None] if self.batched else x_ND, *further)
        return output[self.weights], output[self.numbers]


class Shared(NamedTuple):
    """An MLP that all tokens have; its output times the sigmoid of a linear layer, [D] to [1], if there is one."""

    module: nn.Module
    mlp: Mlp
    gate: nn.Module | None


@dataclass(frozen=True, eq=False)
class Mixture:
    """The parts of a mixture of experts, a `Part` of a block.

    Attributes:
        module: the mixture.
        router: its router.
        experts: the module with the experts' weights.
        layers: what its tensors are.
        mixing: what is between the layers of an expert.
        scale: the factor c.
        shared: the MLP that all tokens have; None if there is none.
        width: the width of the widest row, where an expert's rows count by the share of the tokens that it may expect.
    """

    module: nn.Module
    router: Router
    experts: nn.Module
    layers: Layers
    mixing: Mixing
    scale: float
    shared: Shared | None
    width: int

    def watched(self) -> Watched:
        """The mixture's input, the router's output, and what the shared MLP needs."""
        own = () if self.shared is None else self.shared.mlp.watched().outputs
        gate = () if self.shared is None or self.shared.gate is None else (self.shared.module, self.shared.gate)
        return Watched((self.module,), (self.router.module, *own, *gate))

    def pull_from(self, seen: Seen, scratch: Scratch) -> Pull:
        """The pullback at the inputs of one forward."""
        x_ND, routing = seen.inputs[self.module], seen.outputs[self.router.module]
        weights_Nk, numbers_Nk = routing[self.router.weights], routing[self.router.numbers]
        routed = list(self._routed(x_ND, self.scale * weights_Nk, numbers_Nk))
        rows_NkD = self.scale * self._router_rows(x_ND)
        shared, (N, k) = self.shared, numbers_Nk.shape
        factors, gate_row = ([], None) if shared is None else self._shared_rows(shared, seen)
        if gate_row is not None:
            rows_NkD = torch.cat([rows_NkD, gate_row], 1)

        def pull(g: Tensor, a: int, z: int) -> Tensor:
            total = scratch("mixture", g.shape, g)
            dw = scratch("dw", (*rows_NkD[a:z].shape[:2], g.shape[1]), g).zero_()  # [n, k, K]
            if shared is None:
                total.zero_()
            else:
                own = [factor[a:z] for factor in factors]
                total.copy_(pull_mlp(g, own, shared.mlp.weights(), shared.mlp.mixing.halves, scratch))
                if shared.gate is not None:
                    dw[:, k] = torch.bmm(g, seen.outputs[shared.module][a:z, :, None])[..., 0]
            for expert in routed if (a, z) == (0, N) else [expert.between(a, z) for expert in routed]:
                if len(expert.token):
                    self._pull_expert(expert, g, total, dw, scratch)
            return total.baddbmm_(dw.transpose(1, 2), rows_NkD[a:z])

        return pull

    def _pull_expert(self, expert: Routed, g: Tensor, total: Tensor, dw: Tensor, scratch: Scratch) -> None:
        """Add the pullback through one expert to `total`, and write those of its routing weights to `dw`."""
        n, K, D = len(expert.token), *g.shape[1:]
        own = torch.index_select(g, 0, expert.token, out=scratch("own", (n, K, D), g))
        first, _, down, bias = expert.layers
        h = torch.mm(own.flatten(0, 1), down, out=scratch("h", (n * K, down.shape[1]), g)).view(n, K, -1)
        weight = torch.bmm(h, expert.mixed[..., None])[..., 0]
        if bias is not None:
            weight += own @ bias
        dw[expert.token, expert.place] = weight
        total.index_add_(0, expert.token, pull_mixed(h, [expert.factors], [first], self.mixing.halves, scratch))

    def _routed(self, x_ND: Tensor, weights_Nk: Tensor, numbers_Nk: Tensor) -> Iterator[Routed]:
        """The experts that have tokens."""
        k, E = numbers_Nk.shape[1], len(getattr(self.experts, self.layers.first))
        order = numbers_Nk.flatten().argsort(stable=True)
        ends = numbers_Nk.flatten().bincount(minlength=E)[:E].cumsum(0).tolist()
        for number, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            if start == stop:
                continue
            token, place = order[start:stop] // k, order[start:stop] % k
            layers = self.layers.of(self.experts, number)
            mixed, (factors,) = self.mixing.at([F.linear(x_ND[token], layers.first, layers.first_bias)])
            weighted = (factors * weights_Nk[token, place, None])[:, None]
            yield Routed(layers, token, place, mixed, weighted.to(x_ND.dtype))

    def _router_rows(self, x_ND: Tensor) -> Tensor:
        """The gradients of each token's routing weights, [N, k, D].

        All tokens at once, as in the forward, lest a token that is almost as well off elsewhere goes there.
        """
        weights_Nk, pull = vjp(lambda x: self.router.call(self.module, x)[0], x_ND)  # type: ignore[misc]
        N, k = weights_Nk.shape
        (rows_kND,) = vmap(pull)(torch.eye(k, dtype=weights_Nk.dtype, device=x_ND.device)[:, None].expand(k, N, k))
        return rows_kND.transpose(0, 1)  # type: ignore[no-any-return]

    @staticmethod
    def _shared_rows(shared: Shared, seen: Seen) -> tuple[list[Tensor], Tensor | None]:
        """The factors of the shared MLP, times its gate, and the gradients of the gate, [N, 1, D]."""
        mlp, gate = shared.mlp, shared.gate
        factors = [factor[:, None] for factor in mlp.mixing.factors([seen.outputs[part] for part in mlp.first])]
        if gate is None:
            return factors, None
        opened = seen.outputs[gate].sigmoid()[:, None]  # [N, 1, 1]
        return [opened * factor for factor in factors], opened * (1 - opened) * plain_matrix(gate)


def mixture_of(module: nn.Module) -> Mixture | None:
    """The parts of a module that is a mixture of experts and nothing more; None for other modules."""
    holders = [part for part in module.children() if _holds_experts(part)]
    if len(holders) != 1 or not all(runs_as_made(part) and not drops(part) for part in module.modules()):
        return None
    (experts,) = holders
    others = {part: mlp_of(part) for part in module.children() if part is not experts}
    E = len(next(experts.parameters()))
    widths = [p.shape[1] for part in others for p in part.parameters() if p.dim() == 2 and len(p) == E]  # the router's
    try:
        with torch.no_grad(), experts_apart(module):
            return _on_rows(module, experts, others, random_rows(widths[0], next(experts.parameters())))
    except (*FAILURES, IndexError):
        return None


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module has two tensors of matrices, one for each expert, and perhaps their biases, of floats."""
    tensors = list(module.parameters(recurse=False))
    plain = all(is_float(t) and not t.is_meta and len(t) == len(tensors[0]) for t in tensors if t.dim() > 0)
    return plain and sorted(t.dim() for t in tensors) in ([3, 3], [2, 2, 3, 3])


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def given(self) -> list[Tensor]:
        return [t for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]


def _on_rows(module: nn.Module, experts: nn.Module, others: dict[nn.Module, Mlp | None], x: Tensor) -> Mixture | None:
    """The parts of a mixture whose children return what those parts say, [1, N, D] going in."""
    calls: dict[nn.Module, list[_Call]] = {}

    def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.setdefault(part, []).append(_Call(args, kwargs, output))

    with hooks(*(part.register_forward_hook(note, with_kwargs=True) for part in (experts, *others))):
        y = module.forward(x.clone())  # some add noise to it in place
    rows, y = x[0], y[0] if isinstance(y, tuple) else y
    once = {part: called[0] for part, called in calls.items() if len(called) == 1 and _among(x, called[0].given)}
    router = _router_of(once, module, experts, rows)
    if router is None:
        return None
    routed, numbers = once[experts].output.reshape(rows.shape), once[router.module].output[router.numbers]
    inside = _layers_of(experts, rows, once[router.module].output[router.weights], numbers, routed)
    if inside is None:
        return None
    E, H = len(next(experts.parameters())), len(inside[0].of(experts, 0).first)
    for scale, shared in product(_scales(module), _shared(others, once)):
        total, width = scale * routed, max(rows.shape[1], H * numbers.shape[1] // E)
        if shared is not None:
            gate = 1 if shared.gate is None else once[shared.gate].output.reshape(-1, 1).sigmoid()
            total = total + gate * once[shared.module].output.reshape(rows.shape)
            width = max(width, shared.mlp.width)
        parts = [router.module, *once[router.module].args, experts, *(shared or ())]
        if are_close(y.reshape(rows.shape), total, 1) and holds_only(module, parts):
            return Mixture(module, router, experts, *inside, scale, shared, width)
    return None


def _router_of(once: dict[nn.Module, _Call], module: nn.Module, experts: nn.Module, rows: Tensor) -> Router | None:
    """The child that tells the experts' numbers and weights."""
    given = once[experts].given if experts in once else []
    numbers = [t for t in given if not t.is_floating_point() and t.dim() == 2]
    names = {id(t): name for name, t in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    for part, call in once.items():
        if not isinstance(call.output, tuple) or len(numbers) != 1 or part is experts or call.kwargs:
            continue
        alike = [(i, t) for i, t in enumerate(call.output) if isinstance(t, Tensor) and t.shape == numbers[0].shape]
        number = [i for i, t in alike if _among(t, numbers)]
        weight = [i for i, t in alike if i not in number and _among(t, given)]
        known = all(argument is None or id(argument) in names for argument in call.args[1:])
        if number and weight and known:
            batched = call.args[0].dim() == 3
            router = Router(part, weight[0], number[0], batched, tuple(names.get(id(a)) for a in call.args[1:]))
            return router if _is_function_of_rows(router, module, call, rows) else None
    return None


def _among(t: Tensor, others: Sequence[Tensor]) -> bool:
    """Whether one of the others has the same dtype and rows."""
    alike = (other for other in others if (other.dtype, other.numel()) == (t.dtype, t.numel()))
    return any(other.shape[-1] == t.shape[-1] and torch.equal(other.reshape(t.shape), t) for other in alike)


def _is_function_of_rows(router: Router, module: nn.Module, call: _Call, rows: Tensor) -> bool:
    """Whether a router alone returns the same, and each token's weights depend on that token only."""
    with torch.enable_grad():
        weights, numbers = router.call(module, leaf := rows.clone().requires_grad_())
        if not (_among(weights, [call.output[router.weights]]) and _among(numbers, [call.output[router.numbers]])):
            return False
        (grad,) = torch.autograd.grad(weights[0].square().sum(), leaf)
    return not grad[1:].any()


def _shared(others: dict[nn.Module, Mlp | None], once: dict[nn.Module, _Call]) -> Iterator[Shared | None]:
    """The MLPs that all tokens may have, and None."""
    gates = [part for part in once if (weight := plain_matrix(part)) is not None and len(weight) == 1]
    yield None
    for part, mlp in others.items():
        if mlp is not None and part in once:
            yield from (Shared(part, mlp, gate) for gate in (None, *gates))


def _scales(module: nn.Module) -> list[float]:
    """The factors that a mixture may apply to its experts' sum: one, and the numbers that it holds."""
    return list(dict.fromkeys([1.0, *numbers_of(module)]))


def _layers_of(
    experts: nn.Module, rows: Tensor, weights: Tensor, numbers: Tensor, expected: Tensor
) -> tuple[Layers, Mixing] | None:
    """What the experts' tensors are, and what is between their layers, if this gives their output."""
    for layers in _layouts(experts, rows.shape[1]):
        used = {number: layers.of(experts, number) for number in numbers.unique().tolist()}
        token_place = {number: torch.where(numbers == number) for number in used}
        outs = {n: F.linear(rows[token_place[n][0]], used[n].first, used[n].first_bias) for n in used}
        for mixing in _mixings(experts, next(iter(outs.values())), next(iter(used.values())).down.shape[1]):
            total = torch.zeros_like(rows)
            try:
                if not all(mixing.by_column([out]) for out in outs.values()):
                    continue
                for n, (token, place) in token_place.items():
                    own = F.linear(mixing.mix(outs[n]), used[n].down, used[n].down_bias)
                    total.index_add_(0, token, (own * weights[token, place, None]).to(total.dtype))
            except FAILURES:  # this attribute is no activation
                continue
            if are_close(total, expected):
                return layers, mixing
    return None


def _mixings(experts: nn.Module, out: Tensor, width: int) -> Iterator[Mixing]:
    """What may be between the layers of the experts: their own function of both halves, or that of an MLP."""
    if (own := getattr(experts, "_apply_gate", None)) is not None and out.shape[-1] == 2 * width:
        yield from (Mixing(own, halves_of(layout, 2 * width)) for layout in LAYOUTS)
    yield from (mixing for _, mixing in mixings(experts, [out], width))


def _layouts(experts: nn.Module, D: int) -> Iterator[Layers]:
    """What the experts' tensors may be by their shapes."""
    own = dict(experts.named_parameters(recurse=False))
    matrices, biases = ([name for name, p in own.items() if p.dim() == dim] for dim in (3, 2))
    orders: list[Sequence[str | None]] = list(permutations(biases)) if biases else [(None, None)]
    for (first, down), (first_bias, down_bias) in product(permutations(matrices), orders):
        for turned in product((False, True), repeat=2):
            (H, inputs), (outputs, M) = (
                own[name].shape[:0:-1] if t else own[name].shape[1:]
                for name, t in zip((first, down), turned, strict=True)
            )
            sizes = [None if name is None else own[name].shape[1] for name in (first_bias, down_bias)]
            if inputs == outputs == D and H in (M, 2 * M) and sizes in ([None, None], [H, D]):
                yield Layers(first, turned[0], first_bias, down, turned[1], down_bias)
