"""The study of steering: its prompts, its measures on a tiny model, and what its page says of its numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import VOCABULARY, prompts, tiny
from oracles import bias_added, log_probabilities

from benchmarks.steering import choose, settings
from benchmarks.steering_concepts import CONCEPTS, cases, tokens
from benchmarks.steering_measure import Effect, Site, along, at_gain, lengths_for, prompt_at, streams
from benchmarks.steering_more import NEW, over_tokens
from benchmarks.steering_numbers import DAMPINGS, EUCLID, GAINS, MEANS, NATURAL, PCA, SETTINGS, middle
from benchmarks.steering_page import draw, page
from benchmarks.steering_steps import (
    Estimator,
    factors,
    from_contrast,
    from_estimate,
    mean_eigenvalues,
    natural,
    predicting,
)
from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.natural import DAMPING, natural_step

WANTED = torch.tensor([3, 40, 77])


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def site(request):
    model = tiny(request.param, torch.float32)
    return Site(model, list(decoder_blocks(model)), 1)


def prompt_of(site, length, seed):
    (ids,) = prompts((length,), seed=seed)
    return prompt_at(site, ids.tolist(), streams(site.model, [site.layer], ids.tolist())[site.layer], WANTED)


def odds_and_others(log_p):
    """Log-odds of the wanted tokens; the others' probabilities, renormalised."""
    p = log_p.double().exp()
    inside = p[WANTED].sum()
    p[WANTED] = 0
    return torch.log(inside / p.sum()), p / p.sum()


@pytest.mark.parametrize(("length", "seed"), [(4, 1), (9, 2)])
def test_the_effects_are_those_of_a_hook(site, length, seed):
    prompt = prompt_of(site, length, seed)
    rng = torch.Generator().manual_seed(seed)
    directions = [torch.randn(len(prompt.gradient), generator=rng, dtype=torch.float64) for _ in range(2)]
    lengths = torch.tensor([0.01, 0.3], dtype=torch.float64)
    found = along(site, prompt, [(v, lengths) for v in directions], WANTED)
    with torch.no_grad():
        odds, p = odds_and_others(log_probabilities(site.model, torch.tensor(prompt.ids)))
        for v, effect in zip(directions, found, strict=True):
            for i, step in enumerate(lengths):
                with bias_added(site.model.get_submodule(site.layer), (step * v).float()):
                    moved, q = odds_and_others(log_probabilities(site.model, torch.tensor(prompt.ids)))
                chosen = p > 0
                kl = (p[chosen] * (p[chosen] / q[chosen]).log()).sum()
                assert effect.gain[i] == pytest.approx(float(moved - odds), rel=1e-3, abs=1e-5)
                assert effect.off_target[i] == pytest.approx(float(kl), rel=1e-2, abs=1e-9)


def test_the_gradient_is_what_a_small_step_gains(site):
    prompt = prompt_of(site, 7, 3)
    v = prompt.gradient / prompt.gradient.norm()
    lengths = lengths_for(prompt, v, unit=1e9, points=1, least=0.01)
    (effect,) = along(site, prompt, [(v, lengths)], WANTED)
    assert effect.gain[0] == pytest.approx(0.01, rel=0.03)


def test_the_unit_of_the_damping_is_that_of_the_package(site):
    rows = [prompts((n,), seed=n)[0].tolist() for n in (5, 7)]
    found = mean_eigenvalues(site, rows)
    for ids, expected in zip(rows, found, strict=True):
        step = natural_step(site.model, torch.tensor(ids), layer=site.layer, towards=3)
        assert step.damping / DAMPING == pytest.approx(expected, rel=0.02)


def test_with_a_large_damping_it_is_the_gradient(site):
    some = [prompt_of(site, 7, 3), prompt_of(site, 5, 4)]
    v = natural(site, [prompt.ids for prompt in some], WANTED, 1e9)
    g = sum(prompt.gradient for prompt in some)
    assert float(v @ g / g.norm()) == pytest.approx(1)


def test_a_step_from_the_exact_matrix_is_the_packages(site):
    prompt = prompt_of(site, 7, 3)
    (exact,) = factors(site, [prompt.ids], Estimator("full", VOCABULARY))
    tr = exact.trace / len(prompt.gradient)
    v = natural(site, [prompt.ids], WANTED, 0.1 * tr)
    assert float(v @ from_estimate(exact, prompt.gradient, 0.1)) == pytest.approx(1, abs=1e-4)


