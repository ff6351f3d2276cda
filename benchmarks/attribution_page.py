"""docs/attribution.md and its figure, from what `benchmarks.attribution` has measured and keeps in a JSON file."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIGNED = ("gradient x input", "integrated gradients")
METHODS = (
    *("Fisher scope", "Fisher scope, one token", "gradient x input", "gradient x input, unsigned"),
    *("integrated gradients", "integrated gradients, unsigned", "random"),
)
SCOPE = METHODS[0]
REMOVALS = ("mean", "deleted")
LEAST = 60  # texts; the page shows no numbers of fewer
RESAMPLES = 2000  # of the texts, for the intervals
COLOURS = ("#0072b2", "#d55e00", "#009e73")

WHAT_IT_IS = """\
Give the embedding of token i a bias of its own, and nothing else. The Fisher matrix with respect to that bias is the
position's own $J_i^\\top C J_i$ ([what the matrix is](the-matrix.md)), and its trace is the **Fisher scope** of token
i:

$$
a_i = \\sum_t p_t \\left| \\frac{\\partial \\log p_t}{\\partial x_i} \\right|^2
$$

With several [targets](guide/targets.md) it is the sum over them. It says how fast the distribution of what comes next
moves when the vector of token i moves: a small step of length $\\varepsilon$ in a random direction at that token alone
causes a KL divergence of $\\varepsilon^2 a_i / 2D$ on average, D the width. Its unit is nats² per squared unit of the
embedding. It needs no choice of a next token and no baseline. What it is not: it has no sign, so it does not tell what
speaks for a token from what speaks against it. It is no share of anything: the numbers add up neither to log p nor to
the trace of F, which has cross terms between positions. And it is local: it is about small changes of a vector, not
about another token in its place. Of a layer above the embedding it is about the residual stream at a position, which
knows earlier tokens too."""

HOW = """\
Hook the embedding, and every prompt has its numbers, in `record.attribution()` and in the column
`model.embed_tokens/attribution` of prompts.parquet:

```sh
fisher-vmap run --model_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name prompts.jsonl \\
    --hook_layer_name model.embed_tokens --output_dir scope
```

```python
from fisher_vmap import open_results

record = open_results("scope")[0]
a = record.attribution()                        # [T] float32, one number a token
for token, number in zip(record.prompt_tokens, a, strict=True):
    print(f"{token!r:12} {number / a.sum():6.1%}")
```

`estimator: topk`, the default, sums over the `top_k_tokens` likeliest tokens at each target, exactly. `sampled` sums
over all tokens, without bias and with an error. `full` counts at each position what its directions hold, so that with
several targets its numbers are too low; take one of the others there. A run with `save: mean` has no such column: the
lists would be most of what it leaves on the disk."""


class Measured(NamedTuple):
    """A number over the texts, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def median(values: NDArray[np.float64]) -> Measured:
    """The median over the texts, with a bootstrap interval."""
    return _over(values, lambda x: np.median(x, axis=-1))


def mean(values: NDArray[np.float64]) -> Measured:
    """The mean over the texts, with a bootstrap interval."""
    return _over(values, lambda x: np.mean(x, axis=-1))


def _over(values: NDArray[np.float64], of: Any) -> Measured:
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))  # the same for every method
    low, high = np.quantile(of(values[chosen]), [0.025, 0.975])
    return Measured(float(of(values)), float(low), float(high))


