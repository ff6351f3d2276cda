"""Parts of `benchmarks.steering` on fewer prompts: ranks of the estimate, several steps in a row, and whole texts."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.steering_concepts import Case
from benchmarks.steering_known import POINTS_TRIED, Known, rounded, swept
from benchmarks.steering_measure import Effect, Prompt, along, at_gain, divergence, effects, lengths_for, streams
from benchmarks.steering_numbers import EUCLID, GAINS
from benchmarks.steering_steps import Estimator, factors, from_estimate, natural, unit
from fisher_vmap.natural import PRODUCTS as DEFAULT
from fisher_vmap.natural import natural_step

FEW = 2  # testing prompts
ALONE = (Estimator("topk", 10), Estimator("full", 64))  # estimates without products by F
PRODUCTS, VARIED = (4, 8, 16), (1e-2, 1e-1)  # and dampings
EIGHT, BUDGETS = 8, (2.0, 5.0)  # steps in a row; their budget: that of a single step that would gain so much
NEW = 20  # tokens of a text
TEXTS, TRIED = 10, 5  # choosing prompts on whose texts a step is made, testing prompts; for the length
AT = 2.0  # nats of gain, at which texts are compared


def measure_variants(known: Known, layer: str, damping: float) -> dict[str, Any]:
    """Each prompt's own step: by products and damping, from estimates alone, exact; and eight steps in a row."""
    site, by = known.loaded.site(layer), dict[str, list[Any]]()
    several: dict[str, list[Any]] = {"one step": [], "several steps": []}
    for case in known.testing[:FEW]:
        prompt = known.prompt(case, layer)
        directions, tr = {EUCLID: unit(prompt.gradient)}, known.unit([case], layer)
        for products in PRODUCTS:
            made = {c: known.natural([case], layer, c * tr, products=products) for c in VARIED}
            directions |= {f"{products} products/{c:g}": v for c, v in made.items()}
        for how in (*ALONE, Estimator("full", len(prompt.gradient))):
            name = "exact" if how.rank == len(prompt.gradient) else f"{how} alone"
            (factor,) = factors(site, [prompt.ids], how)
            directions |= {f"{name}/{c:g}": from_estimate(factor, prompt.gradient, c) for c in VARIED}
        kl_at = swept(known, case, layer, list(directions.values()), POINTS_TRIED)
        for name, values in zip(directions, kl_at, strict=True):
            by.setdefault(name, []).append(rounded(values))
        several["one step"].append(by[f"{DEFAULT} products/{damping:g}"][-1])
        several["several steps"].append(rounded(in_a_row(known, case, layer, damping)))
    return {"damping": damping, "by": by, "in a row": several}


def in_a_row(known: Known, case: Case, layer: str, damping: float) -> list[float]:
    """The off-target KL at `GAINS`, of natural_step with several steps at some budgets."""
    site, prompt = known.loaded.site(layer), known.prompt(case, layer)
    how: dict[str, Any] = {"layer": layer, "towards": known.wanted.tolist()}
    tr = known.unit([case], layer)
    one = natural_step(site.model, torch.tensor(prompt.ids), kl=0.01, damping=damping * tr, **how)
    slope = float(one.step.double() @ prompt.gradient)
    steps = [
        natural_step(
            site.model,
            torch.tensor(prompt.ids),
            kl=0.01 * (gain / slope) ** 2,
            damping=damping * tr,
            steps=EIGHT,
            **how,
        ).step
        for gain in BUDGETS
    ]
    return at_gain(effects(site, prompt, torch.stack(steps), known.wanted), GAINS)


def measure_texts(known: Known, layer: str, damping: float) -> dict[str, Any]:
    """KL over the tokens that the unsteered model writes, at the length that gains two nats on the choosing half."""
    site = known.loaded.site(layer)
    directions = known.directions(layer, damping)
    rows = [[*known.prompt(case, layer).ids, *written(known, case)] for case in known.choosing[:TEXTS]]
    ridge = NEW * damping * known.unit(known.choosing[:TEXTS], layer)
    directions["natural, over the text"] = natural(site, rows, known.wanted, ridge, predict=NEW)
    lengths = lengths_at(known, layer, directions)
    found: dict[str, dict[str, list[float]]] = {name: {"kl": [], "first": [], "gain": []} for name in lengths}
    for case in known.testing[:TEXTS]:
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
