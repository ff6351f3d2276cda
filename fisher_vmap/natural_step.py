"""`natural_step`: the step of the residual stream that gains most of what is wanted for a given change of the output.

theta is the bias at a hooked layer, F the Fisher matrix of the output with respect to it, g the gradient of what is
wanted, such as the log-odds of some tokens. To second order a step delta changes the output by a KL divergence of
1/2 delta^T F delta. The step that maximises g . delta under delta^T (F + lambda I) delta = 2 KL is

    delta = c y,    y = (F + lambda I)^-1 g,    c = sqrt(2 KL / y^T (F + lambda I) y)

the natural gradient [Amari, Neural Computation 1998]. y is taken from a low-rank estimate A^T A of F, by the singular
values of A. Its length is taken from F of the whole vocabulary itself: y^T F y is |J y|^2 in the metric C, one push.

With T the wanted tokens, p their probability and g the gradient of log p - log(1 - p),

    F = p (1 - p) g g^T + (1 - p) F_other + p F_T

where F_other and F_T are the matrices of the distribution renormalised without T and within T. The first term does not
turn y. So for a single token y is the direction that gains its log-odds with the least change among the other tokens.

lambda shortens the part of a step along which F is (nearly) zero: there it costs nothing to second order, but would be
long.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.sequences import Tokens, masked, padded, tokens_of
from fisher_vmap.estimators import full, topk
from fisher_vmap.fisher import prompt_seeds
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.linear_map import LinearMap, undisturbed
from fisher_vmap.linearize.network import LinearizedNetwork
from fisher_vmap.linearize.output import distribution
from fisher_vmap.linearize.probe import layer_widths
from fisher_vmap.linearize.scores import Wanted, scores_of
from fisher_vmap.model.layers import resolve_layers
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.targets import grid_of, most_targets
from fisher_vmap.model.validation import check_whole
from fisher_vmap.model.wrappers import names_inside
from fisher_vmap.objective import OBJECTIVES, Objective, divergence, token_ids, without
from fisher_vmap.steering import Step, at_point

TRACE_SAMPLES = 4  # random vectors for the trace of what estimator full lacks
DAMPING = 0.01  # lambda as a part of F's mean eigenvalue, tr F / D, if not given
REACH = 0.1  # by which part measured and predicted KL may differ where the quadratic form holds


@dataclass(frozen=True, eq=False)
class NaturalStep(Step):
    """A `Step` that `natural_step` found, with what it was predicted to do and what it does.

    Attributes:
        kl: the budget, in nats, a prompt: of several targets the sum over them.
        predicted_kl: 1/2 step^T F step, with F of the whole vocabulary at theta = 0.
        measured_kl: KL(p || p_step) at the end, the mean over prompts, in nats.
        off_target_kl: the same of the distributions renormalised without the tokens that were wanted; NaN if a gradient
            was given.
        objective: what was wanted, before and after: the mean over prompts, in nats; NaN if a gradient was given.
        probability: of the wanted tokens, before and after, the mean over prompts and targets; NaN as before.
        damping: lambda, in nats^2 per squared unit of the residual stream; of several steps the last one's.
        steps: how many steps were taken.
    """

    kl: float = 0.0
    predicted_kl: float = float("nan")
    measured_kl: float = float("nan")
    off_target_kl: float = float("nan")
    objective: tuple[float, float] = (float("nan"), float("nan"))
    probability: tuple[float, float] = (float("nan"), float("nan"))
    damping: float = 0.0
    steps: int = 1

    @property
    def quadratic(self) -> bool:
        """Whether the measured KL is within 10% of the budget: beyond, F at one point no longer says what happens."""
        return abs(self.measured_kl - self.kl) <= REACH * self.kl


@autocast_off()
def natural_step(
    model: FisherModel | LinearizedNetwork | nn.Module,
    prompt: Any = None,
    *,
    towards: Any = None,
    away_from: Any = None,
    gradient: Tensor | None = None,
    objective: str = "log_odds",
    at: str = "all",
    kl: float = 0.1,
    damping: float | None = None,
    steps: int = 1,
    estimator: str = "full",
    rank: int = 32,
    layer: str | int | None = None,
    attention_mask: Tensor | None = None,
    positions: str | Tensor | None = None,
    targets: str | Tensor = "last",
) -> NaturalStep:
    """The step that gains most of something for a KL divergence of `kl` nats: delta ~ (F + lambda I)^-1 g.

    Of several prompts F, g and the KL divergence are the means, and the step is one for all. The formulas are those of
    the module.

    Args:
        model: a FisherModel; a causal LM with its `layer`; or an open `LinearizedNetwork`, without a prompt.
        prompt: token ids, [T] or [B, T] int64; or, for a FisherModel with a tokenizer, a text, a list of messages, or
            several of these. Texts have the targets and positions of the FisherModel, with the completions that it
            writes.
        towards: the wanted tokens: ids, or texts of one token each such as " yes"; one, or a list.
        away_from: tokens to trade them for: what is gained is log p(towards) - log p(away_from).
        gradient: in place of tokens: the gradient of what is wanted with respect to h at the targets, [M, D].
        objective: "log_odds", log p - log(1 - p), or "log_prob", log p, of `towards`; with `away_from` they are one.
        at: "all" targets, whose objectives are added, or the "first" target of each prompt alone. F is of all.
        kl: the budget, above zero, in nats; of several targets for their sum.
        damping: lambda, in units of F, above zero; None: 0.01 of F's mean eigenvalue, tr F / D.
        steps: how many steps to take. Each has the same length in the metric of its point, sqrt(2 kl) / steps, so that
            the path has the length of a single step; F and g are taken anew at each point.
        estimator: of A: "full" or "topk", with the FisherModel's top_k tokens (10 of a plain model).
        rank: vectors of estimator full; with D or more F is exact.
        layer: the hooked layer; may be left out if there is only one.
        attention_mask: [B, T] of token ids, 1 for real tokens.
        positions: of token ids: where the step is added: "all", "last" or a mask [B, T]; None: as the FisherModel.
        targets: of token ids: the positions whose next-token distribution is read: "last", "all" or a mask [B, T].

    Returns:
        NaturalStep, for `steer`; its `step` is [D].

    Raises:
        ValueError: an argument is not as described, g is zero, or the model has no forward derivatives.
    """
    _check(objective, at, estimator, kl, damping, (towards, away_from, gradient))
    check_whole("steps", steps)
    check_whole("rank", rank)
    if isinstance(model, LinearizedNetwork):
        if prompt is not None or steps > 1:
            raise ValueError("an open network has its prompt and its point; leave prompt and steps out")
        where: _Opened | _Prompts = _Opened(model, layer)
    else:
        where = _Prompts(_one_layer(model, layer, positions), prompt, attention_mask, targets)
    tokens = [token_ids(given, where.tokenizer) for given in (towards, away_from)]
    wanted = Objective(tokens[0], tokens[1], gradient, objective, at)
    theta_D, reached, ridge = torch.zeros(where.width, dtype=torch.float64), None, 0.0
    for _ in range(steps):
        points = [_look(net, wanted, estimator, rank, where.top_k) for net in where.networks(theta_D)]
        B = sum(point.prompts for point in points)
        A_nD = torch.cat([point.factor for point in points]) / B**0.5
        g_D = torch.stack([point.gradient for point in points]).sum(0) / B
        if not (bool(g_D.isfinite().all()) and bool(g_D.any())):
            raise ValueError("the gradient of what is wanted is zero or not finite: no small step gains anything")
        trace = float(A_nD.square().sum()) + sum(point.rest for point in points) / B
        ridge = DAMPING * trace / len(g_D) if damping is None else float(damping)
        y_D = solved(A_nD, g_D, ridge)
        curvature = sum(_curvature(net, y_D) for net in where.networks(theta_D)) / B
        length = (2 * kl / (curvature + ridge * float(y_D @ y_D))) ** 0.5 / steps
        theta_D = theta_D + length * y_D
        reached = reached or (points, 0.5 * length**2 * curvature)
    assert reached is not None
    first, predicted = reached
    ends = [_end(net, wanted, point) for net, point in zip(where.networks(theta_D), first, strict=True)]
    kl_at_end, off_target, *values = (torch.cat(column).double() for column in zip(*ends, strict=True))
    before, after, p_before, p_after = (float(x.mean()) for x in values)
    return NaturalStep(
        step=theta_D.to(torch.promote_types(where.dtype, torch.float32)),
        layer=where.layer,
        positions=where.positions,
        kl=float(kl),
        predicted_kl=predicted,
        measured_kl=float(kl_at_end.mean()),
        off_target_kl=float(off_target.mean()),
        objective=(before, after),
        probability=(p_before, p_after),
        damping=ridge,
        steps=steps,
    )


class _Point(NamedTuple):
    """What one batch is at one point.

    Attributes:
        prompts: how many.
        factor: [n, D] float64, on the CPU: the matrices of all prompts add up to factor^T factor.
        rest: the trace of what the factors lack, summed over the prompts.
        gradient: [D] float64, summed over the prompts.
        log_probs: [M, V], at the targets.
    """

    prompts: int
    factor: Tensor
    rest: float
    gradient: Tensor
    log_probs: Tensor


def _look(net: LinearMap, wanted: Objective, estimator: str, rank: int, top_k: int) -> _Point:
    """F and g of one batch."""
    (layer,), B = net.layers, len(net.layout.lengths)
    with net.prepared():
        if estimator == "full":
            seeds = prompt_seeds(net.layout)
            found = full(LinearizedNetwork({layer: net}), vectors=rank, seeds=seeds, top_k=1, samples=TRACE_SAMPLES)
        else:
            found = topk(scores_of(net, Wanted(top_k, most_targets=most_targets(net.layout))))
        c = distribution(net.head, net.rows)
        chosen_M = _chosen(net, wanted.at)
        u_MX = wanted.cotangents(c, net.rows.shape[1]) * chosen_M[:, None].to(c.probs)
        g_BD = net.pull(u_MX[:, None])[layer].gradients[:, 0]
    random = found.remainder.get(layer)
    rest = 0.0 if random is None or not random.numel() else float(random.square().sum((1, 2)).sum() / random.shape[1])
    A_nD = found.factors[layer].flatten(0, 1).double().cpu()
    return _Point(B, A_nD, rest, g_BD.double().sum(0).cpu(), c.log_probs)


def _chosen(net: LinearMap, at: str) -> Tensor:
    """[M] of 0 and 1: the targets whose objective counts."""
    ranks = grid_of(net.layout).ranks
    return torch.tensor([float(at == "all" or rank == 0) for rank in ranks], device="cpu")


def solved(A_nD: Tensor, g_D: Tensor, ridge: float) -> Tensor:
    """(A^T A + ridge I)^-1 g in float64, by the singular values of A; a direction that A lacks is divided by ridge."""
    _, S_r, V_rD = torch.linalg.svd(A_nD, full_matrices=False)
    along_r = V_rD @ g_D
    y_D: Tensor = (along_r / (S_r.square() + ridge)) @ V_rD + (g_D - along_r @ V_rD) / ridge
    return y_D


def _curvature(net: LinearMap, y_D: Tensor) -> float:
    """y^T F y with F of the whole vocabulary, summed over the prompts of a batch."""
    (layer,), B = net.layers, len(net.layout.lengths)
    with net.prepared():
        z_M1X = net.push(y_D.to(net.rows).expand(B, 1, -1), layer)
        return float((z_M1X * distribution(net.head, net.rows).product(z_M1X)).double().sum())


def _end(net: LinearMap, wanted: Objective, before: _Point) -> tuple[Tensor, ...]:
    """At the end of the step, for each prompt: its KL, off target KL, objective before and after, and probability."""
    with net.prepared():
        log_q_MV = distribution(net.head, net.rows).log_probs.double()
    log_p_MV, grid = before.log_probs.double(), grid_of(net.layout)

    def by_prompt(x_M: Tensor) -> Tensor:
        return grid.spread(x_M.cpu(), 0.0).sum(1)

    kl_B = by_prompt(divergence(log_p_MV, log_q_MV))
    if wanted.towards is None:
        return (kl_B, *[torch.full_like(kl_B, torch.nan)] * 5)
    tokens = wanted.towards if wanted.away_from is None else torch.cat([wanted.towards, wanted.away_from])
    off_B = by_prompt(divergence(without(log_p_MV, tokens), without(log_q_MV, tokens)))
    chosen_M = _chosen(net, wanted.at)
    told = [by_prompt(wanted.values(x).cpu() * chosen_M) for x in (log_p_MV, log_q_MV)]
    count_B = by_prompt(chosen_M)
    p = [by_prompt(x[:, wanted.towards].exp().sum(1).cpu() * chosen_M) / count_B for x in (log_p_MV, log_q_MV)]
    return (kl_B, off_B, *told, *p)


class _Opened:
    """An open network in place of a model and prompts; at its end it runs its model again."""

    tokenizer, top_k = None, 10

    def __init__(self, network: LinearizedNetwork, layer: str | int | None) -> None:
        maps = {name: net for net in network.maps() for name in net.layers}
        if layer is None and len(maps) == 1:
            layer = next(iter(maps))
        if not isinstance(layer, str) or layer not in maps:
            raise ValueError(f"layer is {layer!r}; expected one of the hooked layers, {list(maps)}")
        self._net, self.layer = copy.copy(maps[layer]), layer
        self._net.layers = [layer]
        self.width, self.dtype, self.positions = self._net.widths[layer], self._net.dtype, self._net.layout.positions

    def networks(self, theta_D: Tensor) -> Iterator[LinearMap]:
        """The network at a point."""
        if not bool(theta_D.any()):
            yield self._net
            return
        with at_point(self._net.model, self.layer, theta_D):
            there = copy.copy(self._net)
            there.open()
            yield there


class _Batch(NamedTuple):
    """The arguments of `FisherModel.linearize`."""

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: str | Tensor
    targets: str | Tensor


def _rows(fisher: FisherModel, prompts: Sequence[Any]) -> list[Tokens]:
    """The token ids of prompts, with the completions that they have or that the model writes."""
    rows: list[Tokens] = []
    for prompt, completion in fisher.pairs(prompts, None):
        try:
            if isinstance(completion, SkippedPrompt):
                raise completion
            rendered = fisher.renderer.render(prompt, completion)
        except SkippedPrompt as reason:
            raise ValueError(f"prompt {len(rows)} has nothing to compute: {reason}") from reason
        rows.append(Tokens(rendered.ids, rendered.start))
    return [row for sequences in fisher.sequences(rows) for row in sequences]


class _Prompts:
    """Prompts of a FisherModel with one layer, in batches."""

    def __init__(self, fisher: FisherModel, prompt: Any, attention_mask: Tensor | None, targets: str | Tensor) -> None:
        (self.layer,) = fisher.layers
        self._fisher, self.width, self.top_k = fisher, fisher.widths[self.layer], fisher.top_k
        self.tokenizer, self.positions = fisher.tokenizer, fisher.options.positions
        self.dtype = next(fisher.model.parameters()).dtype
        if isinstance(prompt, Tensor) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            ids = torch.as_tensor(prompt, device=fisher.device)
            self._batches = [_Batch(ids[None] if ids.dim() == 1 else ids, attention_mask, self.positions, targets)]
        else:
            self._batches = list(self._of_text(prompt))
        self._last: tuple[Tensor, LinearMap] | None = None

    def _of_text(self, prompt: Any) -> Iterator[_Batch]:
        """Batches of about as many tokens as the FisherModel's, in the order given."""
        one = isinstance(prompt, str | dict) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict))
        fisher, rows = self._fisher, _rows(self._fisher, [prompt] if one else prompt)
        while rows:
            count = 1
            while count < min(len(rows), fisher.batch_size) and tokens_of(rows[: count + 1]) <= fisher.max_batch_tokens:
                count += 1
            some, rows = rows[:count], rows[count:]
            ids, mask = padded(some, fisher.device, max(len(row.ids) for row in some))
            where, read = str(self.positions), fisher.targets
            yield _Batch(
                ids,
                mask,
                where if where in ("all", "last") else masked(some, mask, where),
                str(read) if read in ("last", "all") else masked(some, mask, "targets"),
            )

    def networks(self, theta_D: Tensor) -> Iterator[LinearMap]:
        """The networks of the batches at a point, one after the other; that of a single batch is kept."""
        moved = bool(theta_D.any())
        with at_point(self._fisher.model, self.layer, theta_D) if moved else nullcontext():
            if self._last is not None and torch.equal(self._last[0], theta_D):
                yield self._last[1]
                return
            for batch in self._batches:
                ids, mask, positions, targets = batch
                with self._fisher.linearize(ids, mask, positions=positions, targets=targets) as network:
                    (net,) = network.maps()
                if len(self._batches) == 1:
                    self._last = theta_D, net
                yield net


