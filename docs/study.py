"""Measures what docs/study.md shows, on the demo's model: `python docs/study.py`, about five minutes on two cores.

`--render` writes the page and its figures again from docs/study.json without measuring anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

from fisher_vmap import FisherModel, load_model, natural_step, open_results, steer
from fisher_vmap.cli import start_logging
from fisher_vmap.data.render import Renderer
from fisher_vmap.demo import PROMPTS, demo_model
from fisher_vmap.model.recording import output_of
from fisher_vmap.run.__main__ import run
from fisher_vmap.run.settings import Settings

HERE = Path(__file__).parent
WORK = Path(tempfile.gettempdir(), "fisher_vmap-study")  # the results stay here: a run that was stopped carries on
PHRASE, LAYER, RIDGE, KEPT = "Answer in French. ", 15, 0.01, 3
NATURAL, RAISED = "natural step", 10  # towards so many tokens that the phrase raises most
WIDTH = 576  # of the demo's model
LENGTHS = (10.0, 40.0)
RIDGES = (0.001, 0.01, 0.1, 1.0, 10.0)
EVERY = {10.0: 4, 40.0: 2}  # of the held-out pairs, so many are steered by a step of that length
GROUPS = ("with", "without")


def measure():
    """Both groups' matrices, the directions that separate them on half of the pairs, and steering on the other half."""
    rows = [json.loads(line) for line in PROMPTS.read_text("utf-8").splitlines()]
    texts = [row["prompt"] for row in rows if isinstance(row.get("prompt"), str)]
    start_logging()
    WORK.mkdir(exist_ok=True)
    data = WORK / "pairs.jsonl"
    pairs = [(PHRASE * (group == "with") + text, group, i) for i, text in enumerate(texts) for group in GROUPS]
    keys = ("prompt", "phrase", "pair")
    data.write_text("\n".join(json.dumps(dict(zip(keys, pair, strict=True))) for pair in pairs), "utf-8")
    settings = Settings(
        model_path=str(demo_model()), dataset_name=str(data), hook_layer_name=LAYER, num_prompts="all",
        keep_columns=("phrase", "pair"), output_dir=str(WORK / "results"),
    )  # fmt: skip
    run(settings)
    found = analyse(open_results(settings.output_dir), load_model(str(demo_model()), dtype="float32"), texts)
    (HERE / "study.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def analyse(results, loaded, texts):
    """Everything that the page shows, as plain numbers."""
    fit, held = range(0, len(texts), 2), range(1, len(texts), 2)
    chosen = {group: (lambda row, group=group: row["phrase"] == group and row["pair"] in fit) for group in GROUPS}
    contrast = results.contrast(chosen["with"], chosen["without"], rank=KEPT, ridge=RIDGE)
    runner = Runner(loaded, texts)
    shift = np.mean([runner.stream(i, "with") - runner.stream(i, "without") for i in fit], axis=0)
    random = np.random.default_rng(0).standard_normal((1, len(shift)))
    directions = {f"contrast {r + 1}": contrast.directions[r] for r in range(KEPT)}
    directions["mean with"] = results.directions(1, where=chosen["with"]).V[0]
    directions["difference of streams"] = shift / np.linalg.norm(shift)
    raised = runner.raised(fit)
    fisher = FisherModel(loaded.model, loaded.tokenizer, layers=[LAYER], precision="float32")
    how = {"prompt": [texts[i] for i in fit], "towards": raised, "kl": 0.1}
    damping = 10 * natural_step(fisher, **how, products=1).damping  # for one step of many prompts: steering-study.md
    step = natural_step(fisher, **how, damping=damping).step.double().numpy()
    directions[NATURAL] = step / np.linalg.norm(step)
    directions |= {f"random {r + 1}": v / np.linalg.norm(v) for r, v in enumerate(random)}

    records = {(record.row["pair"], record.row["phrase"]): record for record in results}
    reacts = {
        name: {group: [records[i, group].quadratic(v) for i in held] for group in GROUPS}
        for name, v in directions.items()
    }
    trades: dict[str, list[float]] = {}
    for i in fit:
        record = records[i, "with"]
        change = np.exp(record.log_probs) * (record.scores() @ contrast.directions[0])
        for token, value in zip(record.top_tokens, change, strict=True):
            trades.setdefault(token, []).append(float(value))

    ridges = []
    for ridge in RIDGES:
        tried = results.contrast(chosen["with"], chosen["without"], rank=1, ridge=ridge)
        on = [np.mean([records[i, g].quadratic(tried.directions[0]) for i in held]) for g in GROUPS]
        ridges.append([ridge, float(tried.inside[0] / tried.outside[0]), float(on[0] / on[1]), float(on[0])])
    steering: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, v in directions.items():
        gain = {
            sign: np.mean([runner.closed(i, "without", v, sign * LENGTHS[-1])[1] for i in fit[:6]]) for sign in (1, -1)
        }
        sign = max(gain, key=lambda s: gain[s])  # chosen on prompts that are not looked at again
        steering[name] = {"sign": sign, "effects": {
            str(length): {group: [runner.closed(i, group, v, sign * length) for i in held[:: EVERY[length]]]
                          for group in GROUPS}
            for length in LENGTHS
        }}  # fmt: skip
    example = held[4]
    said = {"plain": runner.text(example, None, 0.0), "with the phrase": runner.text(example, "with", 0.0)}
    for name in ("contrast 1", "difference of streams", NATURAL, "random 1"):
        for length in (LENGTHS[-1], 2 * LENGTHS[-1]):
            said[f"{name}, {length:g}"] = runner.text(example, directions[name], steering[name]["sign"] * length)
    return {
        "phrase": PHRASE, "layer": results.layer, "pairs": len(texts), "fit": len(fit), "held": len(held),
        "ratios": contrast.ratios.tolist(), "ridge": contrast.ridge, "inside": contrast.inside.tolist(),
        "outside": contrast.outside.tolist(), "reacts": reacts, "steering": steering, "said": said,
        "example": texts[example], "distance": [runner.apart(i) for i in held],
        "trades": sorted(((t, float(np.sum(v)), len(v)) for t, v in trades.items()), key=lambda found: found[1]),
        "cosines": {name: float(abs(directions["contrast 1"] @ v)) for name, v in directions.items()},
        "raised": [loaded.tokenizer.decode([token]) for token in raised], "natural": NATURAL,
        "median_norm": runner.median_norm, "shift_norm": float(np.linalg.norm(shift)), "ridges": ridges,
    }  # fmt: skip


class Runner:
    """The model on the pairs: next-token distributions and texts, steered or not."""

    def __init__(self, loaded, texts):
        self.model, self.tokenizer, self.plain = loaded.model, loaded.tokenizer, {}
        render = Renderer(loaded.tokenizer).render
        self.ids = {
            (i, group): torch.tensor(render(PHRASE * (group == "with") + text).ids)
            for i, text in enumerate(texts)
            for group in GROUPS
        }
        self.median_norm = float(np.median([np.linalg.norm(self.stream(i, "without")) for i in range(0, 12)]))

    def log_p(self, i, group, v=None, scale=0.0):
        """[V] log-probabilities of the next token, in float64."""
        if v is None and (i, group) in self.plain:
            return self.plain[i, group]
        step = np.eye(1, self.model.config.hidden_size)[0] if v is None else v
        with torch.no_grad(), steer(self.model, LAYER, step, scale, residual_norm=1.0):
            found = (
                self.model(input_ids=self.ids[i, group][None], logits_to_keep=1).logits[0, -1].double().log_softmax(0)
            )
        if v is None:
            self.plain[i, group] = found
        return found

    def raised(self, pairs):
        """The tokens whose mean probability the phrase raises most."""
        change = sum(self.log_p(i, "with").exp() - self.log_p(i, "without").exp() for i in pairs)
        return change.topk(RAISED).indices.tolist()

    def apart(self, i):
        """KL(with the phrase || without) of pair i."""
        return divergence(self.log_p(i, "with"), self.log_p(i, "without"))

    def closed(self, i, group, v, scale):
        """How far a step moves a prompt, in nats, and how much of the way to its other self (1: all of it)."""
        steered, other = self.log_p(i, group, v, scale), self.log_p(i, GROUPS[group == "with"])
        plain = self.log_p(i, group)
        return divergence(plain, steered), 1 - divergence(other, steered) / divergence(other, plain)

    def stream(self, i, group):
        """[D] the residual stream at the hooked layer at the last position."""
        seen = []
        block = self.model.get_submodule(f"model.layers.{LAYER}")
        handle = block.register_forward_hook(lambda _m, _a, output: seen.append(output_of(output)[0, -1]))
        self.log_p(i, group)
        if not seen:  # the distribution was known already
            with torch.no_grad():
                self.model(input_ids=self.ids[i, group][None], logits_to_keep=1)
        handle.remove()
        return seen[-1].double().numpy()

    def text(self, i, v, scale):
        """24 tokens, the likeliest each time."""
        ids = self.ids[i, "with" if isinstance(v, str) else "without"]
        step = np.eye(1, self.model.config.hidden_size)[0] if v is None or isinstance(v, str) else v
        with steer(self.model, LAYER, step, scale, residual_norm=1.0):
            out = self.model.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=24, do_sample=False
            )
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def divergence(log_p, log_q):
    """KL(p || q) in nats."""
    return float((log_p.exp() * (log_p - log_q)).sum())


