"""`natural_step`: the step of the residual stream that gains most of what is wanted for a given change of the output.

theta is the bias at a hooked layer, F the Fisher matrix of the output with respect to it, g the gradient of what is
wanted, such as the log-odds of some tokens. To second order a step delta changes the output by a KL divergence of
1/2 delta^T F delta. The step that maximises g . delta under delta^T (F + lambda I) delta = 2 KL is

    delta = c y,    y = (F + lambda I)^-1 g,    c = sqrt(2 KL / y^T (F + lambda I) y)

the natural gradient [Amari, Neural Computation 1998]. F is that of the whole vocabulary, F = J^T C J: a product F v is
one push, C, and one pull. y is found by conjugate gradients with a few such products. A low-rank estimate A^T A of F
preconditions them: (A^T A + r I)^-1, with F's mean eigenvalue for what A lacks. The y of k products gains most among
all steps of a space of k dimensions that grows with k. Its length c is exact.

With T the wanted tokens, p their probability and g the gradient of log p - log(1 - p),

    F = p (1 - p) g g^T + (1 - p) F_other + p F_T

where F_other and F_T are the matrices of the distribution renormalised without T and within T. The first term does not
turn y. So for a single token y is the direction that gains its log-odds with the least change among the other tokens.

lambda shortens the part of a step along which F is (nearly) zero: there it costs nothing to second order, but would be
long.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.estimators import TRACE_SAMPLES, full, topk
from fisher_vmap.fisher import prompt_seeds
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.linear_map import LinearMap
from fisher_vmap.linearize.network import LinearizedNetwork
from fisher_vmap.linearize.output import Probes
from fisher_vmap.linearize.scores import Wanted, scores_of
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.targets import grid_of, most_targets
from fisher_vmap.model.validation import check_whole, in_float64
from fisher_vmap.objective import OBJECTIVES, Objective, divergence, token_ids, without
from fisher_vmap.points import OneNetwork, Point, Prompts, one_layer
from fisher_vmap.steering import Step

DAMPING = 0.01  # lambda as a part of F's mean eigenvalue, tr F / D, if not given: see docs/steering-study.md
PRODUCTS = 8  # by F, if not given
SMALL_WIDTH = 128  # up to which D the equation for y is solved, if their number is not given
SOLVED = 1e-10  # the residual of the equation for y, relative to g, at which no more products are taken
LATER = 4  # a step after the first takes this part of its products: it knows F along the directions before
KLS = (1e-12, 1e6)  # nats, of a budget
REACH = 0.1  # by which part measured and predicted KL may differ where the quadratic form holds


@dataclass(frozen=True, eq=False)
class NaturalStep(Step):
    """A `Step` that `natural_step` found, with what it was predicted to do and what it does.

    Attributes:
        kl: the budget, in nats, a prompt: of several targets the sum over them.
        predicted_kl: 1/2 step^T F step, with F of the whole vocabulary at theta = 0; of several steps half the squared
            length of the path, each step measured by F at its own point.
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
        """Whether the measured KL is within 10% of the predicted one: beyond, F at one point does not say what happens.

        The predicted KL is below the budget by the part of it that the damping takes.
        """
        return abs(self.measured_kl - self.predicted_kl) <= REACH * self.predicted_kl


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
    estimator: str = "topk",
    rank: int = 32,
    products: int | None = None,
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
        damping: lambda, in units of F, above zero; None: 0.01 of F's mean eigenvalue, tr F / D, as estimated.
        steps: how many steps to take. Each has the same length in the metric of its point, sqrt(2 kl) / steps, so that
            the path has the length of a single step; F and g are taken anew at each point.
        estimator: of A, the first guess of F: "topk", of the FisherModel's top_k tokens (10 of a plain model), or
            "full".
        rank: vectors of estimator full; with D or more A^T A is F itself.
        products: by F of the whole vocabulary, one push and one pull each, that refine y; a quarter of them in each
            step after the first. None: 8, or as many as solve for y where D is at most 128.
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
    check_whole("steps", steps, 1)
    check_whole("rank", rank, 1)
    if products is not None:
        check_whole("products", products, 1)
    if isinstance(model, LinearizedNetwork):
        if prompt is not None or steps > 1:
            raise ValueError("an open network has its prompt and its point; leave prompt and steps out")
        where: OneNetwork | Prompts = OneNetwork(model, layer)
    else:
        where = Prompts(one_layer(model, layer), prompt, attention_mask, positions, targets)
    tokens = [token_ids(given, where.tokenizer) for given in (towards, away_from)]
    if both := {*_listed(tokens[0])} & {*_listed(tokens[1])}:
        raise ValueError(f"token {min(both)} is in towards and in away_from; leave it out of one of the two")
    gradient = None if gradient is None else torch.as_tensor(gradient)
    wanted = Objective(tokens[0], tokens[1], gradient, objective, at)
    theta_D, path = torch.zeros(where.width, dtype=torch.float64), 0.0
    ridge = rest = mean_eigenvalue = 0.0
    first: list[_Local] = []
    rows: list[Tensor] = []
    solution: Solution | None = None
    for number in range(steps):
        guessing = number == 0 or rest == 0  # F is A^T A itself where that lacks nothing
        found = [_look(point, wanted, estimator if guessing else None, rank) for point in where.points(theta_D)]
        B = sum(each.prompts for each in found)
        g_D = torch.stack([each.gradient for each in found]).sum(0) / B
        if not (bool(g_D.isfinite().all()) and bool(g_D.any())):
            raise ValueError("the gradient of what is wanted is zero or not finite: no small step gains anything")
        if guessing:
            rows = [torch.cat([each.factor for each in found]) / B**0.5]
            rest = sum(each.rest for each in found) / B / len(g_D)
            mean_eigenvalue = float(rows[0].square().sum()) / len(g_D) + rest
            ridge = DAMPING * mean_eigenvalue if damping is None else float(damping)
        near = _inverse(torch.cat(rows), ridge + (mean_eigenvalue if rest else 0.0))

        def times_F(v_D: Tensor, theta_D: Tensor = theta_D, B: int = B) -> Tensor:
            return torch.stack([_product(point, v_D) for point in where.points(theta_D)]).sum(0) / B

        solution = solved(times_F, near, g_D, ridge, _most_products(products, number, len(g_D)), solution)
        y_D, curvature = solution.y, float(solution.y @ solution.Fy)
        if not curvature > 0:
            raise ValueError("no step along the gradient of what is wanted changes the output by a finite number")
        rows += solution.rows
        length = (2 * kl / (curvature + ridge * float(y_D @ y_D))) ** 0.5 / steps
        theta_D, path = theta_D + length * y_D, path + length * curvature**0.5
        first = first or found
    ends = [_end(point, wanted, before) for point, before in zip(where.points(theta_D), first, strict=True)]
    kl_at_end, off_target, *values = (torch.cat(column).double() for column in zip(*ends, strict=True))
    before, after, p_before, p_after = (float(x.mean()) for x in values)
    return NaturalStep(
        step=theta_D.to(torch.promote_types(where.dtype, torch.float32)),
        layer=where.layer,
        positions=where.positions,
        kl=float(kl),
        predicted_kl=0.5 * path**2,
        measured_kl=float(kl_at_end.mean()),
        off_target_kl=float(off_target.mean()),
        objective=(before, after),
        probability=(p_before, p_after),
        damping=ridge,
        steps=steps,
    )


