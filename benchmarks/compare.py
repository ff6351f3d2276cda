"""`python -m benchmarks.compare`: what the package claims about its speed and memory, beside what this machine shows.

Each row is a claim of its own and can be run by its name. Whatever a row compares is timed by turns in one run, and
the results of what was timed are compared afterwards. The raw times go to the JSON file, with hardware and versions.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import peak_memory, roofline
from benchmarks.agreement import agreement
from benchmarks.baselines import careful_pipeline, plain_pipeline, with_compiled_blocks
from benchmarks.package_job import package_pipeline, package_run
from benchmarks.timing import Ratio, by_turns, machine
from benchmarks.workloads import Batch, Workload, chat, heavy_tail, padded, qwen2_shape, smollm2, smollm2_file, uniform
from fisher_vmap import FisherModel

TOP_K = RANK = 10
LONG_PROMPT = 2048
ARRIVAL_BATCH = 8


class Asked(NamedTuple):
    """The bound of a claim, as text and number, on a CPU and on a large GPU; None where nothing was claimed."""

    at_least: bool
    cpu: float | None
    cuda: float | None = None

    def __str__(self) -> str:
        bound = self.cuda if torch.cuda.is_available() else self.cpu
        return "" if bound is None else f"{'at least' if self.at_least else 'at most'} {bound:g}"

    def met(self, value: float) -> bool | None:
        """Whether a value keeps to the bound; None where there is none."""
        bound = self.cuda if torch.cuda.is_available() else self.cpu
        return None if bound is None else (value >= bound if self.at_least else value <= bound)


class Choices(NamedTuple):
    """What the command line says of every row."""

    device: str
    rounds: int
    mixed: bool


class Line(NamedTuple):
    """One line of the table."""

    what: str
    asked: Asked
    ratio: Ratio


Outcome = tuple[list[Line], dict[str, Any]]


@cache
def _smollm2(device: str) -> Workload:
    return smollm2(device=device)


@cache
def _qwen(device: str) -> Workload:
    return qwen2_shape(8, device=device)


def _against_loops(
    workload: Workload, batch: Batch, number: int, choices: Choices, careful: Asked, plain: Asked | None
) -> Outcome:
    """The whole job, from token ids to rank-10 matrices: by the package and by one or both of the loops."""
    model, layer = workload.model, workload.layer(number)
    functions: dict[str, Callable[[], Any]] = {
        "ours": partial(package_pipeline, model, batch, layer, TOP_K, RANK),
        "careful": partial(careful_pipeline, model, *batch, layer, TOP_K, RANK),
    }
    if plain is not None:
        functions["plain"] = partial(plain_pipeline, model, *batch, layer, TOP_K, RANK)
    timed = by_turns(functions, choices.rounds)
    lines = [Line("careful / ours", careful, timed.ratio("careful", "ours"))]
    if plain is not None:
        lines.insert(0, Line("plain / ours", plain, timed.ratio("plain", "ours")))
    scores = {name: output.scores for name, output in timed.outputs.items()}
    loop = scores.pop("careful")
    record = {
        "model": workload.name,
        "layer": layer,
        "batch": batch.describe(),
        "seconds": timed.seconds,
        "agreement": agreement(model, batch, layer, scores, loop),
    }
    return lines, record


def _chat(workload: Workload, choices: Choices) -> Batch:
    return chat(workload, start=0, step=8) if choices.mixed else chat(workload)


def smollm2_row(number: int, careful: Asked, plain: Asked | None, choices: Choices) -> Outcome:
    """SmolLM2 and eight chat prompts."""
    workload = _smollm2(choices.device)
    return _against_loops(workload, _chat(workload, choices), number, choices, careful, plain)


def compiled_loop_row(choices: Choices) -> Outcome:
    """The careful loop once its blocks are compiled, which no claim is made about but a reader will ask for."""
    workload = _smollm2(choices.device)
    batch, layer = _chat(workload, choices), workload.layer(15)
    compiled = with_compiled_blocks(workload.model)
    timed = by_turns(
        {
            "ours": partial(package_pipeline, workload.model, batch, layer, TOP_K, RANK),
            "compiled": partial(careful_pipeline, compiled, *batch, layer, TOP_K, RANK),
        },
        choices.rounds,
    )
    line = Line("careful, blocks compiled / ours", Asked(True, None), timed.ratio("compiled", "ours"))
    return [line], {"model": workload.name, "layer": layer, "batch": batch.describe(), "seconds": timed.seconds}


def qwen_row(choices: Choices) -> Outcome:
    """A model whose products are so large that a loop on a CPU already runs at the products' own speed."""
    workload = _qwen(choices.device)
    return _against_loops(workload, uniform(workload, 8, 64), 3, choices, Asked(True, 1.1), None)


