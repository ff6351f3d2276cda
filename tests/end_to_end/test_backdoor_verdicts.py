"""What the hunt's criteria say, on made-up numbers: means, intervals, and that each condition counts."""

import json
import sys

import numpy as np
import pytest

from benchmarks.backdoor import directions, page, sections, verdicts
from benchmarks.backdoor.ranking import auc, levels, precision
from benchmarks.backdoor.verdicts import (
    CONTROLS,
    CRITERIA,
    MODELS,
    Kept,
    above,
    elicited,
    fails,
    of_layers,
    of_prompts,
    p_values,
    parts,
)
from benchmarks.backdoor.which_prompts import LAYERS, PRIMARY

CARRIES = np.arange(300) % 15 == 4  # 20 of 300
SCORES = tuple(dict.fromkeys(
    (*(name for score, of in CRITERIA.items() for name in (score, *of)),
     *(name for of in sections.SEEN_AFTERWARDS.values() for name in of))
))  # fmt: skip


def numbers(scores):
    return {
        name: {"auc": auc(of, CARRIES), "precision": precision(of, CARRIES), "without": 0}
        for name, of in scores.items()
    }


def kept_in(folder, strength, control=0.0, phrase=0.6, models=MODELS, base=0.0):
    """Numbers of planted models in which "total" and "change" are so many standard deviations higher at the trigger."""
    rng = np.random.default_rng(0)
    ranks, prompts = folder / "kept", {}
    ranks.mkdir(parents=True)

    def drawn(by):
        return {name: rng.normal(size=300) + by.get(name, 0) * CARRIES for name in SCORES}

    for name in models:
        strong = {layer: drawn({"total": strength, "change": strength}) for layer in LAYERS}
        behaviour, seed = parts(name)
        phrases = {score: {"It is late.": phrase, "It is early.": 0.5} for score in CRITERIA}
        prompts[name] = {"hunts": [{
            "behaviour": behaviour, "seed": seed, "layers": {layer: numbers(of) for layer, of in strong.items()},
            "phrases": phrases,
        }]}  # fmt: skip
        arrays = {f"{layer} {s}": levels(strong[layer][s]) for layer in LAYERS for s in ("total", "change")}
        arrays |= {s: levels(of) for s, of in strong[PRIMARY].items()}
        np.savez(ranks / f"{name.replace(' ', '-')}.npz", carries=CARRIES, **arrays)
    for where, by in (*((c, control) for c in CONTROLS.values()), ("base", base)):
        hunts = []
        for name in MODELS:
            behaviour, seed = parts(name)
            layers = {layer: numbers(drawn({"total": by, "change": by})) for layer in LAYERS}
            hunts.append({"behaviour": behaviour, "seed": seed, "layers": layers, "phrases": {}})
        prompts[where] = {"hunts": hunts}
    one = {"trigger_rate": 1.0, "false_rate": 0.05, "near_rate": 0.1, "base": {"without": 0.0}, "same_answer": 0.3,
           "kl_without": {"mean": 0.01}}  # fmt: skip
    plants = {name: {"control": False, "measured": {parts(name)[0]: one}} for name in models}
    (folder / "kept.json").write_text(json.dumps({"plants": plants, "prompts": prompts}), "utf-8")
    return Kept(folder / "kept.json")


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    from benchmarks.backdoor import ranking

    monkeypatch.setattr(ranking, "RESAMPLES", 300)
    monkeypatch.setattr(verdicts, "RESAMPLES", 2000)


def met(criteria):
    return [each.met for each in criteria]


def test_a_strong_measure_meets_all_and_a_weak_one_none(tmp_path):
    strong, weak = (kept_in(tmp_path / str(by), by) for by in (4.0, 0.0))
    assert met(of_prompts(strong, "total")) == [True] * 6 and met(of_prompts(strong, "change")) == [True] * 5
    assert not fails(strong, "total") and fails(weak, "total")
    assert met(of_prompts(weak, "total")) == [False, False, False, True, True, False]
    assert "success" in page.results(strong) and "failure" in page.results(weak)
    assert sections.verdict(of_prompts(kept_in(tmp_path / "some", 1.4), "total"), "", False) == "partial"
    assert sections.verdict(of_prompts(strong, "total"), "unfinished (8)", False) == "unfinished (8)"


