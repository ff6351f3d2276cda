"""docs/steering-study.md and its figure, from what `benchmarks.steering` has measured and keeps in a JSON file."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering_numbers import (
    EUCLID,
    GAINS,
    MEANS,
    NATURAL,
    PCA,
    SHOWN,
    Pool,
    cells,
    costs,
    middle,
    number,
    ratios,
    reached,
)
from benchmarks.steering_parts import dampings, in_a_row, products, texts

OTHERS = {"average": (EUCLID, MEANS, PCA, "random 0"), "own": (EUCLID,)}
TITLES = {"average": "One direction for a concept", "own": "Each prompt's own step"}
COLOURS = {NATURAL: "#0072b2", EUCLID: "#d55e00", MEANS: "#009e73", PCA: "#cc79a7", "random 0": "#7a8490"}

WHAT = """\
A step is added to the output of a block at all positions of a prompt, to make the tokens T of a concept likelier. Any
step that is long enough does; the question is what else it changes. What is compared is the **off-target KL**: the KL
divergence of the next-token distribution without T, renormalised, from what it was, at the same gain in the log-odds of
T, which is the same probability of T. [FishBack](https://arxiv.org/abs/2605.17231) reports of GPT-2 that steps by the
pulled-back Fisher metric cost 1.3 to 2.5 times less than Euclidean gradient ascent and 1.5 times less than contrastive
activation addition. `natural_step` takes such steps. With p the probability of a single token, g the gradient of its
log-odds and F_other the matrix of the other tokens' distribution,

$$
F = p (1 - p)\\, g g^\\top + (1 - p)\\, F_\\mathrm{other}, \\qquad \\delta \\propto (F + \\lambda I)^{-1} g
$$

and a small $\\delta$ with $\\lambda \\to 0$ is the step of least off-target KL for its gain: the first term does not
turn it. For several tokens F has one more term, $p F_T$, what changes within T, which the step also pays for."""


def page(kept: dict[str, Any]) -> str:
    """docs/steering-study.md."""
    every = list(cells(kept))
    lines = ["# Natural steps beside other ways to steer", "", WHAT, ""]
    if not every:
        return "\n".join([*lines, "Nothing is measured yet: `python -m benchmarks.steering`."]) + "\n"
    lines += ["## What was measured", "", *_setting(kept, every), ""]
    lines += ["![Off-target KL against gain](images/steering-study.png)", ""]
    lines += ["## What it shows", "", *_verdicts(kept, every), ""]
    for setting, title in TITLES.items():
        lines += [f"## {title}", "", *_setting_tables(kept, setting), ""]
    lines += ["## Where natural steps lose", "", *_losses(kept), ""]
    lines += dampings(kept) + products(kept) + in_a_row(kept) + texts(kept)
    lines += ["## What this does not show", "", *_limits(kept)]
    return "\n".join(lines) + "\n"


def _setting(kept: dict[str, Any], every: list[Any]) -> list[str]:
    machine = kept["machine"]
    concepts = next(iter(kept["models"].values()))["concepts"]
    lines = [
        f"`python -m benchmarks.steering` on {machine['cores']} cores of a CPU ({machine['cpu_capability']}), torch "
        f"{machine['torch']}, everything in float32 from 4-bit weights, distributions in float64. Effects are read "
        "from plain forward passes, gradients from plain autograd; only F is the package's.",
        "",
    ]
    for name, of in kept["models"].items():
        lines.append(f"* {name}: {len(of['layers'])} layers, {', '.join(f'`{layer}`' for layer in of['layers'])}.")
    lines += [
        "",
        "| concept | a prompt (of the first model; the template is left out) | wanted tokens, such as |",
        "| --- | --- | --- |",
    ]
    for concept, of in concepts.items():
        shown = " ".join(of["example"][0].replace("<|im_end|>", " ").split())
        shown = shown.split("<|im_start|>user")[-1].replace("<|im_start|>assistant", " …").strip()
        words = ", ".join(f"`{token}`" for token in of["tokens"][:6] if "`" not in token)
        lines.append(f"| {concept} | {shown} | {words} ({len(of['tokens'])}) |")
    fixed = kept["settings"]
    half = fixed["half"]
    return [
        *lines,
        "",
        f"Each concept has {2 * half} neutral prompts, made of templates and fillers. {half} are for choosing: "
        "directions, their sign, and the damping λ. All numbers but those of λ are of the other half. Each choosing "
        "prompt has two contrast texts with the same end, one that calls for the concept and one that calls for its "
        "opposite; difference of means and PCA (as repeng's pca_diff takes it) are of the residual streams at their "
        "last token. Natural steps are those of `natural_step`, with "
        f"{fixed['products']} products by F of the whole vocabulary; {fixed['own']} testing prompts have their own. "
        "The damping is chosen once for each model and kind of step.",
        "",
        "Along each direction the length is doubled again and again, until by the gradient it would gain "
        f"{fixed['furthest']:.3g} nats, or to four times the residual stream's norm. The off-target KL at a gain is "
        "interpolated in the logarithms. A gain that is never reached costs infinitely much; medians count it so. "
        "Intervals (95%) are by drawing prompts anew within each concept.",
    ]


def _verdicts(kept: dict[str, Any], every: list[Any]) -> list[str]:
    lines = []
    for setting, other in (("average", EUCLID), ("average", MEANS), ("average", PCA), ("own", EUCLID)):
        pool = Pool(every, setting, other, NATURAL)
        told = "; ".join(f"{pool.median(gain)} at +{gain:g}" for gain in SHOWN)
        both, n = pool.where_both(2.0)
        of = sum(part.size for part in pool.at(2.0))
        got = f" Where both get to +2 ({n} of {of}): {number(both)}." if n < of and n else ""
        lines.append(f"* **{TITLES[setting]}, {other}** over natural: {told} nats.{got}")
    return [
        "The off-target KL of another method over that of the natural step on the same prompt at the same "
        "gain, the median over both models' layers, concepts and prompts with its interval. Above 1 the natural step "
        "changes less:",
        "",
        *lines,
    ]


def _setting_tables(kept: dict[str, Any], setting: str) -> list[str]:
    lines: list[str] = []
    for model, of in kept["models"].items():
        chosen = list(cells(kept, [model]))
        if not chosen:
            continue
        lines += [
            f"{model}: off-target KL in nats, the median over layers, concepts and prompts; the share of prompts that "
            "are brought to +2 at any length; and the ratio to the natural step.",
            "",
            f"| method | {' | '.join(f'at +{gain:g}' for gain in SHOWN)} | reaches +2 | "
            f"{' | '.join(f'ratio at +{gain:g}' for gain in SHOWN)} |",
            "| --- |" + " --- |" * 7,
        ]
        for method in (NATURAL, *OTHERS[setting]):
            middle_cost = costs(chosen, setting, method)[1]
            nats = [number(middle_cost[GAINS.index(gain)]) for gain in SHOWN]
            pool = Pool(chosen, setting, method, NATURAL)
            told = ["1" if method == NATURAL else str(pool.median(gain)) for gain in SHOWN]
            share = f"{reached(chosen, setting, method, 2.0):.0%}"
            lines.append(f"| {method} | {' | '.join(nats)} | {share} | {' | '.join(told)} |")
        rivals = (EUCLID, MEANS) if setting == "average" else (EUCLID,)
        concepts = list(dict.fromkeys(concept for _, _, concept, _ in chosen))
        lines += ["", "The ratio at +2 by concept and layer:", ""]
        lines.append(f"| | {' | '.join(f'{rival}: {c}' for rival in rivals for c in concepts)} |")
        lines.append("| --- |" + " --- |" * (len(rivals) * len(concepts)))
        for layer in [*of["layers"], "all layers"]:
            row = []
            for rival in rivals:
                for concept in concepts:
                    some = [c for c in chosen if c[2] == concept and layer in (c[1], "all layers")]
                    if not some:
                        row.append("")
                        continue
                    told_at = Pool(some, setting, rival, NATURAL).median(2.0)
                    row.append(str(told_at) if layer == "all layers" else number(told_at.value))
            lines.append(f"| {layer} | {' | '.join(row)} |")
        lines.append("")
    return lines[:-1]


def _losses(kept: dict[str, Any]) -> list[str]:
    lines, at = [], GAINS.index(0.25)
    for setting, rival in (("own", EUCLID), ("average", EUCLID), ("average", MEANS)):
        lost = []
        for model, layer, concept, cell in cells(kept):
            for gain in SHOWN:
                found = middle([ratios(cell, setting, rival)[:, GAINS.index(gain)]])
                if found < 1:
                    lost.append(f"{model}, {layer}, {concept} at +{gain:g} ({number(found)})")
        total = sum(len(SHOWN) for _ in cells(kept))
        where = "; ".join(lost) if lost else "none"
        lines.append(f"* {TITLES[setting]}, against {rival}: {len(lost)} of {total} medians are below 1: {where}.")
    small = np.concatenate([ratios(cell, "own", EUCLID)[:, at] for *_, cell in cells(kept)])
    small = small[~np.isnan(small)]
    every = list(cells(kept))
    won = {rival: [f"{Pool(every, 'average', rival, NATURAL).won(gain):.0%}" for gain in SHOWN]
           for rival in (EUCLID, MEANS)}  # fmt: skip
    told = [f"{', '.join(shares[:-1])} and {shares[-1]} against the {name}" for name, shares in won.items()]
    short = [f"{reached(every, 'average', method, 3.0):.0%} by the {method}" for method in (EUCLID, MEANS)]
    return [
        "Medians over the prompts of a model, layer and concept at one gain. 0: on most prompts the natural step never "
        "gets so far, at any length, where the other does.",
        "",
        *lines,
        "",
        "The theory is of small steps. At +0.25 a prompt's own natural step costs less than its Euclidean gradient "
        f"on {(small > 1).mean():.0%} of the prompts; the ratio is {number(float(np.median(small)))} in the median and "
        f"{number(float(small.min()))} at the least. One direction for a concept is made on other prompts than it is "
        "tested on, and its F is a mean, so that no theory says that it must win on each of them. Its shares of wins "
        f"at +1, +2 and +3: {'; '.join(told)}.",
        "",
        "What stops a straight step is that its gain falls behind what the gradient promises, which at the end of a "
        f"sweep is {kept['settings']['furthest']:.3g} nats. A natural step changes little else because it goes along "
        "directions along which F at the start is small; so it is long, and further out F is another one. At any "
        f"length, +3 is reached on {reached(every, 'average', NATURAL, 3.0):.0%} of the prompts by the natural step "
        f"for a concept, on {' and on '.join(short)}. By concept, with the median log-odds at the start: "
        f"{'; '.join(_by_concept(every))}. `steps` takes F anew on the way; what that gains is below.",
        "",
        "Where a direction for a concept loses, each prompt's own step wins in "
        f"{_own_wins(kept)}. So it is the mean over other prompts that fails there; it seems that other prompts react "
        "along directions that F of the choosing prompts hardly sees. A larger λ than the one chosen at another layer "
        "helps (the tables of λ below): it keeps a step out of such directions.",
    ]


def _own_wins(kept: dict[str, Any]) -> str:
    """In how many of the cells in which the direction for a concept loses to the gradient a prompt's own step wins."""
    won = [
        middle([ratios(cell, "own", EUCLID)[:, GAINS.index(gain)]]) > 1
        for *_, cell in cells(kept)
        for gain in SHOWN
        if middle([ratios(cell, "average", EUCLID)[:, GAINS.index(gain)]]) < 1
    ]
    return f"{sum(won)} of these {len(won)} medians"


def _by_concept(every: list[Any]) -> list[str]:
    told = []
    for concept in dict.fromkeys(found[2] for found in every):
        some = [found for found in every if found[2] == concept]
        odds = np.median(np.concatenate([found[3]["odds"] for found in some]))
        told.append(f"{concept} {reached(some, 'average', NATURAL, 3.0):.0%} ({odds:.1f})")
    return told


def _limits(kept: dict[str, Any]) -> list[str]:
    return [
        "Two small models, concepts of a few tokens at the next position, prompts made of templates. The log-odds of "
        "tokens is what natural steps and the Euclidean gradient are made for; the contrast directions are not told "
        "which tokens count, so that the measure suits them least. All steps are added at all positions. Nothing here "
        "says how good the texts are that a steered model writes.",
    ]


def draw(kept: dict[str, Any], path: Path) -> None:
    """The figure: off-target KL against gain, for each model and kind of step."""
    from matplotlib.figure import Figure

    models = [model for model in kept["models"] if list(cells(kept, [model]))]
    figure = Figure(figsize=(9.6, 3.9 * max(1, len(models))), dpi=130, layout="constrained")
    grid = figure.subplots(max(1, len(models)), 2, squeeze=False, sharex=True, sharey="row")
    for row, model in zip(grid, models, strict=False):
        chosen = list(cells(kept, [model]))
        for ax, (setting, title) in zip(row, TITLES.items(), strict=True):
            for method in (NATURAL, *OTHERS[setting]):
                low, middle_, high = (np.where(np.isfinite(x), x, np.nan) for x in costs(chosen, setting, method))
                colour = COLOURS[method]
                ax.plot(GAINS, middle_, "o-", color=colour, markersize=3.5, label=method.removesuffix(" 0"))
                if method in (NATURAL, EUCLID):
                    ax.fill_between(GAINS, low, high, color=colour, alpha=0.13, linewidth=0)
            ax.set(yscale="log", title=f"{model}: {title[0].lower()}{title[1:]}")
            ax.title.set_fontsize(10)
            ax.grid(color="#e4e8ec", linewidth=0.7)
            ax.spines[["top", "right"]].set_visible(False)
        row[0].set(ylabel="off-target KL (nats)")
    for ax in grid[-1]:
        ax.set(xlabel="gain in the log-odds of the concept (nats)")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