def floor_row(choices: Choices) -> Outcome:
    """Time over the floor, hooked in the middle."""
    small, large = _smollm2(choices.device), _qwen(choices.device)
    jobs = [(small, _chat(small, choices), 15), (large, uniform(large, 8, 64), 3)]
    records = [roofline.measure(*job, TOP_K, choices.rounds) for job in jobs]
    ratios = [Ratio(**record["time_over_floor"]) for record in records]
    lines = [Line(f"{job[0].name}: time / floor", Asked(False, 1.3, 2), r) for job, r in zip(jobs, ratios, strict=True)]
    return lines, {"measurements": records}


def all_layers_row(choices: Choices) -> Outcome:
    """Every layer's matrices in one pass, over those of the lowest layer alone."""
    workload = _smollm2(choices.device)
    prompts = [
        ids[:length].tolist()
        for ids, length in zip(_chat(workload, choices).input_ids, _chat(workload, choices).lengths, strict=True)
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


def heavy_tail_row(choices: Choices) -> Outcome:
    """128 prompts of very unequal length: the loop takes them by eights as they come, a run sorts and packs them.

    The second line gives the loop all prompts sorted by length, and so takes most of the padding out of the comparison.
    """
    workload = _smollm2(choices.device)
    model, layer, prompts = workload.model, workload.layer(15), heavy_tail(workload)
    fisher = FisherModel(model, layers=layer, top_k=TOP_K)

    def ours() -> list[Any]:
        return package_run(fisher, prompts, RANK)

    def careful(places: list[list[int]]) -> list[Any]:
        batches = [padded([prompts[i] for i in some], model.device) for some in places]
        return [careful_pipeline(model, *batch, layer, TOP_K, RANK) for batch in batches]

    arrival = _eights(range(len(prompts)))
    by_length = _eights(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    package_run(fisher, prompts[:4], RANK)  # the probe, and one small batch of each, in place of a whole warm-up
    careful([[0, 1, 2, 3]])
    timed = by_turns(
        {"ours": ours, "careful": lambda: careful(arrival), "careful, sorted": lambda: careful(by_length)},
        max(1, choices.rounds // 3),
        warmup=0,
    )
    traces = torch.cat([found.singular_values.sum(1) for found in timed.outputs["careful"]]).cpu()
    own_traces = torch.tensor([float(numbers.layers[layer].S.sum()) for numbers in timed.outputs["ours"]])
    distance = float(((own_traces - traces).abs() / traces).median())
    assert distance <= 0.15, f"the median trace of F differs by {distance:.2f}"
    record = {
        "model": workload.name,
        "layer": layer,
        "prompts": len(prompts),
        "real_tokens": sum(map(len, prompts)),
        "padded_tokens": {"arrival": _with_padding(prompts, arrival), "sorted": _with_padding(prompts, by_length)},
        "seconds": timed.seconds,
        "median_distance_of_traces": distance,
    }
    lines = [
        Line("careful / ours", Asked(True, 2.5), timed.ratio("careful", "ours")),
        Line("careful, all sorted by length / ours", Asked(True, None), timed.ratio("careful, sorted", "ours")),
    ]
    return lines, record


def _eights(places: Sequence[int]) -> list[list[int]]:
    return [list(places[i : i + ARRIVAL_BATCH]) for i in range(0, len(places), ARRIVAL_BATCH)]


def _with_padding(prompts: list[list[int]], batches: list[list[int]]) -> int:
    return sum(len(some) * max(len(prompts[i]) for i in some) for some in batches)


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
    "floor": floor_row,
    "all-layers": all_layers_row,
    "heavy-tail": heavy_tail_row,
    "peak-memory": peak_memory_row,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed", action="store_true", help="chat prompts of 31 to 240 tokens instead of 44 to 76")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    choices = Choices(args.device, args.rounds, args.mixed)
    written: dict[str, Any] = {"machine": machine(), "choices": choices._asdict(), "rows": {}}
    print(f"{'row':16} {'ratio':44} {'asked':14} measured: median of rounds (extremes)")
    for name in args.rows:
        try:
            lines, record = ROWS[name](choices)
        except FileNotFoundError as error:
            print(f"{name:16} left out: {error}", file=sys.stderr)
            continue
        for line in lines:
            verdict = {True: "", False: "  <- not met", None: ""}[line.asked.met(line.ratio.median)]
            print(f"{name:16} {line.what:44} {line.asked!s:14} {line.ratio}{verdict}", flush=True)
        written["rows"][name] = record | {
            "ratios": [
                {"what": line.what, "asked": str(line.asked), "measured": line.ratio._asdict()} for line in lines
            ]
        }
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
