"""Layers that are too wide for a dense mean: what works without it, and that no command needs it."""

import logging
import tracemalloc

import numpy as np
import pytest
from command_cases import VOCABULARY, run_here, save_model, texts, write_prompts
from report_cases import planted, write_factors
from results_cases import make_layout, make_prompt, open_writer, write_folder

from fisher_vmap import algebra
from fisher_vmap.cli import main as command
from fisher_vmap.errors import UserError
from fisher_vmap.export import main as export
from fisher_vmap.finish import main as finish
from fisher_vmap.info import main as info
from fisher_vmap.results import means
from fisher_vmap.results.outputs import finish_memory
from fisher_vmap.results.reader import open_results
from fisher_vmap.verify.__main__ import main as verify

WIDTHS = {"model.layers.1": 7, "lm_head": 30}
OK = [i for i in range(12) if i not in (2, 3)]


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(means, "DENSE_WIDTH", 20)


@pytest.fixture
def results(narrow, tmp_path):
    write_folder(tmp_path / "out", 12, make_layout(WIDTHS, keep_columns=("kind",)))
    return open_results(tmp_path / "out", check="full")


def dense(results, chosen, layer="lm_head"):
    return np.mean([results.at(layer)[i].matrix().astype(np.float64) for i in chosen], axis=0)


def test_the_mean_is_left_out_and_everything_says_so(results, capsys, caplog):
    folder = results.folder
    assert list(results.index.files["mean.safetensors"].tensors) == ["model.layers.1"]
    np.testing.assert_allclose(results.mean(), dense(results, OK, "model.layers.1"), rtol=1e-5, atol=1e-6)
    for where in (None, {"kind": "kind 1"}):
        line = (
            r"the mean at lm_head would be a matrix of 30 x 30 \(.*\), and above a width of 20 none is made; use .*dir"
        )
        with pytest.raises(UserError, match=line):
            results.mean("lm_head", where)
    assert results.metadata["mean_left_out"] == ["lm_head"]
    assert results.is_wide("lm_head") and not results.is_wide()
    assert info([str(folder)]) == 0
    assert "mean      none at lm_head, which is too wide; directions() and contrast() do" in capsys.readouterr().out
    with caplog.at_level(logging.INFO):
        (folder / "mean.safetensors").unlink()
        assert finish([str(folder)]) == 2  # written without settings
        write_folder(folder, 12, make_layout(WIDTHS, keep_columns=("kind",)))
    assert "lm_head has the width 30, and above 20 no mean is written" in caplog.text
    assert verify([str(folder)]) == 0


def test_a_folder_of_wide_layers_alone_has_no_file_of_means(narrow, tmp_path):
    write_folder(tmp_path, 12, make_layout({"lm_head": 30}))
    assert not (tmp_path / "mean.safetensors").exists() and verify([str(tmp_path)]) == 0
    results = open_results(tmp_path, check="full")
    np.testing.assert_allclose(results.directions(2).S, np.linalg.eigvalsh(dense(results, OK))[::-1][:2], rtol=1e-5)


def test_directions_from_the_factors(results):
    for where, chosen in ((None, OK), ({"kind": "kind 1"}, [1, 5, 7, 9, 11]), ([4], [4])):
        mean = dense(results, chosen)
        found = results.directions(3, layer="lm_head", where=where)
        np.testing.assert_allclose(found.S, np.linalg.eigvalsh(mean)[::-1][:3], rtol=1e-5)
        np.testing.assert_allclose(mean @ found.V.T, found.V.T * found.S, atol=1e-5)
        factors = results.mean_factors("lm_head", where)
        assert factors.trace == pytest.approx(np.trace(mean), rel=1e-6) and factors.prompts == len(chosen)
        x = np.random.default_rng(0).normal(size=30)
        assert algebra.quadratic(factors, x) == pytest.approx(x @ mean @ x, rel=1e-5)
        np.testing.assert_allclose(algebra.matvec(factors, x), mean @ x, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="rank is 4, but the mean of 1 prompts at lm_head has 3 directions; ask for 1"):
        results.directions(4, layer="lm_head", where=[4])
    with pytest.raises(UserError, match="no prompt has kind == 'x'; there are kind 0, kind 1"):
        results.directions(1, layer="lm_head", where={"kind": "x"})