def page(found):
    """The page's text, from the measured numbers."""
    reacts, steering = found["reacts"], found["steering"]
    table = [
        "| direction | vᵀF v, with | without | with / without | prompts told apart (AUC) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, of in reacts.items():
        a, b = np.array(of["with"]), np.array(of["without"])
        table.append(f"| {name} | {a.mean():.2e} | {b.mean():.2e} | {a.mean() / b.mean():.2f} | {auc(a, b):.2f} |")
    steps = [
        "| direction | length | moved (nats), with | without | nearer to the other group, with | without |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, of in steering.items():
        for length, effects in of["effects"].items():
            moved = {group: np.median([m for m, _ in effects[group]]) for group in GROUPS}
            closed = {group: np.median([c for _, c in effects[group]]) for group in GROUPS}
            signed = f"{'+' if of['sign'] > 0 else '−'}{float(length):g}"
            steps.append(
                f"| {name} | {signed} | {moved['with']:.3f} | {moved['without']:.3f} | {closed['with']:+.0%} | "
                f"{closed['without']:+.0%} |"
            )
    lowest, highest = found["trades"][:6], found["trades"][::-1][:6]
    values = {
        "table": "\n".join(table), "steps": "\n".join(steps),
        "up": ", ".join(f"{code(token)} {value:+.2f}" for token, value, _ in highest),
        "down": ", ".join(f"{code(token)} {value:+.2f}" for token, value, _ in lowest),
        "ridge_table": "\n".join(
            f"| {ridge:g} | {seen:,.0f} | {held:.1f} | {size:.1e} |" for ridge, seen, held, size in found["ridges"]
        ),
        "said": "\n".join(f"| {name} | {code(text)} |" for name, text in found["said"].items()),
        "raised_tokens": ", ".join(map(code, found["raised"])),
        "apart": float(np.median(found["distance"])),
        "width": WIDTH, "stream_ratio": ratio(reacts["difference of streams"]),
        "contrast_ratio": ratio(reacts["contrast 1"]),
        "auc": auc(*(np.array(reacts["contrast 1"][group]) for group in GROUPS)),
        "closed": {name: np.median([c for _, c in of["effects"]["40.0"]["without"]]) for name, of in steering.items()},
        "moved": {
            name: [np.median([m for m, _ in of["effects"]["40.0"][group]]) for group in GROUPS]
            for name, of in steering.items()
        },
    }  # fmt: skip
    return (HERE / "study.template.md").read_text("utf-8").format(**(found | values))


def draw(found):
    """The two figures."""
    figure = matplotlib.figure.Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    axes = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    names = ("contrast 1", "random 1")
    both = np.concatenate([found["reacts"][name][group] for name in names for group in GROUPS])
    ends = [both.min() / 1.5, both.max() * 1.5]
    for ax, name in zip(axes, names, strict=True):
        of = found["reacts"][name]
        ax.scatter(of["without"], of["with"], s=26, color="#0072b2", alpha=0.85)
        ax.plot(ends, ends, color="#7a8490", linewidth=1, linestyle="--")
        ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends, title=name)
        ax.set(xlabel="vᵀF v without the phrase", ylabel="vᵀF v with the phrase")
    finish(figure, axes, "study-reacts.png")

    figure = matplotlib.figure.Figure(figsize=(9.6, 4.2), dpi=130, layout="constrained")
    axes = [figure.add_subplot(1, 2, i + 1) for i in range(2)]
    names = list(found["steering"])
    for place, name in enumerate(names):
        effects = found["steering"][name]["effects"]["40.0"]
        for shift, group, colour in ((-0.17, "with", "#d55e00"), (0.17, "without", "#0072b2")):
            moved, closed = np.array(effects[group]).T
            for ax, values in ((axes[0], moved), (axes[1], closed)):
                low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
                ax.plot([low, high], [place + shift] * 2, color=colour, linewidth=3, alpha=0.35)
                ax.plot(
                    [middle],
                    [place + shift],
                    "o",
                    color=colour,
                    label=f"prompts {group} the phrase" if not place else None,
                )
    axes[0].set(xscale="log", xlabel="KL divergence that the step causes (nats)")
    axes[1].set(xlabel="part of the way to the other group (1: all of it)")
    axes[1].axvline(0, color="#7a8490", linewidth=1)
    for ax in axes:
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [])
        ax.invert_yaxis()
    axes[0].legend(frameon=False, fontsize=8)
    finish(figure, axes, "study-steering.png")


def finish(figure, axes, name):
    """Grid, no boxes, saved without a date."""
    for ax in axes:
        ax.grid(color="#e4e8ec", linewidth=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "images" / name, metadata={"Software": None})


def auc(a, b):
    """The chance that one of `a` is above one of `b`."""
    return float(((a[:, None] > b).mean() + (a[:, None] >= b).mean()) / 2)


def ratio(of):
    """Mean over one group over mean over the other."""
    return float(np.mean(of["with"]) / np.mean(of["without"]))


def code(text):
    """Text of a model inside a Markdown table."""
    for char, entity in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("\n", "↵")):
        text = text.replace(char, entity)
    return f"<code>{text}</code>"


if __name__ == "__main__":
    if "--render" not in sys.argv:
        measure()
    numbers = json.loads((HERE / "study.json").read_text("utf-8"))
    draw(numbers)
    (HERE / "study.md").write_text(page(numbers), "utf-8")
