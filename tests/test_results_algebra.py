"""Means, directions and contrasts of a results folder against dense matrices, and in memory that stays flat."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from results_cases import (
    factor,
    make_layout,
    make_prompt,
    no_power_cuts,  # noqa: F401 (a fixture)
    open_writer,
    write_folder,
)

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.results import open_results

WIDTHS = {"a": 9, "b": 6}
OK = [i for i in range(12) if i not in (2, 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_folder(folder, 12, make_layout(WIDTHS, keep_columns=("kind",)))
    return open_results(folder)


def dense(results, index, layer="a"):
    record = results.at(layer)[index]
    V = record.V.astype(np.float64)
    return V.T @ (record.S.astype(np.float64)[:, None] * V)


def mean_of(results, chosen, layer="a"):
    return np.mean([dense(results, i, layer) for i in chosen], axis=0)


def test_records_know_their_algebra(results):
    one, other = results[0], results[1]
    F, G = dense(results, 0), dense(results, 1)
    x = np.random.default_rng(0).normal(size=9)
    np.testing.assert_allclose(one.quadratic(x), x @ F @ x, rtol=1e-9)
    np.testing.assert_allclose(one.cosine(other), np.trace(F @ G) / np.linalg.norm(F) / np.linalg.norm(G), rtol=1e-5)
    np.testing.assert_allclose(one.trades(), one.scores() @ one.V.T, rtol=1e-4, atol=1e-5)


def test_trades_are_the_scores_along_the_directions(results):
    A, log_probs = factor(4, 0, 4, 9)
    gradients = A / np.exp(0.5 * log_probs.astype(np.float64))[:, None]
    np.testing.assert_allclose(results[4].trades(), gradients @ results[4].V.T, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("layer", WIDTHS)
def test_directions_of_a_group(results, layer):
    group = [i for i in OK if i % 2]
    found = results.directions(4, layer=layer, where={"kind": "kind 1"})
    values = np.linalg.eigvalsh(mean_of(results, group, layer))[::-1]
    np.testing.assert_allclose(found.S, values[:4], rtol=1e-5)
    np.testing.assert_allclose(mean_of(results, group, layer) @ found.V.T, found.V.T * found.S, atol=1e-4)
    with pytest.raises(ValueError, match="a mean over no prompts is NaN"):
        results.directions(4, where=lambda row: False)


@pytest.mark.parametrize("against", [None, lambda row: row["prompt_index"] in (0, 4)])
def test_contrast_of_two_groups(results, against):
    inside = [i for i in OK if i % 2]
    outside = [i for i in OK if not i % 2] if against is None else [0, 4]
    A, B = mean_of(results, inside), mean_of(results, outside)
    found = results.contrast({"kind": "kind 1"}, against, rank=3, ridge=0.05)
    r = 0.05 * np.trace(B) / 9
    expected = scipy.linalg.eigh(A, B + r * np.eye(9), eigvals_only=True)[::-1][:3]
    np.testing.assert_allclose(found.ratios, expected, rtol=1e-6)
    np.testing.assert_allclose(found.inside, [v @ A @ v for v in found.directions], rtol=1e-6)
    with pytest.raises(UserError, match="no column 'sort'"):
        results.contrast({"sort": 1})


def test_stacks_of_a_group(results):
    every, some = results.stack("b"), results.stack("b", where={"kind": "kind 1"})
    odd = [i for i in range(12) if i % 2 and i not in (2, 3)]
    for whole, part in zip(every, some, strict=True):
        np.testing.assert_array_equal(whole[odd], part)
    assert results.stack(where=lambda row: False).V.shape == (0, 3, 9)
    np.testing.assert_allclose(
        algebra.cosines(some)[0, 1], results.at("b")[odd[0]].cosine(results.at("b")[odd[1]]), rtol=1e-6
    )


def many_prompts(folder, count):
    """The same few matrices over and over, so that writing them takes no time."""
    layout = make_layout({"a": 64}, top_k=4, rank=4)
    few = [make_prompt(i, layout) for i in range(7)]
    writer = open_writer(folder, layout, shard_size=32)
    for number, start, stop in writer.missing_shards(count):
        writer.add(number, [replace(few[i % 7], index=i) for i in range(start, stop)])
    return open_results(folder, allow_incomplete=True), [prompt.layers["a"] for prompt in few]


def peak_of(call):
    call()
    tracemalloc.start()
    found = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, peak


def test_the_mean_of_ten_thousand_prompts_takes_no_more_memory(tmp_path):
    peaks = {}
    for count in (1000, 10_000):
        results, few = many_prompts(tmp_path / str(count), count)
        mask = np.arange(count) % 3 == 0
        mean, peaks[count] = peak_of(lambda results=results, mask=mask: results.mean(where=mask))
        matrices = [(layer.V.T * layer.S) @ layer.V for layer in few]
        expected = np.mean([matrices[i % 7] for i in range(0, count, 3)], axis=0)
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
    print(peaks)
    assert peaks[10_000] < 1.3 * peaks[1000]  # what grows is the list of shards; the vectors are 10 MB and 1 MB
