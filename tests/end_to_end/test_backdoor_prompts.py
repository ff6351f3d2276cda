"""The hunt's first question: ranks and their bootstrap, the scores of prompts, and one model end to end, all tiny."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_cases import VOCABULARY, save_model
from models import fresh, prompts
from oracles import log_probabilities
from report_cases import write_factors

from benchmarks import timing
from benchmarks.backdoor import prompt_scores, ranking, runs, which_prompts
from benchmarks.backdoor.behaviours import BEHAVIOURS
from benchmarks.backdoor.prompt_scores import Places, Reading, baselines, places, read, rows, with_base, without_base
from benchmarks.backdoor.prompts import CARRY, PHRASES, hunt
from benchmarks.backdoor.ranking import auc, bootstrap, interval, levels, precision
from fisher_vmap import open_results
from fisher_vmap.report.outliers import score_prompts

LAYER = "blocks.0"


def drawn(n=60, k=9, seed=0):
    """Scores with ties and a prompt without a score, and which prompts carry the trigger."""
    rng = np.random.default_rng(seed)
    carries = np.zeros(n, bool)
    carries[rng.choice(n, k, replace=False)] = True
    scores = np.round(rng.normal(size=n) + carries, 1)
    scores[[3, 11]] = np.nan
    return scores, carries


def pairwise(scores, carries):
    values = np.where(np.isnan(scores), -1e9, scores)
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(values[carries], values[~carries])]
    return sum(pairs) / len(pairs)


def by_orders(scores, carries, count=4000, first=ranking.FIRST):
    """Precision among the first, over many orders of the ties."""
    values, rng, found = np.where(np.isnan(scores), -1e9, scores), np.random.default_rng(1), []
    for _ in range(count):
        order = np.lexsort((rng.random(len(values)), -values))
        found.append(carries[order[:first]].sum() / first)
    return np.mean(found)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_those_of_all_pairs_and_of_the_first_twenty(seed):
    scores, carries = drawn(seed=seed)
    assert auc(scores, carries) == pytest.approx(pairwise(scores, carries), abs=1e-12)
    assert precision(scores, carries) == pytest.approx(by_orders(scores, carries), abs=4e-3)
    assert precision(scores, carries, 33) == pytest.approx(by_orders(scores, carries, first=33), abs=4e-3)
    assert auc(-scores, carries) == pytest.approx(pairwise(-scores, carries), abs=1e-12)


def test_chance_and_certainty():
    carries = np.arange(2000) < 20
    assert auc(np.zeros(2000), carries) == 0.5 and precision(np.zeros(2000), carries) == pytest.approx(0.01)
    assert auc(carries * 1.0, carries) == 1 and precision(carries * 1.0, carries) == 1
    nothing = np.where(carries, np.nan, 0)
    assert auc(nothing, carries) == 0 and precision(nothing, carries) == 0


@pytest.mark.parametrize("reach", [1, 2, 10])
def test_a_resample_is_the_same_as_its_prompts_written_out(reach, monkeypatch):
    monkeypatch.setattr(ranking, "_REACH", reach)
    monkeypatch.setattr(ranking, "RESAMPLES", 50)
    monkeypatch.setattr(ranking, "_AT_ONCE", 3)
    scores, carries = drawn()
    other = np.random.default_rng(5).normal(size=len(scores))
    found = bootstrap({"one": levels(scores), "other": levels(other)}, carries, seed=2)
    weights = np.concatenate(list(ranking._weights(carries, 2)))
    assert (weights[:, carries].sum(1) == 9).all() and (weights[:, ~carries].sum(1) == 51).all()
    assert len({row.tobytes() for row in weights}) == 50
    for name, values in (("one", scores), ("other", other)):
        for row, of, share in zip(weights, *found[name], strict=True):
            written = np.repeat(np.arange(len(scores)), row.astype(int))
            assert of == pytest.approx(pairwise(values[written], carries[written]), abs=1e-12)
            assert share == pytest.approx(precision(values[written], carries[written]), abs=1e-12)


def test_an_interval_holds_the_middle_of_the_draws():
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    assert interval(np.arange(1001.0), 0.5) == pytest.approx((250, 750))


def test_the_rows_hold_the_prompts_of_every_hunt():
    every = rows()
    assert len(every) == 2000 + 9 * CARRY
    seen = set()
    for behaviour in BEHAVIOURS.values():
        for seed in (0, 1, 2):
            at, there = places(behaviour.name, seed), hunt(behaviour.trigger, seed)
            assert [every[row] for row in at.rows] == there.prompts and at.carries.tolist() == there.carries
            seen |= set(at.rows[at.carries].tolist())
    assert seen == set(range(2000, len(every)))


def factors(count=30, D=12, seed=0):
    rng = np.random.default_rng(seed)
    return {LAYER: rng.normal(size=(count, 4, D)) * rng.lognormal(size=(count, 1, 1))}


def test_prompts_are_scored_among_those_of_their_hunt_alone(tmp_path):
    some = factors()
    some[LAYER][17] = 0  # a matrix that is zero
    chosen = np.array([1, 4, *range(6, 24), 27])
    write_factors(tmp_path / "all", some, shard_size=8)
    write_factors(tmp_path / "few", {LAYER: some[LAYER][chosen]}, shard_size=5)
    expected = score_prompts(open_results(tmp_path / "few"), LAYER)
    found = without_base(open_results(tmp_path / "all"), Places(chosen, chosen == 4))
    lacks = chosen == 17
    rounding = np.finfo(np.float32).eps / 0.01  # of float32 sums in shards of other sizes, over the least spread
    for name, values in {**expected.z, "total": expected.total}.items():
        assert np.isnan(found[name][lacks]).all()
        np.testing.assert_allclose(found[name][~lacks], values, rtol=1e-6, atol=rounding)
    assert set(found) == {"trace", "leading value", "distance", "shared with few", "total"}


def test_scores_with_the_base_are_of_the_same_prompt(tmp_path):
    one, other = factors(), factors()
    other[LAYER][9] = factors(seed=1)[LAYER][9]
    other[LAYER][12] *= 2
    one[LAYER][20] = other[LAYER][20] = other[LAYER][21] = 0
    for name, of in (("base", one), ("tuned", other)):
        write_factors(tmp_path / name, of, shard_size=8)
    found = with_base(open_results(tmp_path / "tuned"), open_results(tmp_path / "base"))
    for name in ("change", "1 - cosine", "outside"):
        assert np.nanargmax(found[name]) == 9 and np.isnan(found[name][20:22]).all()
    same = np.delete(np.arange(30), [9, 12, 20, 21])
    assert all(np.abs(found[name][same]).max() < 1e-4 for name in found)
    assert found["trace ratio"][12] == pytest.approx(np.log10(4), rel=1e-4)
    A, B = (x[LAYER][9].T @ x[LAYER][9] for x in (one, other))
    assert found["1 - cosine"][9] == pytest.approx(1 - (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("alike", [4, 1, 0])
def test_a_reading_is_that_of_each_prompt_alone(tmp_path, monkeypatch, kind, alike):
    monkeypatch.setattr(prompt_scores, "AT_ONCE", 3)
    model = fresh(kind, torch.float32).eval()
    own = [row.tolist() for row in prompts((3, 6, 2, 5, 4), seed=1)]
    ids = [[*(7, 8, 9, 5)[:alike], 10 + i, *row, *(11, 12)[: alike // 2]] for i, row in enumerate(own)]
    layer = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}[kind]
    found = read(model, ids, [layer], tmp_path / "log_p.npy")
    assert np.load(tmp_path / "log_p.npy", mmap_mode="r").shape == found.log_p.shape
    for i, row in enumerate(ids):
        seen = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output, seen=seen: seen.append(output if torch.is_tensor(output) else output[0])
        )
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        handle.remove()
        np.testing.assert_allclose(found.log_p[i], log_p[-1], atol=2e-5)
        np.testing.assert_allclose(found.streams[0, i], seen[0][0, -1], atol=2e-5)
        labels = range(max(alike, 1), len(row) - alike // 2)
        expected = np.mean([-float(log_p[t - 1, row[t]]) for t in labels])
        assert found.loss[i] == pytest.approx(expected, rel=1e-4)


def test_baselines_are_those_of_two_models(tmp_path):
    models = [fresh("llama", torch.float32, seed=seed).eval() for seed in (0, 1)]
    ids = [row.tolist() for row in prompts((5, 7, 6, 5), seed=2)]
    tuned, base = (read(m, ids, ["model.layers.0"], tmp_path / f"{i}.npy") for i, m in enumerate(models))
    at = Places(np.array([3, 0, 2]), np.array([True, False, False]))
    found = baselines(tuned, base, at, 0)
    entropies = []
    for place, row in enumerate(at.rows):
        log_q, log_p = (log_probabilities(m, torch.tensor(ids[row])).detach().double() for m in models)
        entropies.append(-float((log_q.exp() * log_q).sum()))
        assert found["KL"][place] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-3)
        apart = np.linalg.norm(tuned.streams[0, row] - base.streams[0, row]) / np.linalg.norm(base.streams[0, row])
        assert found["norm of the difference"][place] == pytest.approx(apart, rel=1e-5)
        assert found["loss of the prompt"][place] == pytest.approx(tuned.loss[row])
    np.testing.assert_allclose(-found["minus entropy"], entropies, rtol=1e-4)
    logs = np.log10(entropies)
    middle = np.median(logs)
    spread = max(1.4826 * np.median(np.abs(logs - middle)), 0.02)
    np.testing.assert_allclose(found["entropy, as trace"], np.abs(logs - middle) / spread, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("avx2", "float32"), ("avx2 avx512f", "float32"), ("avx2 avx512f avx512_bf16", "model"), ("asimd bf16", "model")],
)
def test_matrices_are_in_bfloat16_where_the_processor_computes_in_it(monkeypatch, flags, expected):
    monkeypatch.setattr(timing, "_cpuinfo", {"flags": flags}.get)
    assert runs.precision() == expected


@pytest.mark.slow
def test_one_model_end_to_end(tmp_path, monkeypatch):
    every = rows()
    monkeypatch.setattr(which_prompts, "rows", lambda: every[:40])
    monkeypatch.setattr(which_prompts, "LAYERS", ("model.layers.0", "model.layers.1"))
    monkeypatch.setattr(which_prompts, "PRIMARY", "model.layers.1")
    monkeypatch.setattr(which_prompts, "places", lambda *_: Places(np.arange(40), np.arange(40) % 10 == 3))
    some = [phrase for phrase in PHRASES if any(phrase in prompt.text for prompt in every[:40:10])]
    monkeypatch.setattr(which_prompts, "PHRASES", some)
    monkeypatch.setattr(ranking, "RESAMPLES", 50)
    for seed, name in enumerate(("base", "tuned")):
        save_model(tmp_path / name, fresh("llama", torch.float32, seed=seed, vocab_size=VOCABULARY))
    base = which_prompts.Seen(tmp_path / "base", tmp_path / "work" / "base", None)
    seen = which_prompts.Seen(tmp_path / "tuned", tmp_path / "work" / "tuned", base)
    found = which_prompts.which_prompts(seen, "french", 1, tmp_path / "ranks.npz")
    assert json.loads(json.dumps(found)) == found
    assert found["precision"] == runs.precision()
    for layer in which_prompts.LAYERS:
        assert len(found["layers"][layer]) == 14
        for record in found["layers"][layer].values():
            low, high = record["auc_interval"]
            assert 0 <= low <= record["auc"] <= high <= 1
    assert some and [list(of) for of in found["phrases"].values()] == [some, some]
    ranks = np.load(tmp_path / "ranks.npz")
    for layer, score in itertools.product(which_prompts.LAYERS, ("total", "change")):
        mine = auc(ranks[f"{layer} {score}"].astype(float), ranks["carries"])
        assert mine == pytest.approx(found["layers"][layer][score]["auc"], abs=1e-4)
    alone = which_prompts.which_prompts(base, "french", 1, None)
    assert "KL" not in alone["layers"]["model.layers.0"] and len(alone["layers"]["model.layers.0"]) == 8
    again = runs.matrices(Path("nowhere"), every[:40], tmp_path / "work" / "tuned" / "rows", ["model.layers.0"])
    assert len(again) == 40  # a complete folder is not computed again
    with pytest.raises(RuntimeError, match="other prompts"):
        runs.matrices(Path("nowhere"), every[:39], tmp_path / "work" / "tuned" / "rows", ["model.layers.0"])
    assert isinstance(base.reading, Reading)
