"""Rows of `benchmarks.compare` that time the whole job by the package and by loops of backward passes."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.agreement import agreement, assert_same_log_probs
from benchmarks.baselines import (
    bare_forward,
    careful_loop,
    careful_pipeline,
    padded_left,
    plain_pipeline,
    with_compiled_blocks,
)
from benchmarks.claims import RANK, TOP_K, Asked, Choices, Line, Outcome
from benchmarks.package_job import package_loop, package_pipeline, package_run
from benchmarks.timing import Timed, by_turns
from benchmarks.workloads import Batch, Workload, heavy_tail, last_of, padded, uniform
from fisher_vmap import FisherModel

ARRIVAL_BATCH = 8


def against_loops(
    workload: Workload, batch: Batch, number: int, rounds: int, careful: Asked, plain: Asked | None
) -> Outcome:
    """The whole job, from token ids to rank-10 matrices: by the package and by one or both of the loops."""
    model, layer = workload.model, workload.layer(number)
    functions: dict[str, Callable[[], Any]] = {
        "ours": partial(package_pipeline, model, batch, layer, TOP_K, RANK),
        "careful": partial(careful_pipeline, model, *batch, layer, TOP_K, RANK),
    }
    if plain is not None:
        functions["plain"] = partial(plain_pipeline, model, *batch, layer, TOP_K, RANK)
    timed = by_turns(functions, rounds)
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


def smollm2_row(number: int, careful: Asked, plain: Asked | None, choices: Choices) -> Outcome:
    """SmolLM2 and eight chat prompts."""
    workload = choices.smollm2()
    return against_loops(workload, choices.chat(workload), number, choices.rounds, careful, plain)


def compiled_loop_row(choices: Choices) -> Outcome:
    """The careful loop once its blocks are compiled, which no claim is made about but a reader will ask for."""
    workload = choices.smollm2()
    batch, layer = choices.chat(workload), workload.layer(15)
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
    workload = choices.qwen()
    return against_loops(workload, uniform(workload, 8, 64), 3, choices.rounds, Asked(True, 1.1), None)


def last_position_row(over_last: Asked, over_forward: Asked, choices: Choices) -> Outcome:
    """SmolLM2 and eight prompts of 64 tokens: the last position alone, beside all and beside a forward pass."""
    workload = choices.smollm2()
    batch = uniform(workload, 8, 64)
    timed, record = against_forward(workload, batch, {"all": (15, "all"), "last": (15, "last")}, choices.rounds)
    lines = [
        Line("all / last", over_last, timed.ratio("all", "last")),
        Line("last / bare forward", over_forward, timed.ratio("last", "forward")),
    ]
    return lines, record


def against_forward(
    workload: Workload, batch: Batch, jobs: Mapping[str, tuple[int, str]], rounds: int
) -> tuple[Timed, dict[str, Any]]:
    """The package's scores of some blocks and positions by turns with a forward pass; all are checked afterwards.

    Args:
        workload, batch: the model and its prompts.
        jobs: for each name in the result, the number of the hooked block and where the bias is added.
        rounds: as of `by_turns`.
    """
    model, left = workload.model, padded_left(*batch)
    functions: dict[str, Callable[[], Any]] = {"forward": partial(bare_forward, model, *left)}
    for name, (number, positions) in jobs.items():
        functions[name] = partial(package_loop, model, batch, workload.layer(number), TOP_K, positions=positions)
    timed = by_turns(functions, rounds)
    agreements: dict[str, Any] = {}
    for name, (number, positions) in jobs.items():
        layer, where = workload.layer(number), None if positions == "all" else last_of(batch)
        careful, found = careful_loop(model, *batch, layer, TOP_K, where=where), timed.outputs[name]
        agreements[name] = agreement(model, batch, layer, {name: found}, careful, where) | {
            "log p, largest distance from the forward's": assert_same_log_probs(timed.outputs["forward"], found)
        }
    record = {
        "model": workload.name,
        "precision": workload.precision.stored(),
        "jobs": {
            name: {"layer": workload.layer(number), "positions": positions}
            for name, (number, positions) in jobs.items()
        },
        "batch": batch.describe(),
        "seconds": timed.seconds,
        "agreement": agreements,
    }
    return timed, record


def heavy_tail_row(choices: Choices) -> Outcome:
    """128 prompts of very unequal length: the loop takes them by eights as they come, a run sorts and packs them.

    The second line gives the loop all prompts sorted by length, and so takes most of the padding out of the comparison.
    """
    workload = choices.smollm2()
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
