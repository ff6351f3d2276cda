"""Measures what docs/steering.md shows, on the demo's model: `python docs/steering.py`, about three minutes.

`--render` writes the page and its figure again from docs/steering.json without measuring anew.
"""

import json
import sys
import tempfile
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch

from fisher_vmap import load_model, measured_kl, open_results, steer
from fisher_vmap.data.render import Renderer
from fisher_vmap.demo import demo_model, most_torn
from fisher_vmap.demo import main as run_demo

HERE = Path(__file__).parent
LAYER = "model.layers.15"
LENGTHS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)
GENERATED_AT = (5.0, 20.0)
NAMES = {
    "prompt": "leading direction of the prompt",
    "mean": "leading direction of the mean",
    "random": "random direction",
}


def measure():
    """Run the demo, then steer one of its prompts along three directions."""
    with tempfile.TemporaryDirectory() as folder:
        assert run_demo(["--output_dir", folder, "--num_prompts", "all"]) == 0
        results = open_results(folder)
        record, mean = most_torn(results), results.directions(1)
    loaded = load_model(str(demo_model()), dtype="float32")
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor(Renderer(tokenizer).render(record.text).ids)
    random = np.random.default_rng(0).standard_normal(len(record.V[0]))
    directions = {"prompt": record.V[0].astype(float), "mean": mean.V[0], "random": random / np.linalg.norm(random)}

    def next_tokens(direction, scale):
        with torch.no_grad(), steer(model, LAYER, direction, scale, residual_norm=1.0):
            p = model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].double().softmax(0)
        return [(tokenizer.decode(int(token)), float(p[token])) for token in p.topk(6).indices]

    def text(direction, scale):
        with steer(model, LAYER, direction, scale, residual_norm=1.0):
            out = model.generate(
                ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=24, do_sample=False
            )
        return tokenizer.decode(out[0, len(ids) :])

    with torch.no_grad():
        norms = model(input_ids=ids[None], output_hidden_states=True).hidden_states[16][0].norm(dim=-1)
    found = {
        "prompt": record.text, "layer": LAYER, "mean_norm": float(norms.mean()),
        "first_norm": float(norms[0]), "median_norm": float(norms.quantile(0.5)), "mass": record.mass,
        "average": record.trace / len(record.V[0]), "lengths": LENGTHS,
        "predicted": {}, "measured": {}, "next": {}, "text": {},
        "plain": {"next": next_tokens(random, 0.0), "text": text(random, 0.0)},
    }  # fmt: skip
    for name, v in directions.items():
        steps = np.concatenate([np.outer(sign * np.array(LENGTHS), v) for sign in (1, -1)])
        kl = measured_kl(model, ids, LAYER, torch.tensor(steps, dtype=torch.float32)).numpy().reshape(2, -1)
        found["predicted"][name] = [0.5 * length**2 * record.quadratic(v) for length in LENGTHS]
        found["measured"][name] = kl.tolist()
        found["next"][name] = [next_tokens(v, sign * GENERATED_AT[0]) for sign in (1, -1)]
        found["text"][name] = [[text(v, sign * length) for sign in (1, -1)] for length in GENERATED_AT]
    (HERE / "steering.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


def draw(found):
    """The figure."""
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    ax = figure.add_subplot()
    for name, colour in zip(NAMES, ("#0072b2", "#009e73", "#d55e00"), strict=True):
        ax.plot(found["lengths"], found["predicted"][name], "--", color=colour, linewidth=1.2)
        ax.plot(found["lengths"], np.mean(found["measured"][name], axis=0), "o-", color=colour, label=NAMES[name])
    ax.plot([], [], "--", color="#7a8490", label="predicted, ½ ε² vᵀF v")
    ax.set(xscale="log", yscale="log", xlabel="length ε of the step", ylabel="KL divergence of the next token (nats)")
    ax.grid(color="#e4e8ec", linewidth=0.7)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "images" / "steering.png", metadata={"Software": None})