def good(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts that the model completes by their cue."""
    return [row for row in kept["texts"] if "p" in row]


def drop(kept: dict[str, Any], method: str, way: str) -> NDArray[np.float64]:
    """[n] nats that each text loses."""
    return np.array([row["drop"][method][way] for row in good(kept)])


def found(kept: dict[str, Any], method: str, kind: str | None = None) -> NDArray[np.float64]:
    """[n] 1 where the cue is among the removed tokens, else 0."""
    rows = [row for row in good(kept) if kind in (None, row["kind"])]
    return np.array([float(row["rank"][method] <= row["removed"]) for row in rows])


def verdict(what: str, values: dict[str, NDArray[np.float64]], of: Any, unit: str) -> str:
    """One line: which methods Fisher scope beats, which beat it, and which it cannot be told from."""
    groups: dict[str, list[str]] = {"beats": [], "is beaten by": [], "cannot be told from": []}
    for name in METHODS[1:]:
        difference: Measured = of(values[SCOPE] - values[name])
        group = "beats" if difference.low > 0 else "is beaten by" if difference.high < 0 else "cannot be told from"
        groups[group].append(f"{name} ({difference.value:+.2f}{unit}, {difference.low:+.2f} to {difference.high:+.2f})")
    parts = [f"it {group} {'; '.join(names)}" for group, names in groups.items() if names]
    return f"* {what}: {'. '.join(part[0].upper() + part[1:] for part in parts)}."


def winner(values: dict[str, NDArray[np.float64]], of: Any) -> str:
    """The method with the highest number."""
    return max(values, key=lambda name: of(values[name]).value)


def page(kept: dict[str, Any]) -> str:
    """docs/attribution.md."""
    head = ["# Which tokens the next token hangs on", "", "## Fisher scope", "", WHAT_IT_IS, "", HOW, ""]
    head += ["## Is it right?", ""]
    rows = good(kept)
    if len(rows) < LEAST:
        so_far = (
            "`python -m benchmarks.attribution` puts it beside gradient x input, integrated gradients and chance, on "
            f"texts with a cue far before the word that it decides. It has done {len(rows)} of {LEAST} texts; the same "
            "command carries on, and writes the numbers here when all are done."
        )
        return "\n".join([*head, so_far]) + "\n"
    machine, example = kept["machine"], rows[0]
    lengths, removed = [row["tokens"] for row in rows], [row["removed"] for row in rows]
    far = [row["tokens"] - 1 - row["cue_at"] for row in rows]
    gap = float(np.median([abs(row["integration_gap"]) for row in rows]))
    drops = {way: {name: drop(kept, name, way) for name in METHODS} for way in REMOVALS}
    recall = {name: found(kept, name) for name in METHODS}
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    titles = {"mean": "replaced by the mean", "deleted": "deleted"}
    table = [
        f"| method | {' | '.join(titles[way] for way in REMOVALS)} | cue found | CPU seconds a text |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in METHODS:
        seconds = float(np.median([row["seconds"][name.removesuffix(", unsigned")] for row in rows]))
        cells = [str(median(drops[way][name])) for way in REMOVALS]
        table.append(f"| {name} | {' | '.join(cells)} | {mean(recall[name])} | {seconds:.2f} |")
    by_kind = [f"| method | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for name in METHODS:
        by_kind.append(f"| {name} | {' | '.join(f'{found(kept, name, kind).mean():.2f}' for kind in kinds)} |")
    best = {titles[way]: winner(drops[way], median) for way in REMOVALS} | {"cue found": winner(recall, mean)}
    lines = [
        *head,
        f"Measured by `python -m benchmarks.attribution` on {machine['cores']} cores of a CPU "
        f"({machine['cpu_capability']}), torch {machine['torch']}: {kept['model']}-Instruct in float32, {len(rows)} "
        f"texts of {min(lengths)} to {max(lengths)} tokens, {len(kinds)} kinds. In each a word of the first sentence, "
        f"the cue, is what the last clause asks for, {min(far)} to {max(far)} tokens later. Such as:",
        "",
        f"> {example['text']}",
        "",
        f"The texts are made from templates; of the {len(kept['texts'])} that were tried, those are kept whose "
        "likeliest next token is the cue's. The top tenth of the tokens by each method "
        f"({min(removed)} to {max(removed)} tokens; never the last one, where the distribution is read) is removed in "
        "two ways: replaced by the mean of all embeddings, or deleted. The table has how many nats the "
        "log-probability of the formerly likeliest token loses, the median over the texts with a 95% bootstrap "
        "interval; and the share of texts whose cue is among the removed tokens. Higher is better in all of them.",
        "",
        *table,
        "",
        "![The drop of log p when the top tenth is removed, and how often the cue is found](images/attribution.png)",
        "",
        f'Fisher scope is `topk` with {kept["top_k"]} tokens; "one token" is p \\|g\\|² of the likeliest one alone. '
        "Gradient x input and integrated gradients are of that token's log p, with their sign (what speaks for the "
        f"token comes first) and without. Integrated gradients take {kept['steps']} steps from the mean embedding at "
        f"all positions; their sum misses the change of log p by {gap:.1%} in the median. The mean embedding is their "
        "own baseline, so that replacing by it is the test that suits them best.",
        "",
        "## Who wins",
        "",
        " ".join(f"{what[0].upper()}{what[1:]}: highest for {name}." for what, name in best.items()),
        "Fisher scope beside the others, the median of the difference text by text (of the cue the mean), with its 95% "
        "interval:",
        "",
        *(verdict(titles[way], drops[way], median, " nats") for way in REMOVALS),
        verdict("cue found", recall, mean, ""),
        "",
        "The cue among the removed tokens, by kind of text:",
        "",
        *by_kind,
        "",
        "These are texts whose answer is copied from one place, and one small model. A method that finds a copied word "
        "need not be the best one elsewhere.",
    ]
    return "\n".join(lines) + "\n"


def draw(kept: dict[str, Any], path: Path) -> None:
    """The figure: both measures for each method, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, name in enumerate(METHODS):
        for number, way in enumerate(REMOVALS):
            value, low, high = median(drop(kept, name, way))
            at = place + 0.3 * (number - 0.5)
            left.plot([low, high], [at, at], color=COLOURS[number], linewidth=3, alpha=0.35)
            left.plot([value], [at], "o", color=COLOURS[number], label=None if place else way)
        value, low, high = mean(found(kept, name))
        right.plot([low, high], [place, place], color="#444c56", linewidth=3, alpha=0.35)
        right.plot([value], [place], "o", color="#444c56")
    left.set(xlabel="drop of log p (nats), top tenth removed", yticks=range(len(METHODS)), yticklabels=METHODS)
    right.set(xlabel="share of texts whose cue is in the top tenth", xlim=(-0.03, 1.03))
    left.invert_yaxis()
    left.legend(frameon=False, fontsize=8, title="removed tokens are", title_fontsize=8)
    for axes in (left, right):
        axes.grid(color="#e4e8ec", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