def test_a_natural_step_over_a_text_gains_at_its_first_target(site):
    (ids,) = prompts((8,), seed=6)
    ids, first = ids.tolist(), ids[:-3].tolist()
    prompt = prompt_at(site, first, streams(site.model, [site.layer], first)[site.layer], WANTED)
    v = natural(site, [ids], WANTED, 1e9, predict=3)
    assert float(v @ prompt.gradient / prompt.gradient.norm()) == pytest.approx(1)


def test_kl_over_a_text_is_that_of_a_hook(site):
    (ids,) = prompts((NEW + 4,), seed=7)
    stream = streams(site.model, [site.layer], ids.tolist())[site.layer]
    known = SimpleNamespace(loaded=SimpleNamespace(site=lambda layer: site))
    step = 0.3 * torch.randn(1, stream.shape[1], generator=torch.Generator().manual_seed(0))
    (found,) = over_tokens(known, site.layer, stream, step)
    with torch.no_grad():
        before = site.model(input_ids=ids[None]).logits[0, -NEW:].double().log_softmax(-1)
        with bias_added(site.model.get_submodule(site.layer), step[0]):
            after = site.model(input_ids=ids[None]).logits[0, -NEW:].double().log_softmax(-1)
    torch.testing.assert_close(found, (before.exp() * (before - after)).sum(-1), rtol=1e-3, atol=1e-7)


def test_a_natural_step_costs_least_at_small_gains(site):
    """In the exact metric no direction reaches a small gain with less change of the other tokens; of one token."""
    (ids,) = prompts((6,), seed=5)
    one = torch.tensor([11])
    prompt = prompt_at(site, ids.tolist(), streams(site.model, [site.layer], ids.tolist())[site.layer], one)
    rng = torch.Generator().manual_seed(0)
    best = natural(site, [prompt.ids], one, 1e-4 * mean_eigenvalues(site, [prompt.ids])[0])
    others = [prompt.gradient / prompt.gradient.norm()]
    others += [best + 0.3 * torch.randn(len(best), generator=rng, dtype=torch.float64) / 6 for _ in range(6)]
    sweeps = [(v, lengths_for(prompt, v, 100.0, 6, 0.02)) for v in (best, *others)]
    costs = [at_gain(effect, [0.1])[0] for effect in along(site, prompt, sweeps, one)]
    assert costs[0] <= min(costs) * 1.001


def test_what_is_read_between_the_lengths_of_a_sweep():
    gain = 0.1 * 2.0 ** np.arange(7)
    effect = Effect(gain, 0.03 * gain**2.5)
    assert at_gain(effect, [0.17, 1, 5]) == pytest.approx([0.03 * x**2.5 for x in (0.17, 1, 5)], rel=1e-9)
    assert at_gain(effect, [0.05]) == pytest.approx([effect.off_target[0] / 4])
    assert at_gain(effect, [7]) == [np.inf]


def test_a_sweep_that_turns_back_counts_where_it_first_gets_there():
    effect = Effect(np.array([-0.1, 0.5, 1.0, 0.2, 2.0]), np.array([1e-3, 0.1, 0.4, 3.0, 9.0]))
    assert at_gain(effect, [0.5, 1.0, 2.0, 2.1]) == pytest.approx([0.1, 0.4, 9.0, np.inf])
    assert at_gain(Effect(np.array([-1.0, -2.0]), np.ones(2)), [1.0]) == [np.inf]


def test_contrast_directions_are_the_mean_and_scikit_learns_component():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 12, 5)) + np.array([[[3.0]], [[0.0]]])
    found = from_contrast(torch.tensor(a), torch.tensor(b))
    mean = (a - b).mean(0)
    np.testing.assert_allclose(found["difference of means"], mean / np.linalg.norm(mean))
    centred = a - b - mean
    first = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    assert abs(found["PCA of differences"].numpy() @ first) == pytest.approx(1)
    onto = (a - b) @ found["PCA of differences"].numpy()
    assert (onto > 0).sum() >= (onto < 0).sum()


@pytest.mark.parametrize("concept", CONCEPTS)
def test_prompts_have_contrast_texts_with_the_same_end(concept):
    class Words:
        chat_template = None

        def encode(self, text, add_special_tokens):
            return [hash(text)] if text.count(" ") < 2 else [0, 1]

    made = cases(concept, Words())
    assert len({case.neutral for case in made}) == 40 and made == cases(concept, Words())
    for case in made:
        last = case.neutral.split(". ")[-1][-20:]
        assert case.wanted.endswith(last) and case.unwanted.endswith(last) and case.wanted != case.unwanted
    assert len(tokens(concept, Words())) > 5


def test_the_targets_of_a_text_are_what_predicts_its_last_tokens():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert predicting(mask, 2).tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]


