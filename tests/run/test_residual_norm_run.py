"""Residual norms in what a run leaves: the median over a prompt's tokens, or the mean where it was begun with it."""

import numpy as np
import pytest
import torch
from command_cases import LAYER, VOCABULARY, run_here, texts, tiny_tokenizer, write_prompts
from models import tiny
from results_cases import digests, without_fields

from fisher_vmap import open_results
from fisher_vmap.run import open as opening
from fisher_vmap.verify.__main__ import main as verify

PROMPTS = [*texts(8), ""]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("data") / "p.jsonl", PROMPTS)


def norms(ids):
    """The norm of each token after block 1, in float64."""
    with torch.no_grad():
        out = tiny("llama", vocab_size=VOCABULARY)(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[2][0].norm(dim=1).numpy()


def truth(record, average):
    ids = tiny_tokenizer().apply_chat_template([{"role": "user", "content": PROMPTS[record.index]}],
                                               add_generation_prompt=True)["input_ids"]  # fmt: skip
    return np.mean([average(norms([*ids, *more])) for more in record.completion_ids or ((),)])


def begun_before(monkeypatch, *arguments, **settings):
    """A run of the package that had the mean."""
    now = opening.layout_of
    with monkeypatch.context() as before:
        before.setattr(opening, "layout_of", lambda *given: now(*given).model_copy(update={"median_norm": False}))
        assert run_here(*arguments, **settings) == 0
    without_fields(arguments[2], "median_norm")


CHOICES = [{}, {"targets": 3, "samples": 2, "temperature": 1}, {"estimator": "full"}, {"save": "mean"}]


@pytest.mark.parametrize("choice", CHOICES, ids=["topk", "targets", "full", "mean"])
def test_a_run_stores_the_median_over_the_tokens(model, data, tmp_path, choice):
    assert run_here(model, data, tmp_path / "out", **choice) == 0
    check(tmp_path / "out", np.median)


@pytest.mark.parametrize("stored", [4, 6, 9])
@pytest.mark.parametrize("choice", CHOICES, ids=["topk", "targets", "full", "mean"])
def test_a_folder_that_began_with_the_mean_goes_on_with_it(model, data, tmp_path, monkeypatch, choice, stored):
    out = tmp_path / "out"
    begun_before(monkeypatch, model, data, out, num_prompts=stored, **choice)
    assert run_here(model, data, out, num_prompts=9, **choice) == 0
    check(out, np.mean)
    begun_before(monkeypatch, model, data, tmp_path / "before", num_prompts=9, **choice)
    shards, expected = ({k: v for k, v in digests(x).items() if "shard" in k} for x in (out, tmp_path / "before"))
    assert shards == expected
    assert run_here(model, data, out, overwrite="true", **choice) == 0
    check(out, np.median)


def check(folder, average):
    """Norms and trace_norm2 of all prompts, where the folder keeps single prompts and where it does not."""
    assert verify([str(folder)]) == 0
    results = open_results(folder, check="full")
    assert results.index.layout.median_norm == (average is np.median)
    rows = results.table().to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 8 + ["skipped"]
    if results.index.layout.means_only:
        records = [Kept(i) for i in range(8)]
    else:
        records = [record for record in results if record.status == "ok"]
        for record in records:
            assert record.residual_norm == pytest.approx(truth(record, average), rel=1e-5)
    for record in records:
        row = rows[record.index]
        expected = row[f"{LAYER}/trace"] * truth(record, average) ** 2
        assert row[f"{LAYER}/trace_norm2"] == pytest.approx(expected, rel=3e-5)
    assert results.residual_norm() == pytest.approx(np.mean([truth(r, average) for r in records]), rel=1e-5)


class Kept:
    """A prompt of a folder without single matrices."""

    completion_ids = None

    def __init__(self, index):
        self.index = index
