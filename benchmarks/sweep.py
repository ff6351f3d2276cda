"""`python -m benchmarks.sweep`: where the kernel gains and where it does not, over sizes, one axis at a time.

Around one cell (8 prompts of 64 tokens, K = 10, hooked in the middle) each axis is walked alone: the batch, the length,
K, the layer. The axes take turns, so that a run that its time limit ends has something of each. Every cell is a line of
JSON: the seconds of every way of computing the scores, and why a way was left out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.agreement import distances
from benchmarks.baselines import Loop, careful_loop, plain_loop
from benchmarks.package_job import package_loop
from benchmarks.timing import by_turns, machine, measurement_flags, once, parsed
from benchmarks.todays_shapes import SHAPES, todays_shape
from benchmarks.workloads import Batch, Workload, middle, qwen2_shape, small_llama, smollm2, uniform
from fisher_vmap import fisher_scores

WAYS = ("package", "careful", "layerwise", "whole", "loop", "plain")
MOST_TOKENS = 512  # of a batch on the axis of lengths, except for a single prompt
WRONG = 0.3  # relative distance: rounding in bfloat16 stays below it, a wrong chain of blocks does not


class Cell(NamedTuple):
    """One point of the sweep."""

    axis: str
    prompts: int
    tokens: int
    top_k: int
    layer: int


def cells(blocks: int) -> Iterator[Cell]:
    """The cells, the axes by turns, each from small to large."""
    centre = Cell("centre", prompts=8, tokens=64, top_k=10, layer=middle(blocks))
    axes = [
        [centre._replace(axis="batch", prompts=n) for n in (1, 2, 4, 16, 32)],
        [
            centre._replace(axis="length", tokens=n, prompts=max(1, min(8, MOST_TOKENS // n)))
            for n in (16, 32, 128, 256, 512, 1024, 2048)
        ],
        [centre._replace(axis="top_k", top_k=n) for n in (1, 4, 16, 32, 64)],
        [centre._replace(axis="layer", layer=n) for n in (blocks - 1, blocks - 2, blocks // 10)],
    ]
    yield centre
    yield from (cell for cell in chain.from_iterable(zip_longest(*axes)) if cell is not None)


def ways(workload: Workload, batch: Batch, cell: Cell) -> dict[str, Callable[[], Loop]]:
    """Every way to compute a cell's scores."""
    model, layer = workload.model, workload.layer(cell.layer)
    forms = {"package": "auto", "layerwise": "layerwise", "whole": "whole", "loop": "loop"}
    return {
        "careful": partial(careful_loop, model, *batch, layer, cell.top_k),
        "plain": partial(plain_loop, model, *batch, layer, cell.top_k),
        **{name: partial(package_loop, model, batch, layer, cell.top_k, form) for name, form in forms.items()},
    }