class _Local(NamedTuple):
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


def _look(point: Point, wanted: Objective, estimator: str | None, rank: int) -> _Local:
    """A and g of one batch, of one target a prompt by one pull; without an estimator g alone."""
    net, c = point
    (layer,), B = net.layers, len(net.layout.lengths)
    u_MX = wanted.cotangents(c, net.rows.shape[1]) * _chosen(net, wanted.at)[:, None].to(c.probs)
    with net.prepared():
        if estimator is None:
            g_BD = net.pull(u_MX[:, None])[layer].gradients[:, 0]
            A_BnD = random_BSD = g_BD.new_zeros(B, 0, g_BD.shape[1])
        elif estimator == "topk" and most_targets(net.layout) == 1:
            reading = c.reading
            tokens_KMX = reading.cotangents * (reading.log_probs / 2).exp().T[:, :, None]
            pulled = net.pull(torch.cat([tokens_KMX, reading.random, u_MX[None]]).transpose(0, 1))[layer].gradients
            A_BnD, random_BSD, g_BD = pulled[:, : len(tokens_KMX)], pulled[:, len(tokens_KMX) : -1], pulled[:, -1]
        else:
            seeds = prompt_seeds(net.layout)
            if estimator == "full":
                one = LinearizedNetwork({layer: net})
                found = full(one, vectors=rank, seeds=seeds, top_k=1, samples=TRACE_SAMPLES)
            else:
                probes = Probes(TRACE_SAMPLES, seeds)
                asked = Wanted(len(c.reading.cotangents), probes=probes, most_targets=most_targets(net.layout))
                found = topk(scores_of(net, asked))
            A_BnD, random_BSD = found.factors[layer], found.remainder[layer]
            g_BD = net.pull(u_MX[:, None])[layer].gradients[:, 0]
    rest = float(random_BSD.cpu().double().square().sum((1, 2)).sum() / max(1, random_BSD.shape[1]))
    return _Local(B, A_BnD.flatten(0, 1).cpu().double(), rest, g_BD.cpu().double().sum(0), c.log_probs)


