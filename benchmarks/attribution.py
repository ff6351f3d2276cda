"""Which tokens does the next token hang on? `python -m benchmarks.attribution`: five ways to tell, put to the test.

Texts with a cue far before the word that it decides (`attribution_texts`), SmolLM2 in float32. The top tenth of the
tokens, by each method, is taken out of the text, and the log-probability of what was the likeliest next token is read
again. The numbers go into benchmarks/results/attribution.json, and from there into docs/attribution.md (`--render`
alone writes the page and its figure again). Fisher scope is computed by the package, everything else by plain autograd.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution_page import METHODS, REMOVALS, draw, page
from benchmarks.attribution_texts import KINDS, Text, texts
from benchmarks.timing import machine, write_json
from benchmarks.workloads import Workload, smollm2
from fisher_vmap import fisher_scores

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "attribution.json"
PAGE = ROOT / "docs" / "attribution.md"
FIGURE = ROOT / "docs" / "images" / "attribution.png"
LAYER = "model.embed_tokens"
TOP_K, STEPS, SHARE = 10, 32, 10  # tokens of the matrix; points on the path; one in so many tokens is removed
NEUTRAL = " the"
AT_ONCE = 8  # points of the path in one pass


class Opened(NamedTuple):
    """The model, its embedding of every token, and what stands in for a removed token."""

    workload: Workload
    embedding: Tensor
    mean: Tensor
    neutral: Tensor

    def embed(self, ids_T: Tensor) -> Tensor:
        """[T, D]."""
        return self.embedding[ids_T]

    def log_p(self, x_BTD: Tensor) -> Tensor:
        """[B, V] log-probabilities of what comes next, from embeddings."""
        logits: Tensor = self.workload.model(inputs_embeds=x_BTD, use_cache=False, logits_to_keep=1).logits[:, -1]
        return logits.float().log_softmax(1)


class Case(NamedTuple):
    """A text as tokens, the place of its cue, and the model's likeliest next token."""

    text: Text
    ids: Tensor
    cue: int
    top: int
    log_p: float


def opened() -> Opened:
    """SmolLM2-135M in float32, without gradients of its weights."""
    workload = smollm2("float32", "cpu", "float32")
    workload.model.requires_grad_(False)
    embedding = workload.model.get_input_embeddings().weight.detach()
    (neutral,) = workload.tokenizer(NEUTRAL, add_special_tokens=False).input_ids
    return Opened(workload, embedding, embedding.mean(0), embedding[neutral])


def case_of(net: Opened, text: Text) -> Case | None:
    """The tokens of a text; None if the model does not say the cue next."""
    found = net.workload.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(found.input_ids)
    # The first token that has a character of the cue; a space before it may be a part of it.
    cue = next(i for i, (start, stop) in enumerate(found.offset_mapping) if start <= text.start < stop)
    with torch.no_grad():
        log_p_V = net.log_p(net.embed(ids)[None])[0]
    top = int(log_p_V.argmax())
    said, asked = (net.workload.tokenizer.decode([token]).strip() for token in (top, int(ids[cue])))
    return Case(text, ids, cue, top, float(log_p_V[top])) if said == asked else None


def cases(net: Opened, each: int) -> tuple[list[Case], dict[str, list[int]]]:
    """So many cases of each kind that the model completes by the cue; and how many texts were tried for them."""
    found: list[Case] = []
    tried = {}
    for kind in KINDS:
        before = len(found)
        for number, text in enumerate(texts(kind), 1):
            if (case := case_of(net, text)) is not None:
                found.append(case)
            if len(found) - before == each or number == 6 * each:
                break
        tried[kind] = [number, len(found) - before]
        print(f"{kind}: {tried[kind][1]} of {number} texts are completed by their cue", flush=True)
    return found, tried


def gradient(net: Opened, case: Case) -> tuple[Tensor, Tensor]:
    """The embeddings x, and the gradient of the likeliest token's log p with respect to each: [T, D] both."""
    x = net.embed(case.ids).clone().requires_grad_()
    log_p = net.log_p(x[None])[0, case.top]
    return x.detach(), torch.autograd.grad(log_p, x)[0]


def fisher_scope(net: Opened, case: Case) -> Tensor:
    """The trace of each position's own J^T C J, of the likeliest tokens."""
    scores = fisher_scores(net.workload.model, case.ids[None], layers=LAYER, top_k=TOP_K, precision="model")
    return scores.position_energy[LAYER][0]


def one_token(net: Opened, case: Case) -> Tensor:
    """p |g|^2 of the likeliest token alone."""
    _, g = gradient(net, case)
    return np.exp(case.log_p) * g.square().sum(1)


def gradient_x_input(net: Opened, case: Case) -> Tensor:
    """g . x, signed: what speaks for the token comes first."""
    x, g = gradient(net, case)
    return (g * x).sum(1)