class Costs:
    """What each way was seen to take, and so what it may be expected to take in a larger cell."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._rates: dict[str, float] = {}

    def expected(self, way: str, cell: Cell) -> float:
        """Seconds of one call; 0 where nothing is known."""
        return self._rates.get(way, 0.0) * self._work(way, cell)

    def saw(self, way: str, cell: Cell, seconds: float) -> None:
        """Remember a call."""
        self._rates[way] = seconds / self._work(way, cell)

    def _work(self, way: str, cell: Cell) -> int:
        """Passes times tokens times blocks: a forward pass and K pullbacks, or as many for every prompt."""
        passes = cell.top_k * (cell.prompts if way == "plain" else 1)
        return cell.prompts * cell.tokens * (self._blocks + passes * (self._blocks - cell.layer))


def measure(
    workload: Workload, cell: Cell, costs: Costs, asked: Sequence[str], rounds: int, most: float, left: float
) -> dict[str, Any]:
    """The seconds of every way asked for that should take at most `most` a call and fit into the time left."""
    batch = uniform(workload, cell.prompts, cell.tokens)
    chosen, skipped = {}, {}
    began = time.perf_counter()
    for way, function in ways(workload, batch, cell).items():
        if way not in asked:
            continue
        expected = costs.expected(way, cell)
        if expected > most or expected * (rounds + 1) > left - (time.perf_counter() - began):
            skipped[way] = f"expected to take {expected:.0f} s a call"
            continue
        try:
            function()  # the first call of a size may prove, compile and allocate
            seconds, _output = once(function)
        except torch.OutOfMemoryError:
            skipped[way] = "out of memory"
            continue
        costs.saw(way, cell, seconds)
        if seconds > most:
            skipped[way] = f"took {seconds:.0f} s a call"
        else:
            chosen[way] = function
    timed = by_turns(chosen, rounds, warmup=0)
    record: dict[str, Any] = {"cell": cell._asdict(), "seconds": timed.seconds, "skipped": skipped}
    if "careful" in chosen:
        record["careful_over"] = {
            way: statistics.median(a / b for a, b in zip(timed.seconds["careful"], seconds, strict=True))
            for way, seconds in timed.seconds.items()
            if way != "careful"
        }
        if "package" in chosen:
            record["distance"] = _distance(workload, batch, cell, timed.outputs["careful"])
    return record


def _distance(workload: Workload, batch: Batch, cell: Cell, careful: Loop) -> float:
    """How far the package is from the careful loop at the loop's own tokens: the median over the prompts."""
    layer = workload.layer(cell.layer)
    scores = fisher_scores(workload.model, *batch, layers=layer, token_ids=careful.token_ids)
    found = float(distances(Loop(scores.log_probs, scores.token_ids, scores.gradients[layer]), careful).median())
    assert found <= WRONG, f"{cell}: scores are {found:.2f} from the careful loop's"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    models: dict[str, Callable[..., Workload]] = {"smollm2": smollm2, "qwen2": qwen2_shape, "small": small_llama}
    models |= {name: partial(todays_shape, name) for name in SHAPES}
    parser.add_argument("--model", choices=models, default="smollm2", metavar="NAME", help=", ".join(models))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is timed (default: all)")
    parser.add_argument("--budget", type=float, default=900, help="seconds after which no cell is begun (default 900)")
    parser.add_argument("--most", type=float, default=15, help="seconds that one call may take (default 15)")
    parser.add_argument("--axes", nargs="+", choices=("batch", "length", "top_k", "layer"))
    parser.add_argument("--all-blocks", action="store_true", help="of a shape of today's models, not four blocks alone")
    parser.add_argument("--dtype", default="bfloat16")
    measurement_flags(parser, rounds=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sweep.jsonl"))
    args = parsed(parser)
    if args.all_blocks and args.model not in SHAPES:
        parser.error(f"--all-blocks is for {', '.join(SHAPES)}; {args.model} has all of its blocks")
    more = {"all_blocks": True} if args.all_blocks else {}
    workload = models[args.model](dtype=args.dtype, device=args.device, precision=args.precision, **more)
    costs, began = Costs(workload.blocks), time.perf_counter()
    todo = [cell for cell in cells(workload.blocks) if not args.axes or cell.axis in (*args.axes, "centre")]
    positions = workload.model.config.max_position_embeddings
    too_long = [cell for cell in todo if cell.tokens > positions]
    todo = [cell for cell in todo if cell not in too_long]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as out:
        out.write(
            json.dumps(
                {
                    "machine": machine(),
                    "model": workload.name,
                    "dtype": args.dtype,
                    "precision": workload.precision.stored(),
                    "ways": args.ways,
                    "positions": positions,
                    "too_long": [cell._asdict() for cell in too_long],
                }
            )
            + "\n"
        )
        for number, cell in enumerate(todo):
            left = args.budget - (time.perf_counter() - began)
            if left <= 0:
                out.write(json.dumps({"not_begun": [cell._asdict() for cell in todo[number:]]}) + "\n")
                print(f"the time limit left {len(todo) - number} cells undone")
                break
            record = measure(workload, cell, costs, args.ways, args.rounds, args.most, left)
            out.write(json.dumps(record) + "\n")
            out.flush()
            print(_line(record), flush=True)


def _line(record: dict[str, Any]) -> str:
    cell = record["cell"]
    head = (
        f"{cell['axis']:7} B={cell['prompts']:<3} T={cell['tokens']:<5} K={cell['top_k']:<3} layer {cell['layer']:<3}"
    )
    return head + "".join(
        f" {way} {statistics.median(record['seconds'][way]):.3f} s" for way in WAYS if way in record["seconds"]
    )


if __name__ == "__main__":
    main()
