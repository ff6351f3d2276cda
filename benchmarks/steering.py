"""Do natural steps steer with less change elsewhere? `python -m benchmarks.steering`: two models, four concepts.

Each prompt's next token is steered towards a concept's tokens (`steering_concepts`) by steps in several directions
(`steering_steps`). What is compared is the KL divergence of all other tokens' distribution at the same gain in the
log-odds of the concept's (`steering_measure`). "average": one direction for a concept, made on the choosing half of its
prompts, tested on the other half. "own": each testing prompt has its own direction. The numbers go into
benchmarks/results/steering.json, and from there into docs/steering-study.md (`--render` alone writes the page again).
A run that was stopped carries on.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import steering_page
from benchmarks.steering_concepts import CONCEPTS
from benchmarks.steering_known import (
    HALF,
    LAYERS,
    MADE,
    OWN,
    POINTS,
    POINTS_TRIED,
    TRIED,
    Known,
    Loaded,
    opened,
    rounded,
    swept,
)
from benchmarks.steering_more import AT, EIGHT, NEW, TEXTS, measure_texts, measure_variants
from benchmarks.steering_numbers import DAMPINGS, EUCLID, GAINS, NATURAL, SETTINGS, score
from benchmarks.steering_steps import SEEDS, unit
from benchmarks.timing import machine, write_json
from fisher_vmap.natural import PRODUCTS

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results" / "steering.json"
PAGE = ROOT / "docs" / "steering-study.md"
FIGURE = ROOT / "docs" / "images" / "steering-study.png"
TRIED_AT = 1  # the layer, of the four, at which a damping is chosen; they are tried at the last one too
PARTS = ("dampings", "layers", "variants", "texts")


def try_dampings(known: Known, layer: str) -> dict[str, Any]:
    """On the choosing half: for each setting and damping the off-target KL at each gain on some prompts.

    A direction of the mean is made on the first prompts; it is tried on others.
    """
    made, tried = known.choosing[:MADE], known.choosing[-TRIED:]
    names = [(setting, c) for setting in SETTINGS for c in DAMPINGS]
    found: dict[str, Any] = {f"{setting}/{c:g}": [] for setting, c in names}
    unit_of_mean = known.unit(made, layer)
    mean = {c: known.natural(made, layer, c * unit_of_mean) for c in DAMPINGS}
    for case in tried:
        unit_of_own = known.unit([case], layer)
        own = {c: known.natural([case], layer, c * unit_of_own) for c in DAMPINGS}
        directions = [(mean if setting == "average" else own)[c] for setting, c in names]
        for (setting, c), values in zip(names, swept(known, case, layer, directions, POINTS_TRIED), strict=True):
            found[f"{setting}/{c:g}"].append(rounded(values))
    return found


def measure(known: Known, layer: str, chosen: dict[str, float]) -> dict[str, Any]:
    """On the testing half: the off-target KL at each gain, by each method, for each prompt."""
    directions = known.directions(layer, chosen["average"])
    average: dict[str, list[Any]] = {name: [] for name in directions}
    own: dict[str, list[Any]] = {name: [] for name in (NATURAL, EUCLID)}
    for number, case in enumerate(known.testing):
        mine = {}
        if number < OWN:
            mine[NATURAL] = known.natural([case], layer, chosen["own"] * known.unit([case], layer))
            mine[EUCLID] = unit(known.prompt(case, layer).gradient)
        values = swept(known, case, layer, [*directions.values(), *mine.values()])
        for into, names in ((average, list(directions)), (own, list(mine))):
            for name in names:
                into[name].append(rounded(values.pop(0)))
    return {
        "odds": rounded([float(known.prompt(case, layer).before.odds) for case in known.testing]),
        "average": average, "own": own,
        "cosines": {name: round(float(v @ directions[EUCLID]), 4) for name, v in directions.items()},
        "norm": round(float(np.median([known.stream(case.neutral, layer)[-1].norm() for case in known.testing])), 3),
    }  # fmt: skip


def settings() -> dict[str, Any]:
    """What was fixed beforehand."""
    return {
        "half": HALF, "own": OWN, "made": MADE, "tried": TRIED, "gains": GAINS, "dampings": DAMPINGS, "seeds": SEEDS,
        "furthest": 0.2 * 2 ** (POINTS - 1), "products": PRODUCTS, "steps": EIGHT, "tokens": NEW, "texts": TEXTS,
        "gain": AT,
    }  # fmt: skip


def choose(tries: dict[str, dict[str, Any]]) -> dict[str, float]:
    """For each setting the damping of least off-target KL at gains of 1 to 3 nats, over layers and concepts."""
    scores = {setting: {c: score(tries, f"{setting}/{c:g}") for c in DAMPINGS} for setting in SETTINGS}
    return {setting: min(of, key=lambda c: of[c]) for setting, of in scores.items()}


def run(kept: dict[str, Any], loaded: Loaded, concepts: list[str], parts: list[str]) -> Iterator[str]:
    """Measure what is missing; yields what was done."""
    all_known = {concept: Known(loaded, concept) for concept in concepts}
    model = kept["models"].setdefault(loaded.name, {"tries": {}, "layers": {}, "variants": {}, "texts": {}})
    model["concepts"] = {
        concept: {"tokens": [loaded.tokenizer.decode([t]) for t in known.wanted.tolist()], "example": known.cases[0]}
        for concept, known in all_known.items()
    }
    if "dampings" in parts:
        for layer in (loaded.layers[TRIED_AT], loaded.layers[-1]):
            for concept, known in all_known.items():
                if f"{layer}/{concept}" not in model["tries"]:
                    model["tries"][f"{layer}/{concept}"] = try_dampings(known, layer)
                    yield f"{layer}, {concept}: dampings"
            model.setdefault("chosen", choose(model["tries"]))  # at the first of them
    if "layers" in parts:
        for layer in loaded.layers:
            cells = model["layers"].setdefault(layer, {})
            for concept, known in all_known.items():
                if concept not in cells:
                    cells[concept] = measure(known, layer, model["chosen"])
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
            model["variants"][concept] = measure_variants(known, layer, model["chosen"]["own"])
            yield f"{layer}, {concept}: ranks and steps"
        known.forget(layer)


def texts(model: dict[str, Any], loaded: Loaded, all_known: dict[str, Known]) -> Iterator[str]:
    """Whole texts, at one layer."""
    for layer in loaded.layers[2:3]:
        for concept in ("French", "sentiment"):
            if concept in all_known and f"{layer}/{concept}" not in model["texts"]:
                damping = model["chosen"]["average"]
                model["texts"][f"{layer}/{concept}"] = measure_texts(all_known[concept], layer, damping)
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
        kept |= {"machine": machine(), "settings": settings()}
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
