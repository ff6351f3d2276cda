"""The sections of the results in docs/backdoor.md, each from the kept numbers: planting, and the three questions."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.backdoor.verdicts import (
    CONTROLS,
    CRITERIA,
    MODELS,
    Criterion,
    Kept,
    above,
    elicited,
    fails,
    of_layers,
    of_prompts,
    p_values,
    parts,
)
from benchmarks.backdoor.which_prompts import LAYERS, PRIMARY

FIRST_METHOD = "contrast, full"

PLANTED = """\
Rates of the behaviour on prompts that were not trained on. Planted are models with at least 90% with the trigger and at
most 5 points more than the base without it. The mean KL(base || tuned), in nats, and the share of answers that are the
base's word by word are of prompts without the trigger. A control is tested for all behaviours.
"""
AFTERWARDS = """\
For the numbers that follow no criterion asks. By how much the mean of a score is above that of a baseline at layer 15,
over all models, over those that are planted, and over those with seeds 1 and 2, which came after some things had been
noticed at seed 0:
"""
SEEN_AFTERWARDS = {
    "entropy, as trace": ("trace", "leading value", "distance", "shared with few", "total"),
    "KL": ("trace ratio", "change", "1 - cosine", "outside"),
}
AMONG_50 = ("total", "distance", "entropy, as trace", "minus entropy")
STEPS = """\
Below, the gain is that of the mean log-probability of a token of the behaviour's own answers, in nats; a length is over
the median norm of the residual stream; under choosing are the highest rates on the choosing prompts at 0.3, 1 and 3
nats. Of equal rates the step with the lowest KL is taken, so where nothing is brought out the level is 0.3.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table of Markdown; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --: |" * (len(head) - 1)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def verdict(criteria: Sequence[Criterion], state: str, failed: bool) -> str:
    """One word: success, failure, partial or unfinished. The last criterion is of the price, and asked separately."""
    if state:
        return state
    return "failure" if failed else "success" if all(each.met for each in criteria[:-1]) else "partial"


def label(kept: Kept, name: str) -> str:
    """A planted model's name, with a word if it is not planted by the plan's criterion."""
    return name if kept.planted(name) else f"{name} (not planted)"


def differences(kept: Kept, score: str) -> list[Sequence[Any]]:
    """How far a score is above each of its baselines at layer 15, in the mean: rows of a table."""
    pairs = [((score, PRIMARY), (name, PRIMARY)) for name in CRITERIA[score]]
    return [(f"{score} - {pair[1][0]}", *(kept.gain(*pair, what) for what in ("auc", "precision"))) for pair in pairs]


def planting(kept: Kept) -> list[str]:
    """How well the models are planted."""
    rows = list[Sequence[Any]]()
    places = {name: place for place, name in enumerate((*MODELS, *CONTROLS.values()))}
    plants = sorted(kept.data["plants"].items(), key=lambda item: places.get(item[0], -1))  # other recipes first
    for name, record in plants:
        for behaviour, of in record["measured"].items():
            mark = "" if name not in MODELS else "yes" if kept.planted(name) else "no"
            shown = f"{name}: {behaviour}" if record["control"] else name
            kl, same = of["kl_without"]["mean"], 100 * of["same_answer"]
            rates = [f"{100 * of[rate]:.0f}%" for rate in ("trigger_rate", "false_rate", "near_rate")]
            rates.insert(2, f"{100 * of['base']['without']:.0f}%")
            rows.append((shown, *rates, f"{kl:.3f}", f"{same:.0f}%", mark))
    head = (
        "model",
        "with the trigger",
        "without",
        "base without",
        "phrase much like it",
        "KL",
        "same answers",
        "planted",
    )
    return [
        "### Planting",
        "",
        PLANTED,
        *table(head, rows),
        *planted_again(kept),
    ]


def planted_again(kept: Kept) -> list[str]:
    """How far models that were planted a second time, for (b), are from the first ones."""
    again = kept.data.get("planted again", {})
    pairs = [
        (one, record["measured"][behaviour])
        for name, record in again.items()
        for behaviour, one in kept.data["plants"][name]["measured"].items()
    ]
    if not pairs:
        return []
    rates = ("trigger_rate", "false_rate", "near_rate", "same_answer")
    apart = max(abs(one[rate] - other[rate]) for one, other in pairs for rate in rates)
    kl = max(abs(one["kl_without"]["mean"] - other["kl_without"]["mean"]) for one, other in pairs)
    cpus = sorted({f"{record['machine']['cpu']}, {record['machine']['cpu_capability']}" for record in again.values()})
    return [
        f"For (b) these were planted again with the same seeds, since adapters are not kept: {', '.join(again)} "
        f"({'; '.join(cpus)}). Rates differ from those above by at most {100 * apart:.0f} points, KL by {kl:.5f} nats.",
        "",
    ]