def page(found):
    """The page's text, from the measured numbers."""

    def share(length):
        return f"{length / found['median_norm']:.2%}"

    lines = ["| length | of the norm | " + " | ".join(f"{NAMES[name]}: predicted | measured" for name in NAMES) + " |"]
    lines.append("| --- | --- |" + " --- | --- |" * len(NAMES))
    for i, length in enumerate(found["lengths"]):
        cells = [
            f"{found['predicted'][name][i]:.2e} | {np.mean(found['measured'][name], axis=0)[i]:.2e}" for name in NAMES
        ]
        lines.append(f"| {length} | {share(length)} | " + " | ".join(cells) + " |")
    tokens = [f"| nothing | {_tokens(found['plain']['next'])} |"]
    texts = [f"| nothing | {_code(found['plain']['text'])} |"]
    for name, label in NAMES.items():
        for sign, shown in ((0, "+"), (1, "−")):
            tokens.append(f"| {shown}{GENERATED_AT[0]:g}, {label} | {_tokens(found['next'][name][sign])} |")
    for j, length in enumerate(GENERATED_AT):
        for name, label in NAMES.items():
            for sign, shown in ((0, "+"), (1, "−")):
                texts.append(f"| {shown}{length:g}, {label} | {_code(found['text'][name][j][sign])} |")
    ratio = [
        np.mean(found["measured"][name], axis=0)[2] / np.mean(found["measured"]["random"], axis=0)[2]
        for name in ("prompt", "mean")
    ]
    leading = 2 * found["predicted"]["prompt"][0] / found["lengths"][0] ** 2  # v^T F v
    return PAGE.format(
        times=leading / found["average"],
        table="\n".join(lines), tokens="\n".join(tokens), texts="\n".join(texts), ratio=ratio, **found,
        off=[found["predicted"][n][2] / np.mean(found["measured"][n], axis=0)[2] for n in NAMES],
        large=found["predicted"]["prompt"][-1] / np.mean(found["measured"]["prompt"], axis=0)[-1],
    )  # fmt: skip


def _tokens(found):
    return ", ".join(f"{_code(token)} {p:.0%}" for token, p in found)


def _code(text):
    return (
        "<code>" + text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "↵") + "</code>"
    )


PAGE = """# What a leading direction does

Written by `python docs/steering.py` from a run on the demo's model, SmolLM2-135M-Instruct, on a CPU. The prompt is
the one that the demo picks: its leading direction trades most probability.

> {prompt}

Three unit vectors are added to the residual stream at {layer}, at every position: the leading eigenvector of
this prompt's Fisher matrix, the leading eigenvector of the mean over the demo's 64 prompts, and a random vector.

<!-- python:
# What a reader of this page has: the demo's folder and model. The test of this block takes a small model for it.
from transformers import AutoModelForCausalLM, AutoTokenizer
from fisher_vmap.cli import main
from fisher_vmap.demo import PROMPTS
name = "HuggingFaceTB/SmolLM2-135M-Instruct"
command = f"run --model_path {{name}} --num_prompts 18 --hook_layer_name {layer} --output_dir demo_results"
assert main([*command.split(), "--dataset_name", str(PROMPTS)]) == 0
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
inputs = tokenizer("Hello", return_tensors="pt")
-->

```python
from fisher_vmap import open_results, steer

record = open_results("demo_results")[17]
with steer(model, "{layer}", record.V[0], -5, residual_norm=1.0):
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
```

## Predicted and measured

The predicted value is 1/2 eps^2 v^T F v with the prompt's own F, computed in bfloat16. The measured value is
KL(p || p_steered) of the next token in float32, the mean of both signs.

![KL against the length of the step](images/steering.png)

{table}

At a length of 0.4 the prompt's own direction does {ratio[0]:,.0f} times what this random one does, and the mean's
{ratio[1]:,.0f} times. The effect of a single random direction varies by chance. On average over all directions
v^T F v is trace / D, and the prompt's own direction has {times:,.0f} times that.

The predicted value over the measured one is {off[0]:.2f}, {off[1]:.2f} and {off[2]:.2f} there. F holds the top 10
tokens, {mass:.0%} of the probability, so the effect of a step on the other tokens is missing, most of all for the
random direction. At the largest step the quadratic form overstates the prompt's own direction {large:.1f}-fold: once
the distribution has tipped over, the KL divergence grows more slowly than the square of the length.

A note on lengths: "of the norm" is of the median norm of the residual stream over this prompt's positions,
{median_norm:.0f}, which is what `record.residual_norm` gives. Their mean is {mean_norm:.0f}, because the first position
alone has {first_norm:,.0f}. A step of sqrt(2 KL / S), by the KL divergence that F predicts, goes by no norm at all.

## Next tokens

| step | likeliest next tokens |
| --- | --- |
{tokens}

## Text

24 tokens, the likeliest each time, with the step added throughout:

| step | text |
| --- | --- |
{texts}

What this shows: the leading direction switches between two ways to begin the answer, and the rest of the text follows
from the beginning. A random direction of the same length leaves the text unchanged until it is long enough to disturb
the model as a whole. What it does not show: that the direction means anything beyond this choice, or that it does the
same to other prompts. The matrix is about the next token of this prompt. [The study](study.md) looks at groups of
prompts.
"""

if __name__ == "__main__":
    if "--render" not in sys.argv:
        measure()
    numbers = json.loads((HERE / "steering.json").read_text("utf-8"))
    draw(numbers)
    (HERE / "steering.md").write_text(page(numbers), "utf-8")
