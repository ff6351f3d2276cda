"""`verify DIR --kl`: measured KL divergences beside predicted ones, on tiny models where both are known."""

import json

import numpy as np
import pytest
import torch
from command_cases import LAYER, VOCABULARY, run_here, save_model, texts, write_prompts
from models import block, fresh, prompts, tiny
from oracles import bias_added, log_probabilities

from fisher_vmap import open_results
from fisher_vmap.verify.__main__ import main
from fisher_vmap.verify.kl import check_kl, measured_kl
from fisher_vmap.verify.kl_report import PREDICTED, Directions, KlCheck, plot_kl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_prompts(folder / "prompts.jsonl", texts(7))


@pytest.fixture(scope="module")
def folders(inputs, tmp_path_factory):
    """Results of every estimator."""
    made = {}
    for name, settings in {
        "all tokens": {"top_k_tokens": VOCABULARY, "num_singular_values": 36, "dtype": "float64"},
        "full": {"estimator": "full", "num_singular_values": 8},
        "topk": {"top_k_tokens": 6},
        "last": {"estimator": "full", "num_singular_values": 36, "bias_positions": "last", "dtype": "float64"},
    }.items():
        made[name] = tmp_path_factory.mktemp("results") / "out"
        assert run_here(*inputs, made[name], **settings) == 0
    return made


def test_with_all_tokens_the_ratio_is_one_to_a_thousandth(folders):
    found = check_kl(open_results(folders["all tokens"]), prompts=4)
    assert found.leading.ratio.shape == (12, len(PREDICTED)) and found.random.ratio.shape == (4, len(PREDICTED))
    for directions in (found.leading, found.random):
        assert abs(np.median(directions.ratio[:, 0]) - 1) < 1e-3
    assert found.ok


def test_the_bias_at_the_last_position_alone(folders):
    found = check_kl(open_results(folders["last"]), prompts=4)
    assert abs(np.median(found.leading.ratio[:, 0]) - 1) < 1e-3


def test_full_predicts_and_topk_falls_short_by_the_tail(folders):
    full = check_kl(open_results(folders["full"]))
    assert len(full.leading.ratio) == 21  # all seven prompts
    assert full.ok and abs(np.median(full.leading.ratio[:, 0]) - 1) < 0.01
    assert (full.leading.ratio[:, 0] < 1.02).all()
    topk = check_kl(open_results(folders["topk"]))
    assert topk.ok and (topk.leading.ratio[:, 0] < 0.95).all()


def test_a_matrix_that_promises_too_much_is_bad(folders, tmp_path):
    """As one of another layer would: predictions are compared with what the model does."""
    results = open_results(folders["full"])
    wrong = check_kl(results)
    wrong = wrong._replace(leading=wrong.leading._replace(predicted=1.5 * wrong.leading.predicted))
    assert not wrong.ok and wrong.lines()[0].startswith("BAD")
    short = wrong._replace(leading=wrong.leading._replace(predicted=wrong.leading.predicted / 3))
    assert not short.ok and short._replace(estimator="topk").ok