def _chosen(net: LinearMap, at: str) -> Tensor:
    """[M] of 0 and 1: the targets whose objective counts."""
    ranks = grid_of(net.layout).ranks
    return torch.tensor([float(at == "all" or rank == 0) for rank in ranks], device="cpu")


def _inverse(A_nD: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """The function v -> (A^T A + ridge I)^-1 v in float64, by singular values; what A lacks is divided by ridge."""
    _, S_r, V_rD = torch.linalg.svd(A_nD, full_matrices=False)

    def times(v_D: Tensor) -> Tensor:
        along_r = V_rD @ v_D
        y_D: Tensor = (along_r / (S_r.square() + ridge)) @ V_rD + (v_D - along_r @ V_rD) / ridge
        return y_D

    return times


def _most_products(asked: int | None, number: int, width: int) -> int:
    """How many products by F a step may take, by its number."""
    if asked is None and width <= SMALL_WIDTH:
        return 2 * width
    most = PRODUCTS if asked is None else asked
    return most if number == 0 else -(-most // LATER)


class Solution(NamedTuple):
    """The solution of (F + ridge I) y = g.

    Attributes:
        y: [D].
        Fy: [D], F y.
        rows: for each direction p that was tried a row r, [1, D]: r^T r = F p p^T F / p^T F p is F along p.
    """

    y: Tensor
    Fy: Tensor
    rows: list[Tensor]


def solved(
    times_F: Callable[[Tensor], Tensor],
    near: Callable[[Tensor], Tensor],
    g_D: Tensor,
    ridge: float,
    products: int,
    before: Solution | None = None,
) -> Solution:
    """Solve (F + ridge I) y = g by conjugate gradients, with so many products by F at most.

    Each y is the best of its span: none there has a larger g . y for its y^T (F + ridge I) y. `near` is a product by
    about the inverse. With the solution at the point before, the first direction is that solution, corrected for the
    new g.
    """
    y_D, Fy_D, residual_D, rows = torch.zeros_like(g_D), torch.zeros_like(g_D), g_D, []
    direction_D = near(g_D) if before is None else before.y + near(g_D - before.Fy - ridge * before.y)
    for _ in range(products):
        F_D = times_F(direction_D)
        seen = float(direction_D @ F_D)
        if not seen > 0:  # nothing but rounding, or not finite
            break
        rows.append(F_D[None] / seen**0.5)
        along_D = F_D + ridge * direction_D
        curved = float(direction_D @ along_D)
        step = float(residual_D @ direction_D) / curved
        y_D, Fy_D, residual_D = y_D + step * direction_D, Fy_D + step * F_D, residual_D - step * along_D
        if float(residual_D.norm()) <= SOLVED * float(g_D.norm()):
            break
        next_D = near(residual_D)
        direction_D = next_D - float(next_D @ along_D) / curved * direction_D
    return Solution(y_D, Fy_D, rows)


def _product(point: Point, v_D: Tensor) -> Tensor:
    """F v with F of the whole vocabulary, [D] float64, summed over the prompts of a batch."""
    net, c = point
    (layer,), B = net.layers, len(net.layout.lengths)
    with net.prepared():
        z_M1X = net.push(v_D.to(net.rows).expand(B, 1, -1), layer)
        return net.pull(c.product(z_M1X))[layer].gradients[:, 0].cpu().double().sum(0)


def _end(point: Point, wanted: Objective, before: _Local) -> tuple[Tensor, ...]:
    """At the end of the step, for each prompt: its KL, off target KL, objective before and after, and probability."""
    net, log_q_MV = point.net, in_float64(point.c.log_probs)
    log_p_MV, grid = in_float64(before.log_probs), grid_of(net.layout)

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


def _listed(tokens: Tensor | None) -> list[int]:
    return [] if tokens is None else tokens.tolist()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check(objective: str, at: str, estimator: str, kl: float, damping: float | None, wanted: Sequence[Any]) -> None:
    """Raise ValueError for arguments that are wrong by themselves."""
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("at", at, ("all", "first")),
        ("estimator", estimator, ("full", "topk")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if not (_is_number(kl) and KLS[0] <= kl <= KLS[1]):
        raise ValueError(f"kl is {kl!r}; expected nats above zero, such as 0.1: from {KLS[0]:g} to {KLS[1]:g}")
    if damping is not None and not (_is_number(damping) and 0 < damping < float("inf")):
        raise ValueError(f"damping is {damping!r}; expected a number above zero, in the units of F, or None")
    towards, away_from, gradient = wanted
    if (towards is None) == (gradient is None) or (away_from is not None and towards is None):
        raise ValueError("what is wanted is either towards, tokens, with or without away_from; or a gradient")
