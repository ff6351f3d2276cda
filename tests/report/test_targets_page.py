"""The report of a folder with several targets: completions, what carries the sensitivity, and traded pairs."""

import shutil
import subprocess

import numpy as np
import pytest
from command_cases import TARGET_RUNS, run_here, run_targets, save_model, texts, write_prompts

from fisher_vmap.escape import visible
from fisher_vmap.report.__main__ import main
from fisher_vmap.report.data import Sampling, survey
from fisher_vmap.report.page import page_data, render_page
from fisher_vmap.report.targets import PAIRS
from fisher_vmap.results.reader import open_results

pytestmark = pytest.mark.needs("matplotlib", "plotly", "scipy")


@pytest.fixture(scope="module", params=TARGET_RUNS)
def made(request, tmp_path_factory):
    """The kind of run, its results, and the page's data."""
    results = open_results(run_targets(tmp_path_factory.mktemp(request.param), request.param))
    return request.param, results, page_data(survey(results, Sampling()))


def test_the_command_writes_page_and_images(made, tmp_path, capsys, recwarn):
    kind, results, _ = made
    assert main([str(results.folder), "--output", str(tmp_path / "look.html")]) == 0
    told = capsys.readouterr().out
    assert "6 prompts" in told and (tmp_path / "look" / f"prompts{'.model.layers.0' * (kind == 'all')}.png").exists()
    text = (tmp_path / "look.html").read_text("utf-8")
    assert "the next-token distributions at its" in " ".join(text.split()) and "nan%" not in text
    assert ("their mean over 2 completions" in text) == (kind == "samples")
    assert not [w for w in recwarn if "nan" in str(w.message).lower() or "empty slice" in str(w.message)]


def test_each_prompt_has_its_counts(made):
    _, results, data = made
    table = results.to_pandas()
    np.testing.assert_allclose(np.array(data["rows"]["targets"], float), table["targets"], rtol=1e-3)
    np.testing.assert_allclose(np.array(data["rows"]["entropy"], float), table["mean_entropy"], rtol=1e-3)
    np.testing.assert_allclose(np.array(data["rows"]["log_prob"], float), table["mean_log_prob"], rtol=1e-3)
    labels = " ".join(label for _, label in data["tiles"])
    assert "targets a prompt" in labels and "entropy" in labels and "covered" not in labels


def test_every_completion_is_shown_with_its_tokens(made):
    kind, results, data = made
    for index, detail in data["details"].items():
        record = results[int(index)]
        blocks = detail["targets"]["blocks"]
        if kind == "all":
            assert [block["pieces"] for block in blocks] == [list(record.prompt_tokens)]
            assert data["outcome"] == "tokens traded"
            continue
        for block, text in zip(blocks, record.completions, strict=True):  # a turn ends with a token of its own
            assert "".join(block["pieces"]) in (text, text + "<|end|>" * (kind == "completion"))
        assert data["rows"]["top"][int(index)].startswith(" ".join(record.completions[0].split())[:20])
        assert len(blocks) == {"samples": 2}.get(kind, 1) and data["outcome"] == "completion"


def test_each_token_has_the_target_that_predicts_it(made):
    kind, results, data = made
    for index, detail in data["details"].items():
        record, targets = results[int(index)], detail["targets"]
        prompt = list(record.prompt_tokens)
        for number, block in enumerate(targets["blocks"]):
            tokens = prompt + (block["pieces"] if kind != "all" else [])
            for i, j in enumerate(block["of"]):
                if j is None:
                    assert kind == "all" and i == 0  # nothing predicts the first token
                    continue
                assert targets["sample"][j] == number
                assert targets["position"][j] + 1 == block["first"] + i
                at = targets["position"][j]  # of several tokens of a character the last has its text
                part = f"part of {visible(next((token for token in tokens[at:] if token), ''))}"
                assert targets["before"][j] == (visible(tokens[at]) or (part if any(tokens[at:]) else ""))
            assert (block["after"] is not None) == (kind == "all")
        everyone = [j for block in targets["blocks"] for j in block["targets"]]
        assert sorted(everyone) == list(range(len(record.target_trace)))
        for layer, shown in detail["layers"].items():
            np.testing.assert_allclose(shown["target_trace"], results.at(layer)[int(index)].target_trace, rtol=1e-3)


