"""docs/lens-evaluation.md and its figure, from what `benchmarks.lens_evaluation` keeps in a JSON file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOGIT, JACOBIAN = "logit lens", "Jacobian lens"
COLOURS = {LOGIT: "#d55e00", JACOBIAN: "#0072b2"}
ORDERS = {
    "most": "any ten tokens at most",
    "kl": "predicted share of the KL",
    "logit": "logit of the Jacobian lens",
    "logit, no J": "logit of the logit lens",
    "model": "the model's own likeliest",
}
NEAR, RANKED = 2.0, 0.8  # what counts as a good ratio and a good rank correlation

PAGE = """\
# How good is a lens?

A Jacobian lens has for each layer l the mean matrix J of a corpus, from the layer's output h to the last block's. It
reads softmax(unembed(norm(J h))). The logit lens reads the same without J. This page asks of texts that the lens was
not fitted on: how near is what a lens reads to what the model says in the end; how well does J, with the mean metric C,
predict what a step at a layer changes; and which tokens is that change made of.

## What was measured

`python -m benchmarks.lens_evaluation` on {machine}, in float32. {model}; a lens of {prompts} prompts{cut}. {texts}
held-out texts of {tokens} tokens, of each the positions from {skip} on without the last one: {positions} in all.
{corpus}This took {seconds} seconds.

![The distance to the model and the next token in the top ten, by layer](images/lens-evaluation.png)

## What a lens reads

KL(model || lens) in nats, of the model's final distribution and the lens's. The rank is that of the token that
follows in the text. {reads}

{readout}

The model itself has the next token at rank {own_rank} in the median, and in its top ten at {own_top}.

## What a step changes

A step along a direction v of length 1, added at all these positions, is predicted to have a mean KL of
1/2 v^T J^T C J v per unit squared. Measured is a forward pass with a step that is predicted to have {small:g} nats, of
{step_texts} texts. Along {directions} a layer, the median of measured over predicted, of all and of each
kind, and the rank correlation (Spearman) over all:

{steps}

{said}

The prediction is of mean matrices. Where contexts answer differently, their answers cancel in the mean of J but not in
the mean of a KL, so that the measured one is larger; where J and C of a context go together, the product of their means
is not the mean of their products, which may err to either side.

## Which tokens that is

At {draws} positions of each of these texts, a step along h itself is added at all positions, and its KL at the position
is the sum over tokens of 1/2 p (d log p)^2. How much of it the first ten tokens hold, in the median, by what orders
them; the first column is what ten tokens can hold at most:

{orders}

{ordered}

## Where it fails

{fails}
{known}