def test_the_command(folders, tmp_path, capsys):
    assert main([str(folders["full"]), "--kl", "--prompts", "3", "--plot", str(tmp_path / "kl.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"ok   KL at {LAYER}: 9 leading and 3 random directions") for line in lines)
    assert sum("1e-05" in line for line in lines) == 1 and lines[-1].endswith("is sound")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(folders["full"]), "--kl", "--prompts", "1", "--layer", "1"]) == 0
    assert (folders["full"] / "kl.png").exists()
    assert main([str(folders["full"])]) == 0  # a plot beside the results is no damage
    assert run_again(folders["full"])


def run_again(folder):
    from fisher_vmap.results.folder import inspect_folder

    return inspect_folder(folder) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "0"], "--prompts is 0; expected at least 1"),
        (["--layer", "model.layers.9"], "'model.layers.9' was not hooked"),
        (["--layer", "9"], "layer 9 was not hooked"),
        (["--dataset_name", "/nowhere/p.jsonl"], "/nowhere/p.jsonl: no such file"),
        (["--model_path", "/nowhere/model"], "model_path /nowhere/model is not there"),
        (["--plot", "/nowhere/kl.png", "--prompts", "1"], "the plot cannot be written to /nowhere/kl.png"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folders, capsys, arguments, message):
    assert main([str(folders["topk"]), "--kl", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and sum(line.startswith("fisher_vmap:") for line in lines) == 1


def test_the_plot_takes_no_place_of_a_results_file(folders, capsys):
    folder = folders["topk"]
    before = (folder / "metadata.yaml").read_bytes()
    assert main([str(folder), "--kl", "--plot", str(folder / "metadata.yaml")]) == 2
    assert "is a file of the results in" in capsys.readouterr().err
    assert before == (folder / "metadata.yaml").read_bytes()


def test_another_model_or_other_prompts_are_refused(inputs, tmp_path, capsys):
    model, data = save_model(tmp_path / "model"), tmp_path / "prompts.jsonl"
    write_prompts(data, texts(3))
    assert run_here(model, data, tmp_path / "out") == 0
    other = fresh("llama", torch.float32, seed=5, vocab_size=VOCABULARY)
    save_model(tmp_path / "other", other)
    assert main([str(tmp_path / "out"), "--kl", "--model_path", str(tmp_path / "other")]) == 2
    assert "is not the folder's" in capsys.readouterr().err
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({"prompt": row["prompt"] + " more"}) + "\n" for row in rows))
    assert main([str(tmp_path / "out"), "--kl"]) == 2
    assert "the data set has changed" in capsys.readouterr().err


def test_prompts_and_a_model_that_have_moved(inputs, tmp_path, capsys):
    model, data = save_model(tmp_path / "model"), write_prompts(tmp_path / "prompts.jsonl", texts(3))
    out = tmp_path / "out"
    assert run_here(model, data, out) == 0
    data.rename(tmp_path / "moved.jsonl")
    assert main([str(out), "--kl"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{data}, where the prompts of {out} came from, is not there" in error and "--dataset_name" in error
    assert main([str(out), "--kl", "--prompts", "1", "--dataset_name", str(tmp_path / "moved.jsonl")]) == 0
    model.rename(tmp_path / "moved")
    assert main([str(out), "--kl"]) == 2
    assert "say with --model_path where it is now" in capsys.readouterr().err


@pytest.mark.parametrize("positions", ["all", "last"])
def test_measured_kl_is_the_divergence(positions):
    model, layer, (row,) = tiny("gpt2"), block("gpt2", 1), prompts((7,))
    steps = 0.3 * torch.randn(9, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = measured_kl(model, row, layer, steps, positions)
    where = torch.ones(7, 1) if positions == "all" else (torch.arange(7) == 6)[:, None]
    with torch.no_grad():
        log_p0 = log_probabilities(model, row)
        for step, kl in zip(steps, found, strict=True):
            with bias_added(model.get_submodule(layer), where * step):
                expected = (log_p0.exp() * (log_p0 - log_probabilities(model, row))).sum()
            torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-12)


def test_where_the_quadratic_regime_ends():
    eps = np.array([[0.1, 0.2, 0.4, 0.8]])
    one = Directions(eps, eps**2 * np.array([[1.0, 1.05, 0.95, 0.5]]), eps, np.array([2.0]))
    assert one.quadratic_until().tolist() == [0.2]
    back_again = one._replace(measured=eps**2 * np.array([[1.0, 1.2, 1.0, 1.0]]))
    assert back_again.quadratic_until().tolist() == [0.05]


@pytest.mark.needs("matplotlib")
@pytest.mark.parametrize("layer", ["m.$x_{$.1", r"$\frac$", "_m.\n\x07"])
def test_a_layers_name_is_no_formula(tmp_path, layer):
    many = np.broadcast_to(PREDICTED, (2, len(PREDICTED)))
    found = Directions(many, many, np.sqrt(many), np.ones(2))
    check = KlCheck(layer, found, found, "topk", "float32", None)
    plot_kl(check, tmp_path / "kl.png")
    assert (tmp_path / "kl.png").stat().st_size > 10_000
    assert not any("\n" in line or "\x07" in line for line in check.lines())
