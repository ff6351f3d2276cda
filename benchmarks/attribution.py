"""Which tokens does the next token hang on? `python -m benchmarks.attribution`: several ways to tell, put to the test.

Texts with a cue far before the word that it decides (`attribution_texts`), SmolLM2 in float32. The top tenth of the
tokens, by each method, is taken out of the text, and the log-probability of what was the likeliest next token is read
again. The numbers go into benchmarks/results/attribution.json, and from there into docs/attribution.md (`--render`
alone writes the page and its figure again). Fisher scope is computed by the package, everything else by plain autograd.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.attribution_page import LEAST, METHODS, REMOVALS, SIGNED, draw, good, page
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
AT_ONCE = 8  # points of the path in one pass

_NET: "Opened | None" = None  # of a worker


class Opened(NamedTuple):
    """The model, its embedding of every token, and what stands in for a removed token."""

    workload: Workload
    embedding: Tensor
    mean: Tensor

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
    return Opened(workload, embedding, embedding.mean(0))


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
    """g . x with its sign: what speaks for the token is positive."""
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


WAYS: dict[str, Callable[[Opened, Case], Tensor]] = {
    "Fisher scope": fisher_scope,
    "Fisher scope, one token": one_token,
    "gradient x input": gradient_x_input,
    "integrated gradients": integrated_gradients,
    "random": random,
}


def drops(net: Opened, case: Case, removed: list[list[int]]) -> dict[str, list[float]]:
    """How many nats the token's log p loses by each way of removal, for each list of removed places."""
    x, T = net.embed(case.ids), len(case.ids)
    replaced = x.repeat(len(removed), 1, 1)
    for row, places in zip(replaced, removed, strict=True):
        row[places] = net.mean
    shorter = [x[[i for i in range(T) if i not in places]] for places in removed]
    with torch.no_grad():
        log_p = torch.cat([net.log_p(replaced), net.log_p(torch.stack(shorter))])[:, case.top]
    lost = (case.log_p - log_p).view(len(REMOVALS), len(removed)).tolist()
    return {way: [round(nats, 5) for nats in of] for way, of in zip(REMOVALS, lost, strict=True)}


def measured(net: Opened, text: Text) -> dict[str, Any]:
    """Every method on a text, as plain numbers; nothing if the model does not say the cue next."""
    case = case_of(net, text)
    if case is None:
        return {}
    T, scores, seconds = len(case.ids), dict[str, Tensor](), dict[str, float]()
    n = max(1, T // SHARE)
    for name, way in WAYS.items():
        began = time.process_time()
        scores[name] = way(net, case)
        seconds[name] = round(time.process_time() - began, 3)
    total = float(scores["integrated gradients"].sum())
    scores |= {f"{name}, unsigned": scores[name].abs() for name in SIGNED}
    # The last position is where the distribution is read: it is left in place for all methods.
    order = {name: scores[name][: T - 1].argsort(descending=True).tolist() for name in METHODS}
    lost = drops(net, case, [order[name][:n] for name in METHODS])
    with torch.no_grad():
        start = float(net.log_p(net.mean.expand(1, T, -1))[0, case.top])
    return {
        "text": text.text, "cue": text.cue, "tokens": T, "cue_at": case.cue, "removed": n,
        "p": round(float(np.exp(case.log_p)), 5),
        "rank": {name: order[name].index(case.cue) + 1 for name in METHODS},
        "drop": {name: {way: lost[way][i] for way in REMOVALS} for i, name in enumerate(METHODS)},
        "seconds": seconds,
        "integration_gap": round(total / (case.log_p - start) - 1, 5),
    }  # fmt: skip


def check(net: Opened, case: Case) -> None:
    """The package's numbers are plain autograd's: of one token, p |g|^2 at each position."""
    scores = fisher_scores(
        net.workload.model, case.ids[None], layers=LAYER, token_ids=torch.tensor([[case.top]]), precision="model"
    )
    torch.testing.assert_close(scores.position_energy[LAYER][0], one_token(net, case), rtol=1e-3, atol=1e-6)


def begin() -> None:
    """Open the model in a worker, on one thread, and prove the package's form there before any clock runs."""
    global _NET
    torch.set_num_threads(1)
    _NET = opened()
    case = next(case for text in texts("colour") if (case := case_of(_NET, text)) is not None)
    check(_NET, case)


def work(kind: str, number: int) -> dict[str, Any]:
    """What is measured on the text of a kind with this number."""
    assert _NET is not None
    return {"kind": kind, "number": number, **measured(_NET, next(islice(texts(kind), number, None)))}


def task(rows: list[dict[str, Any]], each: int, begun: set[tuple[str, int]]) -> tuple[str, int] | None:
    """The next text to be measured, of the kind that has fewest: its kind and number; None if there are enough."""
    done = {(row["kind"], row["number"]) for row in rows}
    good = Counter(row["kind"] for row in rows if "p" in row)
    good.update(kind for kind, _ in begun)  # if they turn out so
    kind = min(KINDS, key=lambda kind: good[kind])
    return None if good[kind] >= each else (kind, next(n for n in count() if (kind, n) not in done | begun))


def fill(kept: dict[str, Any], each: int, workers: int, until: float) -> None:
    """Measure until there are `each` texts of every kind that the model completes by their cue, or the time is up.

    `kept["texts"]` has a row for each text, by kind and number, without numbers for one that is not completed so.
    """
    with ProcessPoolExecutor(workers, get_context("spawn"), begin) as pool:
        running: dict[Future[Any], tuple[str, int]] = {}
        while True:
            while len(running) < workers and time.monotonic() < until:
                wanted = task(kept["texts"], each, set(running.values()))
                if wanted is None:
                    break
                running[pool.submit(work, *wanted)] = wanted
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                kept["texts"].append(row := done.result())
                print(len(kept["texts"]), row["kind"], row["number"], row.get("tokens"), row.get("rank"), flush=True)
            write_json(KEPT, kept)


def main() -> None:
    """Measure what is missing, keep the numbers, write the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=10, help="texts of each kind")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no new text after this time")
    parser.add_argument("--render", action="store_true", help="write the page again from the kept numbers")
    args = parser.parse_args()
    kept = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {"texts": []}
    if not args.render:
        kept |= {"machine": machine(), "model": "SmolLM2-135M", "top_k": TOP_K, "steps": STEPS, "share": SHARE}
        fill(kept, args.each, args.workers, time.monotonic() + args.seconds)
        kept["texts"].sort(key=lambda row: (list(KINDS).index(row["kind"]), row["number"]))
        write_json(KEPT, kept)
    if len(good(kept)) >= LEAST:
        draw(kept, FIGURE)
    PAGE.write_text(page(kept), "utf-8")
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