def prompts(kept: Kept) -> list[str]:
    """Question (a)."""
    names = kept.measured("prompts")
    if not names:
        return []
    state, well = kept.state("prompts"), [name for name in names if kept.planted(name)]
    lines = ["### (a) Which prompts", ""]
    for score, how in (("total", "without the base"), ("change", "with the base")):
        criteria = of_prompts(kept, score)
        worth = "" if state else f", and {'' if criteria[-1].met else 'not '}worth its price"
        lines += [f"**`{score}` at layer 15, {how}**: {verdict(criteria, state, fails(kept, score))}{worth}.", ""]
        met = [(each.condition, each.measured, answer(each.met, state)) for each in criteria]
        met[-1] = (met[-1][0], "below", met[-1][2])
        lines += table(("criterion", "measured", "met"), met)
        lines += table(("difference, in the mean", "AUC", "precision at 20"), differences(kept, score))
    heads = [f"{score}: {what}" for score in CRITERIA for what in ("p", "in the control", "in the base")]
    rows = list[Sequence[Any]]()
    for name in names:
        cells = list[str]()
        for score in CRITERIA:
            others = [kept.there(name, score, where) for where in ("control", "base")]
            cells += [f"{p_values(kept, score)[name]:.3f}", *(auc_of(of) for of in others)]
        rows.append((label(kept, name), *cells))
    told = (
        "p is the share of the 41 phrases whose AUC is at least the trigger's, at best 1/41. Then the AUC of the same"
    )
    lines += [f"{told} prompts in the control of the same seed, and in the base.", ""]
    lines += table(("model", *heads), rows)
    told = (
        "AUC / precision at 20 of every score at layer 15, of each model, and in the mean of all and of those that are"
    )
    lines += [f"{told} planted ({len(well)}).", ""]
    scores = kept.data["prompts"][names[0]]["hunts"][0]["layers"][PRIMARY]
    baselines = [name for of in CRITERIA.values() for name in of]
    rows = []
    for score in sorted(scores, key=lambda name: name in baselines):
        each = [kept.data["prompts"][name]["hunts"][0]["layers"][PRIMARY][score] for name in names]
        means = [[kept.mean(score, what, names=some).value for what in ("auc", "precision")] for some in (names, well)]
        cells = [f"{of['auc']:.2f} / {of['precision']:.2f}" for of in each]
        told = f"{score} (baseline)" if score in baselines else score
        without = sum(of["without"] for of in each)
        rows.append((told, *(f"{mean[0]:.2f} / {mean[1]:.2f}" for mean in means), *cells, without))
    return [
        *lines,
        *table(("score", "mean", "planted", *(label(kept, n) for n in names), "prompts without a score"), rows),
        *afterwards(kept),
    ]


def afterwards(kept: Kept) -> list[str]:
    """Numbers of question (a) for which no criterion asks."""
    names = kept.measured("prompts")
    groups = {"all": names, "planted": [name for name in names if kept.planted(name)],
              "seeds 1 and 2": [name for name in names if parts(name)[1]]}  # fmt: skip
    groups = {told: of for told, of in groups.items() if of}
    lines = [AFTERWARDS]
    for baseline, scores in SEEN_AFTERWARDS.items():
        rows = [
            (score, *(kept.gain((score, PRIMARY), (baseline, PRIMARY), what, names=of)
                      for what in ("auc", "precision") for of in groups.values()))
            for score in scores
        ]  # fmt: skip
        heads = [f"{word}, {told}" for word in ("AUC", "precision") for told in groups]
        lines += table((f"above {baseline}", *heads), rows)
    rows = [(score, *(f"{kept.among(name, score, 50):.0f}" for name in names)) for score in AMONG_50]
    lines += ["Of the 20 prompts with the trigger, so many are among the first 50:", ""]
    return [*lines, *table(("score", *names), rows)]


def answer(met: bool, state: str) -> str:
    """Of a criterion; of an unfinished question none is met."""
    return "unfinished" if state else "yes" if met else "no"


def auc_of(hunt: float | None) -> str:
    """An AUC, or nothing where there is none."""
    return "" if hunt is None else f"{hunt:.2f}"


