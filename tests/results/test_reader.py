"""Means, directions and contrasts of a results folder against dense matrices, and in memory that stays flat."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
from results_cases import factor, make_layout, make_prompt, open_writer, write_folder

from fisher_vmap import algebra
from fisher_vmap.errors import UserError
from fisher_vmap.results.reader import open_results

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
    with pytest.raises(ValueError, match="no prompt is chosen, of 12"):
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


def test_a_group_that_nobody_is_in_says_who_there_is(results):
    assert np.isnan(results.mean(where={"kind": "nope"})).all()
    line = "no prompt has kind == 'nope'; there are kind 0, kind 1"
    for call in (
        lambda: results.directions(2, where={"kind": "nope"}),
        lambda: results.contrast({"kind": "nope"}),
        lambda: results.contrast({"kind": "kind 0"}, {"kind": "nope"}),
    ):
        with pytest.raises(UserError, match=f"^{line}$"):
            call()
    with pytest.raises(
        UserError, match="no prompt has kind == 'kind 0' and status == 'lost'; there are failed, ok, sk"
    ):
        results.directions(2, where={"kind": "kind 0", "status": "lost"})
    with pytest.raises(UserError, match=r"no prompt has kind == 'kind 0' and prompt_index == 1$"):
        results.contrast({"kind": "kind 0", "prompt_index": 1})
    with pytest.raises(UserError, match=r"there are 0, 1, 10, 11, 2, 3, 4, 5, 6, 7 and 2 more$"):
        results.directions(2, where={"prompt_index": 99})
    with pytest.raises(UserError, match="no prompt is chosen, of 12"):
        results.directions(2, where=np.zeros(12, bool))
    with pytest.raises(UserError, match="none of the 1 prompts that are chosen has numbers"):
        results.directions(2, where={"status": "failed"})
    with pytest.raises(UserError, match="none to contrast it with"):
        results.contrast({"status": "ok"})


def test_prompts_without_numbers_are_left_out_by_their_status(results):
    every, sound = results.stack(), results.stack(where={"status": "ok"})
    assert np.isnan(every.S[[2, 3]]).all() and np.isnan(algebra.cosines(every)).any()
    for whole, part in zip(every, sound, strict=True):
        np.testing.assert_array_equal(whole[OK], part)
    assert np.isfinite(algebra.cosines(sound)).all() and np.isfinite(algebra.trace(sound)).all()
    rows = results.to_pandas().query("status == 'ok'")
    assert rows["prompt_index"].tolist() == OK
    best = rows.iloc[algebra.trace(sound).argsort()[::-1][0]]
    assert results[int(best["prompt_index"])].S.sum() == pytest.approx(max(results[i].S.sum() for i in OK))


def test_a_layer_by_its_number(tmp_path):
    names = ["model.layers.1", "model.layers.11", "model.layers.11.mlp", "other.2", "again.2"]
    write_folder(tmp_path, 5, make_layout(dict.fromkeys(names, 9), keep_columns=("kind",)))
    results = open_results(tmp_path)
    for number in (11, "11", np.int64(11)):
        assert results.at(number).layer == "model.layers.11"
    view = results.at(11)
    assert view[0].layer == "model.layers.11" and results.at(1).layer == "model.layers.1"
    np.testing.assert_array_equal(results.stack(layer=11).V, view.stack().V)
    np.testing.assert_array_equal(results.mean(11), view.mean())
    np.testing.assert_array_equal(results.directions(2, layer=11).V, view.directions(2).V)
    where = {"kind": "kind 1"}
    np.testing.assert_array_equal(results.contrast(where, layer=11).ratios, view.contrast(where).ratios)
    assert results.residual_norm(11) == view.residual_norm()
    assert not np.array_equal(results.mean(1), results.mean(11))
    for wanted, said in (
        (7, r"layer 7 was not hooked in .*; there is model\.layers\.1, model\.layers\.11, "),
        ("7", "layer 7 was not hooked"),
        (-1, "layer -1 counts from the model's top, which a results folder does not know; there is model"),
        (2, r"layer 2 may be other\.2 or again\.2; give the name"),
        (1.5, "1.5 was not hooked"),
        ("mlp", "'mlp' was not hooked"),
        (1.0, "1.0 was not hooked"),
    ):
        with pytest.raises(UserError, match=said):
            results.at(wanted)


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
