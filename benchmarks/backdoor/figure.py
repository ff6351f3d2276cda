"""The figure of docs/backdoor.md: how well scores rank the triggered prompts by layer, and what each method elicits."""

from pathlib import Path

import numpy as np

from benchmarks.backdoor.verdicts import CRITERIA, Kept, parts
from benchmarks.backdoor.which_prompts import LAYERS

COLOURS = {"sentence": "#0072b2", "french": "#d55e00", "refusal": "#009e73"}
LINES = {"total": "-", "change": "--"}


def draw(kept: Kept, path: Path) -> None:
    """Draw what was measured: each model is two lines on the left and a bar on the right; * is for not planted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    numbers = [int(layer.rsplit(".", 1)[1]) for layer in LAYERS]
    for name in kept.measured("prompts"):
        of = kept.data["prompts"][name]["hunts"][0]["layers"]
        for score in CRITERIA:
            values = [of[layer][score]["auc"] for layer in LAYERS]
            style = {"linestyle": LINES[score], "color": COLOURS[parts(name)[0]], "marker": "o", "markersize": 3.5}
            left.plot(numbers, values, label=f"{name}{'' if kept.planted(name) else '*'}: {score}", **style)  # type: ignore[arg-type]
    left.axhline(0.5, color="#7a8490", linewidth=1, linestyle=":")
    left.set(title="(a) The prompts with the trigger", xlabel="layer", ylabel="AUC", ylim=(0, 1.03), xticks=numbers)
    names = kept.measured("behaviour")
    methods = list(kept.data["behaviour"][names[0]]["methods"]) if names else []
    for i, name in enumerate(names):
        of, behaviour = kept.data["behaviour"][name], parts(name)[0]
        rates = [of["methods"][method][behaviour]["rate"] for method in methods]
        places = np.arange(len(methods)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        right.barh(places, rates, 0.8 / len(names), color=COLOURS[behaviour], label=name)
        right.plot([of["unsteered"][behaviour]["rate"]] * 2, [-0.6, len(methods) - 0.4], ":", color=COLOURS[behaviour])
    right.set(title="(b) The behaviour under each method's chosen step", xlabel="share of testing prompts", xlim=(0, 1))
    right.set_yticks(range(len(methods)), methods, fontsize=8)
    right.invert_yaxis()
    for ax in (left, right):
        ax.title.set_fontsize(10)
        ax.grid(color="#e4e8ec", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
