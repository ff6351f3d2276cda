"""`python -m benchmarks.compare`: what the package claims about its speed and memory, beside what this machine shows.

Each row is a claim of its own and can be run by its name. Whatever a row compares is timed by turns in one run, and
the results of what was timed are compared afterwards. The raw times go to the JSON file, with hardware and versions.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak_memory, roofline
from benchmarks.claims import HEADING, RANK, TOP_K, Asked, Choices, Line, Outcome
from benchmarks.loop_rows import compiled_loop_row, heavy_tail_row, last_position_row, qwen_row, smollm2_row
from benchmarks.timing import Ratio, by_turns, machine, measurement_flags, parsed, write_json
from benchmarks.workloads import smollm2_file, uniform
from fisher_vmap import FisherModel

LONG_PROMPT = 2048


def floor_row(choices: Choices) -> Outcome:
    """Time over the floor, hooked in the middle."""
    small, large = choices.smollm2(), choices.qwen()
    jobs = [(small, choices.chat(small), 15), (large, uniform(large, 8, 64), 3)]
    records = [roofline.measure(*job, TOP_K, choices.rounds) for job in jobs]
    ratios = [Ratio(**record["time_over_floor"]) for record in records]
    lines = [Line(f"{job[0].name}: time / floor", Asked(False, 1.3, 2), r) for job, r in zip(jobs, ratios, strict=True)]
    return lines, {"measurements": records}


def all_layers_row(choices: Choices) -> Outcome:
    """Every layer's matrices in one pass, over those of the lowest layer alone."""
    workload = choices.smollm2()
    prompts = [
        ids[:length].tolist()
        for ids, length in zip(choices.chat(workload).input_ids, choices.chat(workload).lengths, strict=True)
    ]
    every = FisherModel(workload.model, layers="all", top_k=TOP_K)
    lowest = FisherModel(workload.model, layers=0, top_k=TOP_K)
    timed = by_turns(
        {"all": lambda: every.numbers(prompts, RANK), "lowest": lambda: lowest.numbers(prompts, RANK)}, choices.rounds
    )
    for together, alone in zip(timed.outputs["all"], timed.outputs["lowest"], strict=True):
        (layer,) = alone.layers
        first, second = torch.tensor(together.layers[layer].S), torch.tensor(alone.layers[layer].S)
        assert (first - second).norm() <= 1e-2 * second.norm(), "the sweep's matrices differ from the single layer's"
    line = Line("all layers / lowest alone", Asked(False, 1.15), timed.ratio("all", "lowest"))
    return [line], {"model": workload.name, "seconds": timed.seconds}


def peak_memory_row(choices: Choices) -> Outcome:
    """One prompt of 2,048 tokens: what the package holds above the weights, over what a forward pass holds."""
    lines, record = [], {}
    for model, layer in (("smollm2", 15), ("qwen2", 3)):
        if model == "smollm2" and smollm2_file() is None:
            continue
        added = {
            call: [
                peak_memory.in_fresh_process(call, model, layer, LONG_PROMPT, TOP_K, choices.device)
                for _ in range(min(3, choices.rounds))
            ]
            for call in peak_memory.CALLS
        }
        record[model] = added
        lines.append(Line(f"{model}: ours / forward", Asked(False, 4), Ratio.of(added["package"], added["forward"])))
        lines.append(
            Line(f"{model}: careful loop / forward", Asked(False, None), Ratio.of(added["careful"], added["forward"]))
        )
    return lines, {"bytes_above_the_weights": record}


ROWS: dict[str, Callable[[Choices], Outcome]] = {
    "smollm2-layer15": partial(smollm2_row, 15, Asked(True, 1.8, 6), Asked(True, 16, 200)),
    "smollm2-layer28": partial(smollm2_row, 28, Asked(True, 3), None),
    "smollm2-layer29": partial(smollm2_row, 29, Asked(True, 1.2), Asked(True, 30)),
    "compiled-loop": compiled_loop_row,
    "qwen-8-layers": qwen_row,
    "last-position": partial(last_position_row, Asked(True, 5), Asked(False, 1.35)),
    "floor": floor_row,
    "all-layers": all_layers_row,
    "heavy-tail": heavy_tail_row,
    "peak-memory": peak_memory_row,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--mixed", action="store_true", help="chat prompts of 31 to 240 tokens instead of 44 to 76")
    measurement_flags(parser)
    parser.add_argument("--json", type=Path)
    args = parsed(parser)
    choices = Choices(args.device, args.rounds, args.mixed, args.precision)
    written: dict[str, Any] = {"machine": machine(), "choices": choices._asdict(), "rows": {}}
    print(HEADING)
    for name in args.rows:
        try:
            lines, record = ROWS[name](choices)
        except FileNotFoundError as error:
            print(f"{name:16} left out: {error}", file=sys.stderr)
            continue
        for line in lines:
            print(line.text(name), flush=True)
        written["rows"][name] = record | {"ratios": [line.stored() for line in lines]}
        write_json(args.json, written)


if __name__ == "__main__":
    main()