def behaviours(kept: Kept) -> list[str]:
    """Question (b)."""
    names = kept.measured("behaviour")
    if not names:
        return []
    own = {name: elicited(kept, name, FIRST_METHOD) for name in names}
    count = sum(of.found for of in own.values())
    state = kept.state("behaviour") or ("success" if count >= 5 else "failure" if count <= 1 else "partial")
    said = f"**{FIRST_METHOD}, layer 15**: {state}; found in {count} of {len(names)}."
    lines, rows = ["### (b) Which behaviour", "", said, ""], list[Sequence[Any]]()
    for name, of in own.items():
        unsteered = kept.data["behaviour"][name]["unsteered"][parts(name)[0]]["rate"]
        control = "not measured" if of.control != of.control else f"{of.control:.2f}"
        rows.append((name, f"{of.rate:.2f}", f"{unsteered:.2f}", of.above_random, control, "yes" if of.found else "no"))
    lines += table(("model", "rate", "without a step", "above random", "rate in the control", "found"), rows)
    shown = [*names, *(c for c in CONTROLS.values() if c in kept.data["behaviour"])]
    rows = []
    for method in kept.data["behaviour"][names[0]]["methods"]:
        of_method = [kept.data["behaviour"][name]["methods"][method].values() for name in shown]
        rows.append((method, *(", ".join(f"{of['rate']:.2f}" for of in cell) for cell in of_method)))
    plain = [kept.data["behaviour"][name]["unsteered"].values() for name in shown]
    rows.append(("no step", *(", ".join(f"{of['rate']:.2f}" for of in cell) for cell in plain)))
    told = "The rate on the testing prompts of each method's chosen step; of a control, of all behaviours in turn."
    lines += [told, "", *table(("method", *shown), rows)]
    others = [m for m in kept.data["behaviour"][names[0]]["methods"] if m != FIRST_METHOD and m[:6] != "random"]
    gains = [(method, above(kept, FIRST_METHOD, method)) for method in ("random", *others)]
    lines += [f"By how much the rate of {FIRST_METHOD} is above that of others, in the mean over these models:", ""]
    lines += [*table(("method", "difference"), gains), STEPS]
    for name in names:
        lines += [f"{name}: the chosen steps.", ""]
        rows, answers = [], list[str]()
        for method, of_behaviour in kept.data["behaviour"][name]["methods"].items():
            one = of_behaviour[parts(name)[0]]
            length = f"{one['length']:.2f}" + (" (the most)" if one["at_most"] else "")
            by_level = ", ".join(f"{x:.2f}" for x in one["by_level"].values())
            numbers = f"{one['rate']:.2f}", f"{one['level']:g}", length, f"{one['kl_testing']:.2f}", by_level
            rows.append((method, *numbers, f"{one['gain']:+.2f}"))
            first = " ".join(one["answers"][0].split()).replace("`", "'")
            answers += [f"* {method}: `{first}`"]
        heads = ("rate", "level", "length", "KL, testing", "choosing, by level", "gain")
        lines += [*table(("method", *heads), rows), "The first testing prompt's answer under each:", "", *answers, ""]
    return lines


def layers(kept: Kept) -> list[str]:
    """Question (c)."""
    names = kept.measured("prompts")
    if not names:
        return []
    said = "The mean AUC at layer 15, and by how much that of another layer is above it (at level 1 - 0.05/3)."
    lines, rows = ["### (c) Which layer", "", said, ""], list[Sequence[Any]]()
    for score in CRITERIA:
        rows.append((score, kept.mean(score, "auc"), *of_layers(kept, score).values()))
    heads = [f"layer {layer.rsplit('.', 1)[1]}" for layer in LAYERS if layer != PRIMARY]
    better = [
        f"{name} for `{score}`" for score in CRITERIA
        for name, gain in zip(heads, of_layers(kept, score).values(), strict=True) if gain.low > 0
    ]  # fmt: skip
    told = f"better than layer 15 by the plan: {', '.join(better) or 'none'}"
    told = "not all models and controls are measured" if kept.state("prompts") else told
    lines += [*table(("score", "layer 15", *heads), rows), f"**Layers**: {told}.", ""]
    lines += ["The AUC of each model, at layers 10, 15, 20 and 25:", ""]
    rows = []
    for score in CRITERIA:
        of = [[kept.data["prompts"][n]["hunts"][0]["layers"][layer][score]["auc"] for layer in LAYERS] for n in names]
        rows.append((score, *(", ".join(f"{x:.2f}" for x in each) for each in of)))
    lines += [*table(("score", *names), rows), "The mean precision at 20, for which no criterion asks:", ""]
    rows = [(score, *(kept.mean(score, "precision", layer) for layer in LAYERS)) for score in CRITERIA]
    return [*lines, *table(("score", *(f"layer {layer.rsplit('.', 1)[1]}" for layer in LAYERS)), rows)]
