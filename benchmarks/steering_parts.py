"""Sections of docs/steering-study.md: the damping, products by F, several steps in a row, whole texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.steering_numbers import DAMPINGS, EUCLID, GAINS, NATURAL, SHOWN, Array, array, middle, number, score
from fisher_vmap.natural import DAMPING

KINDS = {"own": "each prompt's own", "average": "one for a concept"}


def penalties(kept: dict[str, Any], setting: str, gains: Sequence[float] = SHOWN) -> dict[str, Array]:
    """Of each model and layer: how many times the off-target KL of the best damping each damping costs."""
    rows = {}
    for model, of in kept["models"].items():
        for layer in dict.fromkeys(key.split("/")[0] for key in of["tries"]):
            tries = {key: found for key, found in of["tries"].items() if key.startswith(f"{layer}/")}
            scores = np.array([score(tries, f"{setting}/{c:g}", gains) for c in DAMPINGS])
            if np.isfinite(scores).any():
                told = [key.split("/")[1] for key in tries]
                part = "" if len(told) == len(of["concepts"]) else f" ({', '.join(told)})"
                rows[f"{model}, {layer}{part}"] = np.exp(scores - scores.min())
    return rows


def best_single(kept: dict[str, Any], setting: str, gains: Sequence[float] = SHOWN) -> str:
    """The damping that costs least over all models: the least geometric mean."""
    found = list(penalties(kept, setting, gains).values())
    return f"{DAMPINGS[int(np.log(found).mean(0).argmin())]:g}" if found else "none gets there"


def dampings(kept: dict[str, Any]) -> list[str]:
    """How the damping was chosen, and what others cost."""
    ends, fixed = (GAINS[0], *SHOWN), kept["settings"]
    used = [
        f"{model}, " + ", ".join(f"{name} {of['chosen'][setting]:g}" for setting, name in KINDS.items())
        for model, of in kept["models"].items()
        if "chosen" in of
    ]
    lines = [
        "## The damping",
        "",
        "λ is c tr F / D. c is chosen for each model and kind of step on the choosing half, over all concepts at the "
        f"first layer shown here, and used at all layers: {'; '.join(used)}. Steps of {fixed['made']} prompts, or of a "
        f"prompt by itself, are tried on {fixed['tried']} others of each concept. How many times the off-target KL of "
        "the best c another c costs, at gains of 1 to 3 nats:",
        "",
        f"| step | tried at | {' | '.join(f'c = {c:g}' for c in DAMPINGS)} |",
        "| --- | --- |" + " --- |" * len(DAMPINGS),
    ]
    best = [
        "The single c that costs least over all rows of this table, by the gain at which steps are compared:",
        "",
        f"| step | {' | '.join(f'+{gain:g}' for gain in ends)} | +1 to +3 |",
        "| --- |" + " --- |" * (len(ends) + 1),
    ]
    for setting, name in KINDS.items():
        for where, costs in penalties(kept, setting).items():
            lines.append(f"| {name} | {where} | {' | '.join(number(float(cost)) for cost in costs)} |")
        told = [best_single(kept, setting, [gain]) for gain in ends]
        best.append(f"| {name} | {' | '.join(told)} | {best_single(kept, setting)} |")
    at = DAMPINGS.index(DAMPING)
    costs = {setting: [float(row[at]) for row in penalties(kept, setting).values()] for setting in KINDS}
    own, average = (number(max(costs[setting], default=1.0)) for setting in ("own", "average"))
    default = (
        f"`natural_step` takes c = {DAMPING:g} unless it is told another, so that λ takes little of a step's budget: "
        f"in this table that costs at most {own} times the best for a prompt's own step, and {average} times for one "
        "direction of a concept."
    )
    return [*lines, "", *best, "", default, ""]


def products(kept: dict[str, Any]) -> list[str]:
    """What fewer products by F cost."""
    variants = {model: of["variants"] for model, of in kept["models"].items() if of["variants"]}
    if not variants:
        return []
    every = [found["by"] for of in variants.values() for found in of.values()]
    shared = [key for key in every[0] if all(key in found for found in every)]
    varied = list(dict.fromkeys(key.split("/")[1] for key in shared if "/" in key))
    lines = [
        "## Products by F",
        "",
        f"Each prompt's own step at one layer, {_prompts(variants)} testing prompts of a concept "
        f"({', '.join(_concepts(variants))}), by c and the number of products by F that conjugate gradients may take "
        f"(`products`; {kept['settings']['products']} if not given); from an estimate of F alone, of the likeliest "
        "tokens (topk) or of a rank (full); and of the exact F. The off-target KL over that of the exact F with its "
        "best c, the geometric mean over gains of 1, 2 and 3 nats of medians; and, with the best c, at a gain of "
        "0.25, where the theory holds. An exact step with a small λ is the first to leave the region of the "
        "quadratic form; few products act as a larger λ does.",
        "",
        f"| model | step from | {' | '.join(f'c = {c}' for c in varied)} | best c, at +0.25 |",
        "| --- | --- |" + " --- |" * (len(varied) + 1),
    ]
    for model, of in variants.items():
        rows = {key: np.concatenate([array(found["by"][key]) for found in of.values()]) for key in shared}
        shown = {key: _geometric(values) for key, values in rows.items()}
        small = {key: middle([values[:, 0]]) for key, values in rows.items()}
        names = list(dict.fromkeys(key.split("/")[0] for key in rows if "/" in key))
        least = min(shown[f"exact/{c}"] for c in varied)
        least_small = min(small[f"exact/{c}"] for c in varied)
        for name in [*names, EUCLID]:
            keys = [f"{name}/{c}" for c in varied] if name in names else [name]
            told = [number(shown[key] / least) for key in keys] + [""] * (len(varied) - len(keys))
            at_small = number(min(small[key] for key in keys) / least_small)
            lines.append(f"| {model} | {name} | {' | '.join(told)} | {at_small} |")
    return [*lines, ""]


def _concepts(variants: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(concept for of in variants.values() for concept in of))


def _prompts(variants: dict[str, Any]) -> int:
    return min(len(rows) for of in variants.values() for found in of.values() for rows in found["by"].values())


def _geometric(values: Array) -> float:
    return float(np.exp(np.mean([np.log(middle([values[:, GAINS.index(gain)]])) for gain in SHOWN])))


def in_a_row(kept: dict[str, Any]) -> list[str]:
    """Several natural steps in place of one."""
    variants = {model: of["variants"] for model, of in kept["models"].items() if of["variants"]}
    if not variants:
        return []
    lines = [
        "## Several steps in a row",
        "",
        f"`steps={kept['settings']['steps']}` takes F and g anew so many times along the way. Off-target KL in nats on "
        "the same prompts, the median, with the damping chosen above. The path has the length of one "
        "step; each step after the first takes an eighth of the products by F, and a ratio below 1 says that the "
        "path costs more:",
        "",
        "| model | gain | one natural step | several | Euclidean gradient | one / several, prompt by prompt |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, of in variants.items():
        one, several = (
            np.concatenate([array(found["in a row"][name]) for found in of.values()])
            for name in ("one step", "several steps")
        )
        euclid = np.concatenate([array(found["by"][EUCLID]) for found in of.values()])
        for gain in (2.0, 3.0):
            at = GAINS.index(gain)
            with np.errstate(invalid="ignore"):
                ratio = middle([one[:, at] / several[:, at]])
            told = [number(middle([x[:, at]])) for x in (one, several, euclid)]
            lines.append(f"| {model} | +{gain:g} | {' | '.join(told)} | {number(ratio)} |")
    return [*lines, ""]


def texts(kept: dict[str, Any]) -> list[str]:
    """KL over whole texts."""
    measured = {model: of["texts"] for model, of in kept["models"].items() if of["texts"]}
    if not measured:
        return []
    fixed = kept["settings"]
    lines = [
        "## Over a text",
        "",
        f"One direction for a concept, at the length that gains {fixed['gain']:g} nats on choosing prompts in the "
        f"median, added at all positions of {fixed['texts']} testing prompts and of the {fixed['tokens']} tokens that "
        "the unsteered model writes: the KL divergence of what comes next, summed over these tokens, and that of the "
        f"first alone. `natural, over the text` is of F summed over the {fixed['tokens']} tokens of {fixed['texts']} "
        f'choosing prompts (`targets={fixed["tokens"]}`, `at="first"`). Medians in nats; a method that does not gain '
        "so much on most choosing prompts is left out.",
        "",
        "| model, layer, concept | method | length | gain | KL, first token | KL, all |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, of in measured.items():
        for where, found in of.items():
            for name, values in found.items():
                told = [number(float(np.median(values[key]))) for key in ("gain", "first", "kl")]
                lines.append(
                    f"| {model}, {where.replace('/', ', ')} | {name.removesuffix(' 0')} | "
                    f"{number(values['length'])} | {' | '.join(told)} |"
                )
    said = _over_texts(measured)
    return [*lines, *([""] if said else []), *said, ""]


def _over_texts(measured: dict[str, Any]) -> list[str]:
    """What the table says, in words."""
    names = ("natural, over the text", NATURAL, EUCLID)
    every = [found for of in measured.values() for found in of.values() if all(name in found for name in names)]
    if not every:
        return []
    whole, next_token, euclid = ([float(np.median(found[name]["kl"])) for found in every] for name in names)
    less = [sum(a < b for a, b in zip(whole, other, strict=True)) for other in (next_token, euclid)]
    worst = max(b / a for a, b in zip(whole, next_token, strict=True))
    return [
        f"A step made for the next token alone is blind to what it does to later tokens: over the text it changes up "
        f"to {worst:.2g} times as much as one made over the text, and more than the Euclidean gradient in "
        f"{sum(b > c for b, c in zip(next_token, euclid, strict=True))} of {len(every)} cases. The step made over the "
        f"text changes less than it in {less[0]} and less than the Euclidean gradient in {less[1]} of {len(every)}.",
    ]