@pytest.mark.parametrize("against", [None, [0, 4, 6]])
def test_contrast_is_that_of_the_dense_means(results, monkeypatch, against):
    wide = results.contrast({"kind": "kind 1"}, against, layer="lm_head", rank=3, ridge=0.05)
    monkeypatch.setattr(means, "DENSE_WIDTH", 99)
    plain = results.contrast({"kind": "kind 1"}, against, layer="lm_head", rank=3, ridge=0.05)
    for name in ("ratios", "inside", "outside", "ridge"):
        np.testing.assert_allclose(getattr(wide, name), getattr(plain, name), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(wide.directions, plain.directions, atol=1e-4)


def test_groups_that_nobody_is_in(results):
    for call, said in (
        (lambda: results.contrast({"kind": "x"}, layer="lm_head"), "no prompt has kind == 'x'"),
        (lambda: results.contrast({"kind": "kind 0"}, {"kind": "x"}, layer="lm_head"), "no prompt has kind == 'x'"),
        (lambda: results.contrast({"status": "ok"}, layer="lm_head"), "none to contrast it with"),
        (lambda: results.contrast([4], layer="lm_head", rank=9), "rank is 9 .*expected 1 to 3"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_mean_alone_is_refused_before_anything_is_computed(narrow, tmp_path):
    with pytest.raises(
        UserError, match="save is mean, but lm_head has the width 30, and above 20 no mean is made; set"
    ):
        open_writer(tmp_path / "out", make_layout(WIDTHS, means_only=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.needs("plotly", "matplotlib", "scipy")
def test_the_report_is_that_of_the_dense_mean(monkeypatch, tmp_path):
    from fisher_vmap.report.data import Sampling, survey

    factors = {"lm_head": planted("private", 3, count=60, width=64)[0]}
    results = write_factors(tmp_path / "out", factors, keep_columns=("kind",))
    plain = survey(results, Sampling()).layers[0]
    monkeypatch.setattr(means, "DENSE_WIDTH", 20)
    wide = survey(results, Sampling()).layers[0]
    np.testing.assert_allclose(wide.mean_values, plain.mean_values, rtol=1e-4)
    assert wide.mean_trace == pytest.approx(plain.mean_trace, rel=1e-5)
    assert [outlier.index for outlier in wide.outliers] == [outlier.index for outlier in plain.outliers]
    np.testing.assert_allclose(wide.scores.distance, plain.scores.distance, atol=1e-4)
    assert command(["report", str(results.folder), "--output", str(tmp_path / "r.html")]) == 0


@pytest.mark.needs("plotly", "matplotlib", "scipy")
@pytest.mark.parametrize("layers", ["lm_head", "lm_head,1"])
def test_a_run_that_hooks_the_unembedding(monkeypatch, tmp_path, capsys, layers):
    monkeypatch.setattr(means, "DENSE_WIDTH", VOCABULARY - 1)
    model, data = save_model(tmp_path / "model"), write_prompts(tmp_path / "data.jsonl", texts(11))
    out = tmp_path / "out"
    assert run_here(model, data, out, hook_layer_name=layers) == 0
    assert (out / "mean.safetensors").exists() == ("," in layers)
    results = open_results(out, check="full").at("lm_head")
    assert results.index.layout.widths["lm_head"] == VOCABULARY
    mean = np.mean([record.matrix().astype(np.float64) for record in results], 0)
    np.testing.assert_allclose(results.directions(2).S, np.linalg.eigvalsh(mean)[::-1][:2], rtol=1e-4)
    assert finish([str(out)]) == 0 and verify([str(out)]) == 0 and info([str(out)]) == 0
    assert export([str(out), str(tmp_path / "d.safetensors"), "--directions", "2"]) == 0
    assert command(["report", str(out), "--output", str(tmp_path / "r.html")]) == 0
    capsys.readouterr()
    assert run_here(model, data, tmp_path / "mean", hook_layer_name=layers, save="mean") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"save is mean, but lm_head has the width {VOCABULARY}, and above {VOCABULARY - 1} no mean is made" in error
    assert not (tmp_path / "mean").exists()


def test_memory_of_finishing_is_foretold(tmp_path):
    layout = make_layout({"a": 700, "b": 600}, rank=4)
    few = [make_prompt(i, layout) for i in range(4)]
    writer = open_writer(tmp_path, layout, shard_size=64)
    for number, start, stop in writer.missing_shards(160):
        prompts = [make_prompt(0, layout, layers=few[i % 4].layers) for i in range(start, stop)]
        for index, prompt in zip(range(start, stop), prompts, strict=True):
            object.__setattr__(prompt, "index", index)
        writer.add(number, prompts)
    for save, npz in (("both", False), ("prompts", True)):
        foretold = max(finish_memory(layout, 64, 160, save, npz).values())
        tracemalloc.start()
        writer.finish(settings={}, save=save, export_npz=npz)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0.6 * foretold < peak < 1.4 * foretold, (save, foretold, peak)


@pytest.mark.slow
def test_fifty_thousand_wide_takes_a_gigabyte_and_not_twenty(tmp_path):
    D = 50_000
    layout = make_layout({"lm_head": D}, top_k=10, rank=10)
    writer = open_writer(tmp_path, layout, shard_size=20)
    for number, start, stop in writer.missing_shards(200):
        writer.add(number, [make_prompt(i, layout) for i in range(start, stop)])
    tracemalloc.start()
    writer.finish(settings={}, export_npz=False)
    at_finish = tracemalloc.get_traced_memory()[1]
    results = open_results(tmp_path)
    found = results.directions(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"finish {at_finish / 1e9:.2f} GB, directions {peak / 1e9:.2f} GB, a dense mean {8 * D * D / 1e9:.1f} GB")
    assert at_finish < 0.2e9 and peak < 1.7e9
    v = found.V[0]
    assert np.mean([record.quadratic(v) for record in results if record.status == "ok"]) == pytest.approx(
        found.S[0], rel=1e-3
    )