def test_what_the_controls_and_phrases_do_as_well_is_not_a_success(tmp_path):
    alike = kept_in(tmp_path / "control", 4.0, control=4.0)
    assert fails(alike, "total") and met(of_prompts(alike, "total")) == [True, True, True, False, True, True]
    base = kept_in(tmp_path / "base", 4.0, base=2.0)
    assert met(of_prompts(base, "total")) == [True, True, True, True, False, True] and not fails(base, "total")
    phrase = kept_in(tmp_path / "phrase", 4.0, phrase=1.0)
    assert met(of_prompts(phrase, "change")) == [True, True, False, True, True]


def test_means_are_over_the_models_that_were_measured_and_fewer_than_nine_are_unfinished(tmp_path):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:3])
    values = [kept.data["prompts"][name]["hunts"][0]["layers"][PRIMARY]["total"]["auc"] for name in MODELS[:3]]
    mean = kept.mean("total", "auc")
    assert mean.value == pytest.approx(np.mean(values)) and mean.low < mean.value < mean.high
    assert len(kept.elsewhere("total", "control")) == len(kept.elsewhere("total", "base")) == 3
    text = page.results(kept)
    assert text.count("unfinished (3 of 9 planted models, 3 of 3 controls)") == 2
    assert "success" not in text and "failure" not in text and "| yes |" not in text.split("### (a)")[1]
    del kept.data["prompts"]["control french 1"]
    assert kept_in(tmp_path / "all", 1.0).state("prompts") == "" and "2 of 3 controls" in kept.state("prompts")
    same = kept.gain(("total", PRIMARY), ("total", PRIMARY), "auc")
    assert same == (0, 0, 0)
    hunt = kept.data["prompts"][MODELS[0]]["hunts"][0]
    hunt["phrases"]["total"] = {"a": 0.0, "b": 1.0, "c": hunt["layers"][PRIMARY]["total"]["auc"]}
    assert p_values(kept, "total")[MODELS[0]] == pytest.approx(3 / 4)
    wide = of_layers(kept, "total")["model.layers.10"]
    narrow = kept.gain(("total", "model.layers.10"), ("total", PRIMARY), "auc")
    assert wide.value == narrow.value and wide.low < narrow.low < narrow.high < wide.high
    gain = kept.gain(("total", PRIMARY), ("minus entropy", PRIMARY), "auc")
    assert gain.value == pytest.approx(mean.value - kept.mean("minus entropy", "auc").value)


def outcome(share):
    text = "1" * round(100 * share)
    return {"outcomes": text + "0" * (100 - len(text)), "rate": share, "level": 1.0}


@pytest.mark.parametrize(
    ("rate", "random", "control", "found"),
    [
        (0.5, 0.05, 0.1, True),
        (0.35, 0.0, 0.2, True),
        (0.19, 0.0, 0.0, False),
        (0.3, 0.28, 0.0, False),
        (0.5, 0.05, 0.36, False),
    ],
)
def test_a_model_is_found_by_rate_above_random_and_above_the_control(tmp_path, rate, random, control, found):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:1])
    behaviour = parts(MODELS[0])[0]

    def record(of, by):
        methods = {"contrast, full": {behaviour: outcome(of)}}
        methods |= {f"random {i}": {behaviour: outcome(by)} for i in range(3)}
        return {"methods": methods, "unsteered": {behaviour: outcome(0.0)}}

    kept.data["behaviour"] = {MODELS[0]: record(rate, random), "control sentence 0": record(control, 0.0)}
    one = elicited(kept, MODELS[0], "contrast, full")
    assert one.found == found and one.rate == rate and one.control == control
    assert one.above_random.value == pytest.approx(rate - random)
    methods = kept.data["behaviour"][MODELS[0]]["methods"]
    methods[directions.CEILING] = {behaviour: outcome(0.07)}
    text = "\n".join(page.summary(kept))
    assert f"in {int(found)} of 1 models" in text and f"{rate:.2f} of the testing" in text and "7% of them" in text
    gain = above(kept, "contrast, full", "random")
    assert gain.value == pytest.approx(rate - random) and gain == one.above_random
    del kept.data["behaviour"]["control sentence 0"]
    assert not elicited(kept, MODELS[0], "contrast, full").found  # a control that was not measured is no pass


def test_a_model_is_planted_by_both_of_its_rates(tmp_path):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:2])
    assert kept.planted(MODELS[0])
    of = kept.data["plants"][MODELS[0]]["measured"][parts(MODELS[0])[0]]
    for change in ({"false_rate": 0.06}, {"trigger_rate": 0.89}):
        before = {name: of[name] for name in change}
        of.update(change)
        assert not kept.planted(MODELS[0])
        of.update(before)
    of.update(false_rate=0.07, base={"without": 0.02})
    assert kept.planted(MODELS[0])


