"""Parts of `benchmarks.steering` on fewer prompts: ranks of the estimate, several steps in a row, and whole texts."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.steering_concepts import Case
from benchmarks.steering_known import POINTS_TRIED, Known, rounded, swept
from benchmarks.steering_measure import Effect, Prompt, along, at_gain, divergence, effects, lengths_for, streams
from benchmarks.steering_numbers import DAMPINGS, GAINS
from benchmarks.steering_steps import MEAN, OWN_BY, Estimator, factors, natural, unit
from fisher_vmap.natural_step import natural_step

FEW = 2  # testing prompts
ESTIMATORS = (*(Estimator("topk", k) for k in (10, 50)), *(Estimator("full", rank) for rank in (16, 32, 64)))
EIGHT, BUDGETS = 8, (1.5, 3.0, 6.0)  # steps in a row; their budget: that of a single step that would gain so much
NEW = 20  # tokens of a text
MADE, TRIED = 10, 5  # choosing prompts on whose texts a step is made; on which the length is found
AT = 2.0  # nats of gain, at which texts are compared


def measure_variants(known: Known, layer: str, damping: float) -> dict[str, Any]:
    """Each prompt's own step: by estimator, rank and damping; and eight steps in a row with one damping."""
    some, width = known.testing[:FEW], int(known.prompt(known.testing[0], layer).stream.shape[1])
    by: dict[str, list[Any]] = {}
    eight: dict[str, list[Any]] = {"one step": [], "eight steps": []}
    for case in some:
        prompt = known.prompt(case, layer)
        directions = {"Euclidean gradient": unit(prompt.gradient)}
        for how in (*ESTIMATORS, Estimator("full", width)):
            name = "exact" if how.rank == width else str(how)
            directions |= {f"{name}/{c:g}": known.natural([case], layer, how, c) for c in DAMPINGS}
            if how == OWN_BY["natural, full"]:
                one = known.factors([case], layer, how)
                spread = {c: natural(one, [prompt.gradient], c, spread=True) for c in DAMPINGS}
                directions |= {f"{name} and the rest/{c:g}": v for c, v in spread.items()}
        for name, values in zip(
            directions, swept(known, case, layer, list(directions.values()), POINTS_TRIED), strict=True
        ):
            by.setdefault(name, []).append(rounded(values))
        how = MEAN["natural, full"]
        eight["one step"].append(by[f"{how}/{damping:g}"][-1])
        eight["eight steps"].append(rounded(in_a_row(known, case, layer, how, damping)))
    return {"damping": damping, "by": by, "in a row": eight}


def in_a_row(known: Known, case: Case, layer: str, how: Estimator, damping: float) -> list[float]:
    """The off-target KL at `GAINS`, of natural_step with eight steps at several budgets."""
    site, prompt = known.loaded.site(layer), known.prompt(case, layer)
    (factor,) = known.factors([case], layer, how)
    direction_D = natural([factor], [prompt.gradient], damping)
    ridge = damping * factor.trace / len(direction_D)
    curvature = float((factor.rows @ direction_D).square().sum()) + ridge
    slope = float(direction_D @ prompt.gradient)
    steps = [
        natural_step(
            site.model, torch.tensor(prompt.ids), layer=layer, towards=known.wanted.tolist(), damping=ridge,
            kl=0.5 * curvature * (gain / slope) ** 2, steps=EIGHT, estimator=how.name, rank=how.rank,
        ).step
        for gain in BUDGETS
    ]  # fmt: skip
    return at_gain(effects(site, prompt, torch.stack(steps), known.wanted), GAINS)


def measure_texts(known: Known, layer: str, chosen: dict[str, float]) -> dict[str, Any]:
    """KL over the tokens that the unsteered model writes, at the length that gains two nats on the choosing half."""
    site = known.loaded.site(layer)
    directions = known.directions(layer, chosen)
    made = known.choosing[:MADE]
    rows = [[*known.prompt(case, layer).ids, *written(known, case)] for case in made]
    gradients = [known.prompt(case, layer).gradient for case in made]
    over_text = factors(site, rows, MEAN["natural, full"], targets=NEW)
    directions["natural, over the text"] = natural(over_text, gradients, chosen["average/natural, full"])
    lengths = lengths_at(known, layer, directions)
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "first": [], "gain": []} for name in lengths}
    for case in known.testing[:MADE]:
        prompt = known.prompt(case, layer)
        ids = [*prompt.ids, *written(known, case)[: NEW - 1]]
        stream_TD = streams(known.loaded.model, [layer], ids)[layer]
        steps = torch.stack([lengths[name] * directions[name] for name in lengths])
        gain = effects(site, prompt, steps, known.wanted).gain
        for i, (name, kl) in enumerate(zip(lengths, over_tokens(known, layer, stream_TD, steps), strict=True)):
            found[name]["kl"].append(float(kl.sum()))
            found[name]["first"].append(float(kl[0]))
            found[name]["gain"].append(float(gain[i]))
    return {
        name: {"length": rounded([lengths[name]])[0], **{key: rounded(values) for key, values in of.items()}}
        for name, of in found.items()
    }


def written(known: Known, case: Case) -> list[int]:
    """What the unsteered model writes, the likeliest token each time."""
    ids = torch.tensor([known.prompt(case, known.loaded.layers[0]).ids])
    out = known.loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return [int(token) for token in out[0, ids.shape[1] :]]


def lengths_at(known: Known, layer: str, directions: dict[str, Tensor]) -> dict[str, float]:
    """The median length at which each direction gains `AT` on choosing prompts; those that most never reach are out."""
    site, found = known.loaded.site(layer), {name: list[float]() for name in directions}
    for case in known.choosing[-TRIED:]:
        prompt: Prompt = known.prompt(case, layer)
        norm = float(prompt.stream[-1].norm())
        sweeps = [(v, lengths_for(prompt, v, norm, POINTS_TRIED + 1, 0.4)) for v in directions.values()]
        for name, (_, lengths), effect in zip(
            directions, sweeps, along(site, prompt, sweeps, known.wanted), strict=True
        ):
            found[name] += at_gain(Effect(effect.gain, lengths.numpy()), [AT])
    medians = {name: float(np.median(values)) for name, values in found.items()}
    return {name: length for name, length in medians.items() if np.isfinite(length)}


def over_tokens(known: Known, layer: str, stream_TD: Tensor, steps_nD: Tensor) -> list[Tensor]:
    """For each step [NEW]: KL(p || p_step) of what comes next at each of the last `NEW` positions."""
    site = known.loaded.site(layer)
    with site.above(), torch.no_grad():
        before_MV = site.logits(stream_TD[None], NEW)[0].double().log_softmax(-1)
        p_MV, found = before_MV.exp(), []
        for step_D in steps_nD.float():
            after_MV = site.logits((stream_TD + step_D)[None], NEW)[0].double().log_softmax(-1)
            found.append(divergence(p_MV, after_MV - before_MV))
    return found