def cell_of(rng, factors, prompts_tested=6):
    """Numbers as they are kept: natural steps of a random cost, the others' of so many times as much."""
    cost = np.outer(np.exp(rng.standard_normal(prompts_tested)), np.square(GAINS)) * 0.01
    found = {name: (cost * factor).tolist() for name, factor in factors.items()}
    for values in found.values():
        for row in values:
            row[:] = [None if np.isinf(x) else x for x in row]
    return found


FACTORS = {NATURAL: 1.0, EUCLID: 3.0, MEANS: np.inf, PCA: 0.5, "random 0": np.inf}


def kept_of(factors):
    rng = np.random.default_rng(0)
    own = {name: factors[name] for name in (NATURAL, EUCLID)}
    tries = {f"{kind}/{c:g}": [[0.1 * (1 + (c != 1.0))] * len(GAINS)] * 3 for kind in SETTINGS for c in DAMPINGS}
    layers = {
        f"model.layers.{i}": {
            c: {"average": cell_of(rng, factors), "own": cell_of(rng, own, 4), "odds": [-2.0, -3.0]}
            for c in ("list", "French")
        }
        for i in (1, 2)
    }
    concepts = {c: {"tokens": ["1", "-"], "example": ["How?", "", ""]} for c in ("list", "French")}
    model = {"tries": {"model.layers.1/list": tries}, "chosen": dict.fromkeys(SETTINGS, 1.0), "layers": layers,
             "variants": {}, "texts": {}, "concepts": concepts}  # fmt: skip
    machine = {"cores": 2, "cpu_capability": "AVX2", "torch": "2"}
    return {"models": {"tiny": model}, "settings": settings(), "machine": machine}


def test_the_page_says_what_the_numbers_say(tmp_path):
    kept = kept_of(FACTORS)
    text = page(kept)
    assert "Euclidean gradient** over natural: 3.00 (3.00 to 3.00) at +1" in text
    assert "difference of means** over natural: ∞ (∞ to ∞) at +1" in text
    assert "PCA of differences** over natural: 0.5 (0.5 to 0.5) at +1" in text
    assert "own step, against Euclidean gradient: 0 of 12 medians are below 1: none." in text
    assert text.count("| natural | ") == 2 and "| one for a concept | 1 | 1 | 1 | 1 | 1 |" in text
    worse = page(kept_of(FACTORS | {EUCLID: 0.9}))
    assert "against Euclidean gradient: 12 of 12 medians are below 1: tiny, model.layers.1, list at +1 (0.9)" in worse
    draw(kept, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_the_page_has_ranks_steps_and_texts():
    kept, flat = kept_of(FACTORS), [[1.0] * len(GAINS)] * 2
    by = {
        f"{name}/{c:g}": [[times] * len(GAINS)] * 2
        for name, times in (("8 products", 1.5), ("exact", 1.0))
        for c in DAMPINGS
    }
    row = {"one step": flat, "several steps": [[0.25] * len(GAINS)] * 2}
    model = kept["models"]["tiny"]
    model["variants"] = {"list": {"damping": 1.0, "by": by | {EUCLID: flat}, "in a row": row}}
    model["texts"] = {"model.layers.1/list": {NATURAL: {"length": 4.0, "gain": [2.0], "first": [0.5], "kl": [3.0]}}}
    text = page(kept)
    assert "| tiny | 8 products | 1.50 |" in text and "| tiny | exact | 1.00 |" in text
    assert "| tiny | +2 | 1.00 | 0.25 | 1.00 | 4.00 |" in text
    assert f"| tiny, model.layers.1, list | {NATURAL} | 4.00 | 2.00 | 0.5 | 3.00 |" in text


def test_the_page_of_nothing_and_of_a_part():
    kept = kept_of(FACTORS)
    assert "Nothing is measured yet" in page({"models": {}})
    kept["models"]["tiny"]["layers"]["model.layers.2"] = {}
    assert "Euclidean gradient** over natural: 3.00" in page(kept)


def test_a_median_counts_what_is_never_reached():
    assert middle([np.array([1.0, np.inf, np.nan, 3.0])]) == 3.0 and middle([np.array([np.inf, np.inf, 1])]) == np.inf
    assert middle([np.array([1.0, 3.0, np.inf, np.inf])]) == np.inf and np.isnan(middle([np.array([np.nan])]))


def test_the_damping_of_least_cost_is_chosen():
    assert choose(kept_of(FACTORS)["models"]["tiny"]["tries"]) == {"average": 1.0, "own": 1.0}