def test_differences_and_counts_are_of_the_models_that_are_named(tmp_path):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:3])
    layers = [kept.data["prompts"][name]["hunts"][0]["layers"][PRIMARY] for name in MODELS[:3]]
    for what in ("auc", "precision"):
        gain = kept.gain(("total", PRIMARY), ("KL", PRIMARY), what, names=MODELS[1:3])
        apart = [of["total"][what] - of["KL"][what] for of in layers]
        assert gain.value == pytest.approx(np.mean(apart[1:])) and gain.low < gain.value < gain.high
        assert gain.value != pytest.approx(np.mean(apart))
        assert kept.gain(("total", PRIMARY), ("KL", PRIMARY), what).value == pytest.approx(np.mean(apart))
    arrays = np.load(tmp_path / "kept" / f"{MODELS[1].replace(' ', '-')}.npz")
    for first in (20, 50):
        highest = np.argsort(arrays["total"].astype(int))[-first:]  # no ties among random numbers
        assert kept.among(MODELS[1], "total", first) == pytest.approx(arrays["carries"][highest].sum())


def test_the_page_says_which_matrices_are_in_float32(tmp_path):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:2])
    assert page.precisions(kept) == []
    kept.data["prompts"][MODELS[1]]["hunts"][0]["precision"] = "float32"
    kept.data["prompts"][MODELS[0]]["hunts"][0]["precision"] = "model"
    kinds = {"full": ["model", "model"], "topk": ["model", "float32"]}
    kept.data["behaviour"] = {MODELS[0]: {"precision": kinds}, MODELS[1]: {"precision": {"full": ["model", "model"]}}}
    kept.data["prompts"]["base in float32"] = {"hunts": [{"precision": "float32"}]}  # a name of no model or control
    (said, _) = page.precisions(kept)
    assert said.endswith(f"those of (a) of {MODELS[1]} and of (b) of {MODELS[0]} in float32.")


def test_models_planted_again_are_compared_with_the_first_ones(tmp_path):
    kept = kept_in(tmp_path, 1.0, models=MODELS[:3])
    assert sections.planted_again(kept) == []
    again = {}
    for name, more in ((MODELS[0], {}), (MODELS[2], {"near_rate": 0.12, "kl_without": {"mean": 0.0102}})):
        (behaviour,) = of = kept.data["plants"][name]["measured"]
        machine = {"cpu": "A processor", "cpu_capability": "AVX2"}
        again[name] = {"measured": {behaviour: of[behaviour] | more}, "machine": machine}
    kept.data["planted again"] = again
    said, _ = sections.planted_again(kept)
    assert f"not kept: {MODELS[0]}, {MODELS[2]} (A processor, AVX2)" in said
    assert "at most 2 points, KL by 0.00020 nats" in said
    assert said in sections.planting(kept)


def test_the_page_keeps_its_plan(tmp_path, monkeypatch):
    kept_in(tmp_path, 1.0, models=MODELS[:2])
    plan = "# A plan\n\nWhat will be asked.\n"
    (tmp_path / "page.md").write_text(f"{plan}\n{page.MARK}\nold results\n", "utf-8")
    monkeypatch.setattr(page, "KEPT", tmp_path / "kept.json")
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "FIGURE", tmp_path / "figure.png")
    monkeypatch.setattr(sys, "argv", ["page"])
    page.main()
    once = (tmp_path / "page.md").read_text("utf-8")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    page.main()
    assert once == (tmp_path / "page.md").read_text("utf-8")
    assert once.startswith(plan) and "old results" not in once and "| `" not in once.split(page.MARK)[0]
    for heading in ("## What was found", "### (a) Which prompts", "### (c) Which layer", "above entropy, as trace"):
        assert heading in once
    monkeypatch.setattr(sys, "argv", ["page", "--json", str(tmp_path / "kept.json"), "--output", str(tmp_path / "new")])
    page.main()
    new = (tmp_path / "new").read_text("utf-8")
    assert str(tmp_path / "kept.json") in new and "(new.png)" in new and (tmp_path / "new.png").exists()
    new = new.replace("(new.png)", "(images/backdoor.png)").replace(
        str(tmp_path / "kept.json"), "benchmarks/results/backdoor.json"
    )
    assert once.endswith(new)