def _one_layer(model: FisherModel | nn.Module, layer: str | int | None, positions: str | Tensor | None) -> FisherModel:
    """A FisherModel with one layer."""
    if not isinstance(model, FisherModel):
        if layer is None:
            raise ValueError("layer is missing; give the name or the number of a layer, or a FisherModel")
        return FisherModel(model, layers=[layer], positions="all" if positions is None else positions)
    one = copy.copy(model)
    if positions is not None:
        one.options = replace(model.options, positions=positions)
    if layer is not None:
        with undisturbed(model.model, model.precision):
            one.layers = resolve_layers(model.model, names_inside(model.model, model.model, [layer]))
        one.widths = layer_widths(model.model, one.layers)
    if len(one.layers) > 1:
        raise ValueError(f"the FisherModel has the layers {one.layers}; say with layer which one to steer")
    return one


def _check(objective: str, at: str, estimator: str, kl: float, damping: float | None, wanted: Sequence[Any]) -> None:
    """Raise ValueError for arguments that are wrong by themselves."""
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("at", at, ("all", "first")),
        ("estimator", estimator, ("full", "topk")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if not 0 < kl < float("inf"):
        raise ValueError(f"kl is {kl}; expected nats above zero, such as 0.1")
    if damping is not None and not 0 < damping < float("inf"):
        raise ValueError(f"damping is {damping}; expected a number above zero, in the units of F, or None")
    towards, away_from, gradient = wanted
    if (towards is None) == (gradient is None) or (away_from is not None and towards is None):
        raise ValueError("what is wanted is either towards, tokens, with or without away_from; or a gradient")