def integrated_gradients(net: Opened, case: Case) -> Tensor:
    """The gradient's mean on the way from the mean embedding to x, times the way; the midpoints of equal steps."""
    x, way = net.embed(case.ids), net.embed(case.ids) - net.mean
    total = torch.zeros_like(x)
    for part in ((torch.arange(STEPS) + 0.5) / STEPS).split(AT_ONCE):
        path = (net.mean + part[:, None, None] * way).requires_grad_()
        total += torch.autograd.grad(net.log_p(path)[:, case.top].sum(), path)[0].sum(0)
    return (total / STEPS * way).sum(1)


def random(net: Opened, case: Case) -> Tensor:
    """Numbers that say nothing, drawn with the text as seed."""
    seed = sum(case.ids.tolist())
    return torch.rand(len(case.ids), generator=torch.Generator().manual_seed(seed))


WAYS: dict[str, Callable[[Opened, Case], Tensor]] = dict(
    zip(METHODS, (fisher_scope, one_token, gradient_x_input, integrated_gradients, random), strict=True)
)


def drops(net: Opened, case: Case, removed: list[list[int]]) -> dict[str, list[float]]:
    """How many nats the token's log p loses by each way of removal, for each list of removed places."""
    x, T = net.embed(case.ids), len(case.ids)
    changed = []
    for stand_in in (net.neutral, net.mean):
        for places in removed:
            changed.append(x.clone())
            changed[-1][places] = stand_in
    shorter = [x[[i for i in range(T) if i not in places]] for places in removed]
    with torch.no_grad():
        log_p = torch.cat([net.log_p(torch.stack(changed)), net.log_p(torch.stack(shorter))])[:, case.top]
    lost = (case.log_p - log_p).view(len(REMOVALS), len(removed)).tolist()
    return {way: [round(nats, 5) for nats in of] for way, of in zip(REMOVALS, lost, strict=True)}


@contextmanager
def counted(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Adds the CPU time of what happens within."""
    began = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - began


def measure(net: Opened, each: int) -> dict[str, Any]:
    """Every method on every text, as plain numbers."""
    chosen, tried = cases(net, each)
    fisher_scope(net, chosen[0])  # once before the clock runs: the form is proven
    seconds: dict[str, float] = {}
    rows, gaps = [], []
    for number, case in enumerate(chosen, 1):
        T = len(case.ids)
        n = max(1, T // SHARE)
        found: dict[str, Tensor] = {}
        for name, way in WAYS.items():
            with counted(seconds, name):
                found[name] = way(net, case)
        # The last position is where the distribution is read: it is left in place for all methods.
        order = {name: scores[: T - 1].argsort(descending=True).tolist() for name, scores in found.items()}
        lost = drops(net, case, [order[name][:n] for name in WAYS])
        with torch.no_grad():
            start = float(net.log_p(net.mean.expand(1, T, -1))[0, case.top])
        gaps.append(abs(float(found["integrated gradients"].sum()) / (case.log_p - start) - 1))
        rows.append({
            "kind": case.text.kind, "text": case.text.text, "cue": case.text.cue, "tokens": T, "cue_at": case.cue,
            "removed": n, "p": round(float(np.exp(case.log_p)), 5),
            "rank": {name: order[name].index(case.cue) + 1 for name in WAYS},
            "drop": {name: {way: lost[way][i] for way in REMOVALS} for i, name in enumerate(WAYS)},
        })  # fmt: skip
        print(number, case.text.kind, T, rows[-1]["rank"], rows[-1]["drop"]["Fisher scope"], flush=True)
    check(net, chosen[0])
    return {
        "machine": machine(), "model": net.workload.name, "layer": LAYER, "top_k": TOP_K, "steps": STEPS,
        "share": SHARE, "neutral": NEUTRAL, "tried": tried, "texts": rows,
        "seconds": {name: round(s / len(rows), 4) for name, s in seconds.items()},
        "integration_gap": round(float(np.median(gaps)), 5),
    }  # fmt: skip


def check(net: Opened, case: Case) -> None:
    """The package's numbers are plain autograd's: of one token, p |g|^2 at each position."""
    scores = fisher_scores(
        net.workload.model, case.ids[None], layers=LAYER, token_ids=torch.tensor([[case.top]]), precision="model"
    )
    torch.testing.assert_close(scores.position_energy[LAYER][0], one_token(net, case), rtol=1e-3, atol=1e-6)


def main() -> None:
    """Measure, keep the numbers, write the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=10, help="texts of each kind")
    parser.add_argument("--render", action="store_true", help="write the page again from the kept numbers")
    args = parser.parse_args()
    if not args.render:
        write_json(KEPT, measure(opened(), args.each))
    kept = json.loads(KEPT.read_text("utf-8"))
    draw(kept, FIGURE)
    PAGE.write_text(page(kept), "utf-8")
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
