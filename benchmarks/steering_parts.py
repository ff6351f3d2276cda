"""Sections of docs/steering-study.md: the damping, estimators and ranks, several steps in a row, whole texts."""

from typing import Any

import numpy as np

from benchmarks.steering_numbers import DAMPINGS, GAINS, NATURAL, SHOWN, Array, array, middle, number, score

KINDS = (("own", NATURAL), ("own", "natural, top 10"), ("average", NATURAL), ("average", "natural, top 10"))
SETTINGS = {"own": "own", "average": "one for a concept"}


def penalties(kept: dict[str, Any], kind: str) -> Array:
    """[layers, dampings]: the logarithm of how much more off-target KL each costs than the layer's best one."""
    rows = []
    for of in kept["models"].values():
        for found in of["layers"].values():
            scores = np.array([score(found["tries"], f"{kind}/{c:g}") for c in DAMPINGS])
            rows.append(scores - scores.min())
    return np.array(rows)


def best_single(kept: dict[str, Any], kind: str) -> float:
    """The damping that costs least over all layers of all models: the least median."""
    return DAMPINGS[int(np.argmin(np.median(penalties(kept, kind), axis=0)))]


def dampings(kept: dict[str, Any]) -> list[str]:
    """How the damping was chosen, and what others cost."""
    lines = [
        "## The damping",
        "",
        "λ is c tr F / D. On the choosing half, over the concepts and at gains of 1 to 3 nats: how many times the "
        "off-target KL of the layer's best c another c costs, the median over all layers, and the c that was best in "
        "each layer.",
        "",
        f"| step, estimator | {' | '.join(f'c = {c:g}' for c in DAMPINGS)} | best, layer by layer |",
        "| --- |" + " --- |" * (len(DAMPINGS) + 1),
    ]
    best = {}
    for setting, by in KINDS:
        kind = f"{setting}/{by}"
        costs = [number(float(x)) for x in np.exp(np.median(penalties(kept, kind), axis=0))]
        chosen = "; ".join(
            ", ".join(f"{found['chosen'][kind]:g}" for found in of["layers"].values() if "chosen" in found)
            for of in kept["models"].values()
        )
        lines.append(f"| {SETTINGS[setting]}, {by.removeprefix('natural, ')} | {' | '.join(costs)} | {chosen} |")
        best[kind] = best_single(kept, kind)
    told = ", ".join(f"{SETTINGS[kind.split('/')[0]]}, {kind.split(', ')[1]}: {c:g}" for kind, c in best.items())
    return [*lines, "", f"The best single c: {told}.", ""]


def ranks(kept: dict[str, Any]) -> list[str]:
    """What the estimate of F costs."""
    variants = {model: of["variants"] for model, of in kept["models"].items() if of["variants"]}
    if not variants:
        return []
    lines = [
        "## Estimator and rank",
        "",
        "Each prompt's own step at one layer, three testing prompts of each concept, by estimator, rank and c: the "
        "off-target KL over that of the exact F with its best c, the geometric mean over gains of 1, 2 and 3 nats of "
        "medians; and at a gain of 0.25, where the theory holds. `and the rest`: the trace that the estimate lacks is "
        "taken to be spread evenly over the directions that it lacks.",
        "",
        f"| model | estimator | {' | '.join(f'c = {c:g}' for c in DAMPINGS)} | best c, at +0.25 |",
        "| --- | --- |" + " --- |" * (len(DAMPINGS) + 1),
    ]
    for model, of in variants.items():
        rows = {key: np.concatenate([array(found["by"][key]) for found in of.values()])
                for key in next(iter(of.values()))["by"]}  # fmt: skip
        shown = {key: _geometric(values) for key, values in rows.items()}
        small = {key: middle([values[:, 0]]) for key, values in rows.items()}
        names = list(dict.fromkeys(key.split("/")[0] for key in rows if "/" in key))
        least = min(shown[f"exact/{c:g}"] for c in DAMPINGS)
        least_small = min(small[f"exact/{c:g}"] for c in DAMPINGS)
        for name in [*names, "Euclidean gradient"]:
            keys = [f"{name}/{c:g}" for c in DAMPINGS] if name in names else [name]
            told = [number(shown[key] / least) for key in keys] + [""] * (len(DAMPINGS) - len(keys))
            at_small = number(min(small[key] for key in keys) / least_small)
            lines.append(f"| {model} | {name} | {' | '.join(told)} | {at_small} |")
    return [*lines, ""]


def _geometric(values: Array) -> float:
    return float(np.exp(np.mean([np.log(middle([values[:, GAINS.index(gain)]])) for gain in SHOWN])))


def in_a_row(kept: dict[str, Any]) -> list[str]:
    """Eight natural steps in place of one."""
    variants = {model: of["variants"] for model, of in kept["models"].items() if of["variants"]}
    if not variants:
        return []
    lines = [
        "## Several steps in a row",
        "",
        "`steps=8` takes F and g anew after every eighth of the way. Off-target KL in nats on the same prompts, the "
        "median, with the damping chosen above and rank 16:",
        "",
        "| model | gain | one natural step | eight | Euclidean gradient | one / eight, prompt by prompt |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, of in variants.items():
        one, eight = (
            np.concatenate([array(found["in a row"][name]) for found in of.values()])
            for name in ("one step", "eight steps")
        )
        euclid = np.concatenate([array(found["by"]["Euclidean gradient"]) for found in of.values()])
        for gain in (2.0, 3.0):
            at = GAINS.index(gain)
            with np.errstate(invalid="ignore"):
                ratio = middle([one[:, at] / eight[:, at]])
            told = [number(middle([x[:, at]])) for x in (one, eight, euclid)]
            lines.append(f"| {model} | +{gain:g} | {' | '.join(told)} | {number(ratio)} |")
    return [*lines, ""]


def texts(kept: dict[str, Any]) -> list[str]:
    """KL over whole texts."""
    measured = {model: of["texts"] for model, of in kept["models"].items() if of["texts"]}
    if not measured:
        return []
    lines = [
        "## Over a text",
        "",
        "One direction for a concept, at the length that gains two nats on choosing prompts in the median, added at "
        "all positions of ten testing prompts and of the 20 tokens that the unsteered model writes: the KL divergence "
        "of what comes next, summed over these tokens, and that of the first alone. `natural, over the text` is of "
        'F summed over the 20 tokens of ten choosing prompts (`targets=20`, `at="first"`). Medians in nats; a method '
        "that does not gain two nats on most choosing prompts is left out.",
        "",
        "| model, layer, concept | method | length | gain | KL, first token | KL, 20 tokens |",
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
    return [*lines, ""]