One model, one corpus, small steps. Layers of the last two tables are {step_layers} of {layers}. Nothing here says that
what a lens reads is what a model thinks, only how it relates to what the model says.
"""


def page(kept: dict[str, Any]) -> str:
    """docs/lens-evaluation.md."""
    about, steps, layers = kept["about"], kept["steps"], kept["layers"]
    machine = about["machine"]
    kinds = next(iter(steps.values()))["ratio_of"] if steps else {}
    some = next(iter(steps.values()))["directions"] if steps else []
    counts = [f"{sum(row['kind'] == kind for row in some)} {_plain(kind)}" for kind in kinds]
    return PAGE.format(
        machine=f"{machine['cores']} cores of a CPU ({machine['cpu_capability']}), torch {machine['torch']}",
        model=about["name"],
        known=_known(about),
        corpus=f"{about['corpus']} " if about.get("corpus") else "",
        prompts=f"{about['lens_prompts']:,}",
        cut=f" of up to {about['max_length']} tokens" if about.get("max_length") else "",
        texts=kept["texts"],
        tokens=kept["tokens"],
        skip=kept["skip_first"],
        positions=f"{kept['positions']:,}",
        seconds=kept["seconds"],
        reads=_reads(layers),
        readout=_readout(layers),
        own_rank=f"{kept['model']['rank_median']:g}",
        own_top=f"{kept['model']['top10']:.0%}",
        small=kept["small"],
        step_texts=kept["step_texts"],
        directions=", ".join(counts[:-1]) + f" and {counts[-1]}" if len(counts) > 1 else "".join(counts),
        steps=_steps(steps, list(kinds)),
        said=_said(steps),
        draws=kept["draws"],
        orders=_orders(kept["orders"]),
        ordered=_ordered(kept["orders"]),
        fails="\n".join(f"* {line}" for line in _fails(kept)),
        step_layers=len(steps),
        layers=len(layers),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(head) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _plain(kind: str) -> str:
    return {"random": "random directions", "singular vectors of J": "leading right singular vectors of J"}.get(
        kind, "leading eigenvectors of J^T C J"
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _layers(names: Sequence[str]) -> str:
    return f"{'layer' if len(names) == 1 else 'layers'} {', '.join(names)}" if names else "no layer"


def _better(layers: dict[str, Any], what: str, *, less: bool = True) -> list[str]:
    """The layers at which the Jacobian lens is the better one."""
    sign = 1 if less else -1
    return [n for n, of in layers.items() if sign * of[JACOBIAN][what] < sign * of[LOGIT][what]]


def _readout(layers: dict[str, Any]) -> str:
    head = ["layer", *(f"{what}, {name}" for what in ("median KL", "mean KL", "rank", "in the top ten") for name in
            (LOGIT, JACOBIAN))]  # fmt: skip
    rows = []
    for layer, of in layers.items():
        row = [layer]
        for what in ("kl_median", "kl_mean", "rank_median"):
            row += [_number(of[name][what]) for name in (LOGIT, JACOBIAN)]
        rows.append([*row, *(f"{of[name]['top10']:.1%}" for name in (LOGIT, JACOBIAN))])
    return _table(head, rows)


def _reads(layers: dict[str, Any]) -> str:
    near, ranked = _better(layers, "kl_median"), _better(layers, "top10", less=False)
    return (
        f"By the median KL the Jacobian lens is nearer to the model at {len(near)} of {len(layers)} layers; it has the "
        f"next token in its top ten more often at {len(ranked)}."
    )


def _steps(steps: dict[str, Any], kinds: Sequence[str]) -> str:
    rows = [
        [n, _number(of["ratio"]), *(_number(of["ratio_of"][kind]) for kind in kinds), f"{of['spearman']:.2f}"]
        for n, of in steps.items()
    ]
    return _table(["layer", "measured / predicted", *kinds, "rank correlation"], rows)


def _said(steps: dict[str, Any]) -> str:
    good = [n for n, of in steps.items() if 1 / NEAR <= of["ratio"] <= NEAR]
    ranked = [n for n, of in steps.items() if of["spearman"] >= RANKED]
    return (
        f"The median ratio is within a factor of {NEAR:g} of one at {len(good)} of {len(steps)} layers, and the rank "
        f"correlation {RANKED:g} or more at {len(ranked)}. The first says whether the number can be taken as it is, "
        "the second whether directions can be compared by it."
    )


def _orders(orders: dict[str, Any]) -> str:
    rows = [[n, *(f"{of[name]:.0%}" for name in ORDERS)] for n, of in orders.items()]
    return _table(["layer", *ORDERS.values()], rows)


def _ordered(orders: dict[str, Any]) -> str:
    won = [n for n, of in orders.items() if of["kl"] > of["logit"]]
    over = [n for n, of in orders.items() if of["kl"] > of["model"]]
    return (
        f"The predicted share finds more of the KL than the lens's logits at {len(won)} of {len(orders)} layers, and "
        f"more than the model's own likeliest tokens, which know nothing of the layer, at {len(over)}."
    )


def _fails(kept: dict[str, Any]) -> list[str]:
    """What is not as one would wish, from the numbers."""
    layers, steps, orders = kept["layers"], kept["steps"], kept["orders"]
    near, ranked = _better(layers, "kl_median"), _better(layers, "top10", less=False)
    mean = _better(layers, "kl_mean")
    off = [f"{n} ({_number(of['ratio'])})" for n, of in steps.items() if not 1 / NEAR <= of["ratio"] <= NEAR]
    unranked = [f"{n} ({of['spearman']:.2f})" for n, of in steps.items() if of["spearman"] < RANKED]
    lost = [n for n, of in orders.items() if of["kl"] <= of["logit"]]
    blind = [n for n, of in orders.items() if of["kl"] <= of["model"]]
    half = [n for n, of in layers.items() if of[JACOBIAN]["top10"] < kept["model"]["top10"] / 2]
    return [
        f"The logit lens is as near or nearer in the median KL at {_layers([n for n in layers if n not in near])}, in "
        f"the mean KL at {_layers([n for n in layers if n not in mean])}; it has the next token in the top ten as "
        f"often or more often at {_layers([n for n in layers if n not in ranked])}.",
        f"The Jacobian lens has the next token in its top ten less than half as often as the model at {_layers(half)}.",
        f"The predicted KL is off by more than a factor of {NEAR:g} at {_layers(off)}.",
        f"It ranks directions with a correlation below {RANKED:g} at {_layers(unranked)}.",
        f"The order by KL holds no more than that by logit at {_layers(lost)}, and no more than the model's own "
        f"likeliest tokens at {_layers(blind)}.",
    ]


def _known(about: dict[str, Any]) -> str:
    """How well the lens itself is known."""
    errors = about.get("standard_errors")
    if not errors:
        return ""
    (low, at_low), *_, (high, at_high) = errors.items()
    return (
        f"* The lens is the mean of {about['lens_prompts']:,} prompts: its own standard error is {at_low:.0%} of |J| "
        f"at layer {low} and {at_high:.0%} at layer {high}. A part of this may be for want of prompts."
    )


def draw(kept: dict[str, Any], path: Path) -> None:
    """The figure: the KL to the model, and how often the next token is in the top ten, by layer."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(9.6, 3.9), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [int(layer) for layer in kept["layers"]]
    for name, colour in COLOURS.items():
        of = [layer[name] for layer in kept["layers"].values()]
        left.plot(numbers, [each["kl_median"] for each in of], "o-", color=colour, markersize=3.5, label=name)
        right.plot(numbers, [each["top10"] for each in of], "o-", color=colour, markersize=3.5, label=name)
    right.axhline(kept["model"]["top10"], color="#7a8490", linewidth=1, linestyle="--", label="the model itself")
    left.set(yscale="log", title="Distance to the model", ylabel="median KL(model || lens) (nats)")
    left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.set(title="Next token in the top ten", ylabel="share of positions", ylim=(0, None))
    for ax in (left, right):
        ax.set(xlabel="layer")
        ax.title.set_fontsize(10)
        ax.grid(color="#e4e8ec", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
