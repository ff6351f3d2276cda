"""The study of steering: its prompts, its measures on a tiny model, and what its page says of its numbers."""

import numpy as np
import pytest
import torch
from models import VOCABULARY, prompts, tiny
from oracles import bias_added, log_probabilities

from benchmarks.steering_measure import Effect, Site, along, at_gain, lengths_for, prompt_at, streams
from benchmarks.steering_steps import Estimator, check, factors, from_contrast, natural
from fisher_vmap.model.layers import decoder_blocks

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


@pytest.mark.parametrize("how", [Estimator("full", 12), Estimator("topk", 10)], ids=str)
def test_a_natural_step_by_its_parts_is_the_packages(site, how):
    some = [prompt_of(site, 7, 3), prompt_of(site, 5, 4)]
    check(site, some, how, 0.01, WANTED)
    known = factors(site, [prompt.ids for prompt in some], how)
    v = natural(known, [prompt.gradient for prompt in some], 1e9)
    g = sum(prompt.gradient for prompt in some)
    assert float(v @ g / g.norm()) == pytest.approx(1)  # with a large damping it is the gradient


def test_a_natural_step_costs_least_at_small_gains(site):
    """In the exact metric no direction reaches a small gain with less change of the other tokens; of one token."""
    (ids,) = prompts((6,), seed=5)
    one = torch.tensor([11])
    prompt = prompt_at(site, ids.tolist(), streams(site.model, [site.layer], ids.tolist())[site.layer], one)
    (exact,) = factors(site, [prompt.ids], Estimator("full", VOCABULARY))
    rng = torch.Generator().manual_seed(0)
    best = natural([exact], [prompt.gradient], 1e-4)
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