def test_the_energy_has_a_token_for_each_number(made):
    kind, results, data = made
    for index, detail in data["details"].items():
        record = results[int(index)]
        tokens = list(record.prompt_tokens)
        if kind in ("written", "completion"):  # several completions have the prompt alone in common
            assert detail["targets"]["start"] == len(tokens)
            tokens += detail["targets"]["blocks"][0]["pieces"]
        assert detail["pieces"] == tokens
        for shown in detail["layers"].values():
            assert len(shown["energy"]) == len(tokens)


def test_the_pairs_of_a_direction_are_those_that_change_most(made):
    _, results, data = made
    for index, detail in data["details"].items():
        for layer, shown in detail["layers"].items():
            record = results.at(layer)[int(index)]
            changes, real = record.trades(), record.token_ids >= 0
            assert len(shown["pairs"]) == (record.S > 0).sum()
            for r, pairs in enumerate(shown["pairs"]):
                chosen = [k for k, _ in pairs]
                assert len(set(chosen)) == len(pairs) == min(PAIRS, real.sum()) and real[chosen].all()
                np.testing.assert_allclose([x for _, x in pairs], changes[chosen, r], rtol=1e-3)
                assert (np.diff(changes[chosen, r]) <= 0).all()
                others = np.setdiff1d(np.flatnonzero(real), chosen)
                assert not len(others) or np.abs(changes[others, r]).max() <= np.abs(changes[chosen, r]).min()
        of, taken, record = detail["targets"]["of"], detail["targets"]["taken"], results[int(index)]
        assert of == record.token_targets.tolist()
        for k, is_own in enumerate(taken):
            own = False
            if record.completion_ids is not None and of[k] >= 0:
                target = record.targets
                ids = record.completion_ids[target.samples[of[k]]]
                own = ids[target.positions[of[k]] + 1 - len(record.prompt_tokens)] == record.token_ids[k]
            assert is_own == own


@pytest.mark.parametrize("more", [{"store_text": "false"}, {"save": "mean"}], ids=str)
@pytest.mark.parametrize("kind", ["samples", "all"])
def test_a_folder_without_text_or_without_prompts(tmp_path, kind, more):
    folder = run_targets(tmp_path, kind, **more)
    assert main([str(folder), "--no-images"]) == 0
    data = page_data(survey(open_results(folder), Sampling()))
    if "save" in more:
        assert data["details"] == {}
        return
    for detail in data["details"].values():
        assert detail["pieces"] is None
        shown = [block["pieces"] for block in detail["targets"]["blocks"]]
        assert shown == [None] if kind == "all" else all(piece.startswith("#") for block in shown for piece in block)


def test_a_folder_of_one_target_is_as_it_was(tmp_path):
    model, data = save_model(tmp_path / "model"), write_prompts(tmp_path / "p.jsonl", texts(5))
    assert run_here(model, data, tmp_path / "out") == 0
    found = page_data(survey(open_results(tmp_path / "out"), Sampling()))
    detail = found["details"][0]
    assert detail["targets"] is None and found["rows"]["targets"] is None and found["outcome"] == "next tokens"
    assert {"S", "trace", "norm", "energy", "trades"} == set(next(iter(detail["layers"].values())))
    assert found["tiles"][3][1] == "of the probability covered (median)" and found["shade"] == "covered mass"
    page = render_page(survey(open_results(tmp_path / "out"), Sampling()))
    assert 'id="warning"' not in page and "Fisher matrix F of the next-token distribution with" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_it_without_errors(made, tmp_path):
    kind, results, _ = made
    out = tmp_path / "look.html"
    assert main([str(results.folder), "--output", str(out), "--no-images"]) == 0
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000",
             f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", f"file://{out}#prompt-1"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    assert "Which predicted tokens carry the sensitivity" in done.stdout and 'class="trade pairs"' in done.stdout
    assert ("completion 2: log p" in done.stdout) == (kind == "samples")
