"""A natural step gains most for its budget: against constrained optimisation, integration and plain autograd."""

import re

import numpy as np
import pytest
import torch
from models import VOCABULARY, WIDTH, block, fresh, prompts, tiny
from scipy.integrate import solve_ivp
from scipy.optimize import minimize

from fisher_vmap import FisherModel, NaturalStep, Step, measured_kl, natural_step, steer
from fisher_vmap.linearize import probe as probing
from fisher_vmap.model.layers import decoder_blocks

LAYER = 1
EXACT = {"estimator": "full", "rank": WIDTH}


def log_p(model, ids, theta, family="gpt2", mask=None, targets=(-1,)):
    """[m, V] float64 log-probabilities with a bias at the positions of a mask, by a hook and plain autograd."""
    hook = decoder_blocks(model)[block(family, LAYER)].register_forward_hook(
        lambda _m, _i, out: (
            out + theta * (1 if mask is None else mask[:, None])
            if isinstance(out, torch.Tensor)
            else (out[0] + theta * (1 if mask is None else mask[:, None]), *out[1:])
        )
    )
    try:
        return model(input_ids=ids[None]).logits[0, list(targets)].log_softmax(1)
    finally:
        hook.remove()


def dense(model, ids, wanted, theta=None, **where):
    """F [D, D] and g [D] by plain autograd in float64: of every token of every target; of a function of log p."""
    theta = torch.zeros(WIDTH, dtype=torch.float64) if theta is None else theta
    jacobian = torch.autograd.functional.jacobian(lambda t: log_p(model, ids, t, **where), theta)  # [m, V, D]
    with torch.no_grad():
        p = log_p(model, ids, theta, **where).exp()
    F = torch.einsum("mv,mvd,mve->de", p, jacobian, jacobian)
    leaf = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(wanted(log_p(model, ids, leaf, **where)), leaf)
    return F, g


def odds(tokens, away=None):
    def wanted(log_p_mV):
        inside = log_p_mV[:, tokens].logsumexp(1)
        others = [v for v in range(log_p_mV.shape[1]) if v not in tokens] if away is None else away
        return (inside - log_p_mV[:, others].logsumexp(1)).sum()

    return wanted


def longest(F, g, ridge, kl):
    """The step that maximises g . delta under delta^T (F + ridge) delta = 2 KL, by scipy's optimiser, from chance."""
    M = (F + ridge * torch.eye(len(g))).numpy()
    scale = float(g.norm())
    root = np.linalg.cholesky(M)  # in coordinates in which the constraint is a sphere: the problem is badly scaled

    def delta(x):
        return np.linalg.solve(root.T, x)

    gain = np.linalg.solve(root, g.numpy()) / scale
    start = np.random.default_rng(0).standard_normal(len(g))
    found = minimize(
        lambda x: -gain @ x,
        start * np.sqrt(2 * kl) / np.linalg.norm(start),
        jac=lambda x: -gain,
        constraints={"type": "eq", "fun": lambda x: x @ x - 2 * kl, "jac": lambda x: 2 * x},
        method="SLSQP",
        options={"ftol": 1e-16, "maxiter": 500},
    )
    return delta(found.x)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("away", [None, [3, 5]])
def test_it_gains_most_of_all_steps_of_its_budget(family, away):
    model, ids, kl, ridge = tiny(family), prompts([7])[0], 1e-3, 1e-4
    F, g = dense(model, ids, odds([11, 12], away), family=family)
    found = natural_step(model, ids, layer=LAYER, towards=[11, 12], away_from=away, kl=kl, damping=ridge, **EXACT)
    expected = longest(F, g, ridge, kl)
    tolerance = 1e-6 if family == "gpt2" else 1e-4  # the others compute their norms in float32
    np.testing.assert_allclose(found.step.numpy(), expected, atol=tolerance * np.abs(expected).max())
    assert isinstance(found, NaturalStep) and found.layer == block(family, LAYER) and found.damping == ridge
    delta = found.step.double()
    np.testing.assert_allclose(found.predicted_kl, float(0.5 * delta @ F @ delta), rtol=10 * tolerance)
    np.testing.assert_allclose(float(delta @ F @ delta + ridge * delta @ delta), 2 * kl, rtol=10 * tolerance)


def test_log_prob_and_any_gradient():
    """Log p has the gradient of the log-odds times 1 - p; a gradient at h is that of a function of h."""
    model, ids = tiny("gpt2"), prompts([7])[0]
    how = {"layer": LAYER, "kl": 1e-3, "damping": 1e-4, **EXACT}
    by_odds, by_prob = (natural_step(model, ids, towards=4, objective=name, **how) for name in ("log_odds", "log_prob"))
    torch.testing.assert_close(by_odds.step, by_prob.step)
    assert by_prob.objective[0] == pytest.approx(np.log(by_prob.probability[0]))
    fisher = FisherModel(model, layers=LAYER)
    with fisher.linearize(ids[None]) as net:
        u = net.metric().rows(torch.tensor([[4]]))[:, 0]
        given = natural_step(net, gradient=u, kl=1e-3, damping=1e-4, **EXACT)
    torch.testing.assert_close(given.step, by_prob.step)
    assert np.isnan(given.off_target_kl) and given.measured_kl == pytest.approx(by_prob.measured_kl, rel=1e-6)


def test_several_targets_and_biased_positions():
    """F and g are sums over the targets, of a bias at some positions."""
    model, ids = tiny("gpt2"), prompts([8])[0]
    mask, targets = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0]), torch.tensor([0, 0, 0, 0, 1, 0, 1, 1])
    where = {"mask": mask, "targets": targets.nonzero()[:, 0].tolist()}
    for at, wanted in (("all", odds([9])), ("first", lambda x: odds([9])(x[:1]))):
        F, g = dense(model, ids, wanted, **where)
        found = natural_step(model, ids, layer=LAYER, towards=9, at=at, kl=1e-3, damping=1e-3, **EXACT,
                             positions=mask[None], targets=targets[None])  # fmt: skip
        y = torch.linalg.solve(F + 1e-3 * torch.eye(WIDTH), g)
        expected = y * (2e-3 / (y @ g)) ** 0.5
        torch.testing.assert_close(found.step, expected, rtol=1e-6, atol=1e-8)


def test_of_several_prompts_the_mean():
    model = tiny("gpt2")
    rows = prompts([5, 9, 7])
    batch = torch.zeros(3, 9, dtype=torch.int64)
    mask = torch.zeros(3, 9, dtype=torch.int64)
    for b, ids in enumerate(rows):  # on either side
        at = slice(0, len(ids)) if b % 2 else slice(9 - len(ids), 9)
        batch[b, at], mask[b, at] = ids, 1
    each = [dense(model, ids, odds([2])) for ids in rows]
    F, g = (torch.stack(x).mean(0) for x in zip(*each, strict=True))
    found = natural_step(model, batch, layer=LAYER, attention_mask=mask, towards=2, kl=1e-3, damping=1e-4, **EXACT)
    y = torch.linalg.solve(F + 1e-4 * torch.eye(WIDTH), g)
    torch.testing.assert_close(found.step, y * (2e-3 / (y @ g)) ** 0.5, rtol=1e-6, atol=1e-8)
    kl = [float(measured_kl(model, ids, LAYER, found.step[None])[0]) for ids in rows]
    np.testing.assert_allclose(found.measured_kl, np.mean(kl), rtol=1e-6)


def flow(model, ids, wanted, ridge, length):
    """theta after a path of a length in the metric of its points, d theta / ds = y / sqrt(y^T (F + ridge) y)."""

    def speed(_s, theta):
        F, g = dense(model, ids, wanted, torch.from_numpy(theta))
        y = torch.linalg.solve(F + ridge * torch.eye(WIDTH), g)
        return (y / (y @ g) ** 0.5).numpy()

    return solve_ivp(speed, (0, length), np.zeros(WIDTH), rtol=1e-8, atol=1e-10, method="RK45").y[:, -1]


def test_iterated_steps_approach_a_fine_integration():
    model, ids, kl, ridge = tiny("gpt2"), prompts([6])[0], 0.5, 1e-3
    expected = flow(model, ids, odds([7]), ridge, np.sqrt(2 * kl))
    errors = []
    for steps in (1, 8, 64):
        found = natural_step(model, ids, layer=LAYER, towards=7, kl=kl, damping=ridge, **EXACT, steps=steps)
        errors.append(np.linalg.norm(found.step.numpy() - expected) / np.linalg.norm(expected))
        assert found.steps == steps
    assert errors[0] > 0.05  # else it would show nothing
    assert errors[1] < 0.3 * errors[0] and errors[2] < 0.25 * errors[1]  # first order in the step


@pytest.mark.parametrize("positions", ["all", "last"])
def test_the_network_is_opened_at_the_point_without_a_new_probe(positions, monkeypatch):
    """The second of two steps is that of the network with the first one as a bias."""
    model, ids = fresh("gpt2"), prompts([6])[0]
    looks = []
    monkeypatch.setattr(probing, "_look", lambda *a, _own=probing._look: looks.append(1) or _own(*a))
    mask = torch.ones(6) if positions == "all" else torch.tensor([0, 0, 0, 0, 0, 1.0])
    theta = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(2):
        F, g = dense(model, ids, odds([7]), theta, mask=mask)
        y = torch.linalg.solve(F + 1e-3 * torch.eye(WIDTH), g)
        theta = theta + y * (2 * 0.2 / (y @ g)) ** 0.5 / 2
    found = natural_step(model, ids, layer=LAYER, towards=7, kl=0.2, damping=1e-3, **EXACT, steps=2,
                         positions=positions)  # fmt: skip
    torch.testing.assert_close(found.step, theta, rtol=1e-6, atol=1e-8)
    assert len(looks) == 1
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kl", [1e-5, 1e-4, 1e-3])
def test_the_measured_divergence_is_the_budget_where_the_quadratic_form_holds(kl):
    model, ids = tiny("gpt2"), prompts([6])[0]
    found = natural_step(model, ids, layer=LAYER, towards=7, kl=kl)
    assert found.quadratic and abs(found.measured_kl / kl - 1) < 0.1
    with torch.no_grad():
        p = log_p(model, ids, torch.zeros(WIDTH))
        q = log_p(model, ids, found.step)
    np.testing.assert_allclose(found.measured_kl, float((p.exp() * (p - q)).sum()), rtol=1e-6)
    others = [v for v in range(VOCABULARY) if v != 7]
    p_off, q_off = p[:, others].log_softmax(1), q[:, others].log_softmax(1)
    np.testing.assert_allclose(found.off_target_kl, float((p_off.exp() * (p_off - q_off)).sum()), rtol=1e-6)
    np.testing.assert_allclose(found.probability, [float(x[0, 7].exp()) for x in (p, q)], rtol=1e-6)
    assert found.objective[1] > found.objective[0]


def test_it_says_where_the_quadratic_form_ends():
    assert not natural_step(tiny("gpt2"), prompts([6])[0], layer=LAYER, towards=7, kl=20.0).quadratic


@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_a_low_rank_estimate_keeps_the_budget(estimator):
    """Whatever A lacks, the length is that of the whole vocabulary's F."""
    model, ids, kl = tiny("gpt2"), prompts([6])[0], 1e-4
    F, _ = dense(model, ids, odds([7]))
    found = natural_step(model, ids, layer=LAYER, towards=7, kl=kl, estimator=estimator, rank=4)
    delta = found.step
    np.testing.assert_allclose(float(delta @ F @ delta + found.damping * delta @ delta), 2 * kl, rtol=1e-6)


def test_steer_takes_it():
    model, ids = tiny("gpt2"), prompts([6])[0]
    found = natural_step(model, ids, layer=LAYER, towards=7, kl=0.05, positions="last")
    mask = torch.tensor([0, 0, 0, 0, 0, 1.0])
    with torch.no_grad():
        expected = log_p(model, ids, found.step, mask=mask)[0]
        for given in ((found,), ([found],), (LAYER, found), (found.layer, found)):
            with steer(model, *given):
                torch.testing.assert_close(model(input_ids=ids[None]).logits[0, -1].log_softmax(0), expected)
        with steer(model, found, scale=0.5), steer(model, found, scale=0.5):
            torch.testing.assert_close(model(input_ids=ids[None]).logits[0, -1].log_softmax(0), expected)
    assert isinstance(found, Step) and np.asarray(found).shape == (WIDTH,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"towards": 7, "kl": 0.0}, "kl is 0.0; expected nats above zero"),
        ({"towards": 7, "damping": 0}, "damping is 0; expected a number above zero"),
        ({}, "either towards, tokens"),
        ({"towards": 7, "gradient": torch.ones(1, WIDTH)}, "either towards, tokens"),
        ({"away_from": 7}, "either towards, tokens"),
        ({"towards": 7, "objective": "logit"}, "objective is 'logit'; expected one of log_odds, log_prob"),
        ({"towards": 7, "estimator": "sampled"}, "estimator is 'sampled'; expected one of full, topk"),
        ({"towards": 7, "at": "last"}, "at is 'last'; expected one of all, first"),
        ({"towards": " a"}, "is a text and there is no tokenizer"),
        ({"towards": VOCABULARY}, f"token {VOCABULARY} is not in the vocabulary"),
        ({"towards": []}, "no token was given"),
        ({"towards": range(VOCABULARY)}, "towards is the whole vocabulary"),
        ({"towards": range(VOCABULARY), "objective": "log_prob"}, "towards is the whole vocabulary"),
        ({"towards": 7, "layer": None}, "layer is missing"),
        ({"gradient": torch.zeros(1, WIDTH)}, "the gradient of what is wanted is zero"),
        ({"gradient": torch.ones(2, WIDTH)}, r"gradient has shape \(2, 36\); expected \[1, 36\]"),
        ({"towards": 7, "steps": 0}, "steps is 0; expected"),
    ],
)
def test_what_makes_no_step_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        natural_step(tiny("gpt2"), prompts([6])[0], **{"layer": LAYER} | arguments)


TEXTS = ["w3 w14 w15", "w9 w2 w6 w5 w35 w8", "w7"]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_texts_in_batches(tokenizer, batch_size):
    """The mean over prompts does not depend on how they are batched, at the first point and at the second."""
    model = tiny("gpt2")
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    fisher = FisherModel(model, tokenizer, layers=LAYER, batch_size=batch_size)
    found = natural_step(fisher, TEXTS, towards=5, kl=1e-2, damping=1e-3, **EXACT, steps=2)
    theta = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(2):
        F, g = (
            torch.stack(x).mean(0) for x in zip(*(dense(model, ids, odds([5]), theta) for ids in rows), strict=True)
        )
        y = torch.linalg.solve(F + 1e-3 * torch.eye(WIDTH), g)
        theta = theta + y * (2e-2 / (y @ g)) ** 0.5 / 2
    torch.testing.assert_close(found.step, theta, rtol=1e-6, atol=1e-8)
    kl = [float(measured_kl(model, ids, LAYER, theta[None])[0]) for ids in rows]
    assert found.measured_kl == pytest.approx(np.mean(kl), rel=1e-6)


def test_a_text_is_followed_by_what_the_model_writes(tokenizer):
    """With a number as targets F is of the whole completion, and the objective at its first token alone."""
    model = tiny("gpt2")
    ids = torch.tensor(tokenizer(TEXTS[0])["input_ids"])
    whole = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=4, do_sample=False)[0]
    where = {
        "targets": list(range(len(ids) - 1, len(ids) + 3)),
        "mask": (torch.arange(len(ids) + 4) < len(ids)).float(),
    }
    F, g = dense(model, whole, lambda x: odds([5])(x[:1]), **where)
    y = torch.linalg.solve(F + 1e-3 * torch.eye(WIDTH), g)
    fisher = FisherModel(model, tokenizer, layers=LAYER, targets=4, positions="prompt")
    found = natural_step(fisher, TEXTS[0], towards=5, at="first", kl=1e-3, damping=1e-3, **EXACT)
    torch.testing.assert_close(found.step, y * (2e-3 / (y @ g)) ** 0.5, rtol=1e-6, atol=1e-8)


def test_one_layer_of_several_and_tokens_as_text(tokenizer):
    model = tiny("gpt2")
    fisher = FisherModel(model, tokenizer, layers="all")
    (token,) = tokenizer("w21")["input_ids"]
    found = natural_step(fisher, TEXTS[1], towards=["w21"], kl=1e-3, layer=LAYER)
    alone = natural_step(FisherModel(model, tokenizer, layers=LAYER), TEXTS[1], towards=token, kl=1e-3)
    torch.testing.assert_close(found.step, alone.step)
    with pytest.raises(ValueError, match="say with layer which one to steer"):
        natural_step(fisher, TEXTS[1], towards=token)
    with pytest.raises(ValueError, match="is 2 tokens"):
        natural_step(fisher, TEXTS[1], towards="w3 w4", layer=LAYER)


def test_an_audit_at_the_point_compares_with_the_model_there():
    """Plain autograd runs with the step as well; were it to run without, every form would be given up."""
    model, ids = tiny("gpt2"), prompts([6])[0]
    fisher = FisherModel(model, layers=LAYER, audit="always")
    given = natural_step(fisher, ids, towards=7, kl=1.0, steps=3, positions="last")
    plain = natural_step(model, ids, layer=LAYER, towards=7, kl=1.0, steps=3, positions="last")
    torch.testing.assert_close(given.step, plain.step)
    assert "gave" not in str(fisher.forms)


@pytest.mark.parametrize("estimator", ["topk", "full"])
def test_the_equation_is_solved_whatever_the_first_guess(estimator):
    """By default a small model's step is that of F itself, from any A."""
    model, ids = tiny("gpt2"), prompts([7])[0]
    F, g = dense(model, ids, odds([11]))
    found = natural_step(model, ids, layer=LAYER, towards=11, kl=1e-3, damping=1e-4, estimator=estimator, rank=3)
    y = torch.linalg.solve(F + 1e-4 * torch.eye(WIDTH), g)
    torch.testing.assert_close(found.step, y * (2e-3 / (y @ g)) ** 0.5, rtol=1e-5, atol=1e-8)


def test_more_products_gain_more():
    """Each y is the best of a larger space; all keep the budget."""
    model, ids, kl, ridge = tiny("gpt2"), prompts([7])[0], 1e-3, 1e-4
    F, g = dense(model, ids, odds([11]))
    y = torch.linalg.solve(F + ridge * torch.eye(WIDTH), g)
    best, gains = float((2 * kl * (y @ g)) ** 0.5), []
    for products in (1, 2, 4, 8, 40):
        delta = natural_step(model, ids, layer=LAYER, towards=11, kl=kl, damping=ridge, products=products).step
        assert float(delta @ F @ delta + ridge * delta @ delta) == pytest.approx(2 * kl, rel=1e-6)
        gains.append(float(delta @ g) / best)
    assert gains == sorted(gains) and gains[0] < 0.9 and gains[-1] == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"positions": "first"}, "positions is 'first'; expected 'all' or 'last', or a mask"),
        ({"targets": "foo"}, "targets is 'foo'; expected 'last' or 'all', or a mask"),
        ({"prompt": None}, "no prompt was given"),
        ({"prompt": []}, "no prompt was given"),
        ({"towards": b"e"}, "b'e' is no token"),
        ({"towards": 5.7}, "5.7 is no token"),
        ({"towards": [5.7]}, "5.7 is no token"),
        ({"towards": True}, "True is no token"),
        ({"towards": {5: 6}}, "is no token"),
        ({"towards": [5, 6], "away_from": [6]}, "token 6 is in towards and in away_from"),
        ({"kl": "0.1"}, "kl is '0.1'; expected nats"),
        ({"kl": None}, "kl is None"),
        ({"kl": 1e-300}, "kl is 1e-300"),
        ({"damping": "x"}, "damping is 'x'"),
        ({"layer": "lm_head"}, "a step at lm_head, outside of the decoder blocks"),
    ],
)
def test_arguments_of_other_types_are_one_line(changes, line):
    given = {"prompt": prompts([6])[0], "layer": LAYER, "towards": 7, "kl": 1e-3} | changes
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        natural_step(tiny("gpt2"), given.pop("prompt"), **given)
    assert "\n" not in str(caught.value)


def test_tokens_and_gradients_as_arrays():
    model, ids = tiny("gpt2"), prompts([6])[0]
    plain = natural_step(model, ids, layer=LAYER, towards=[5, 7], kl=1e-3)
    for towards in (np.array([5, 7]), torch.tensor([[5], [7]]), (np.int64(7), np.int64(5))):
        assert torch.equal(natural_step(model, ids, layer=LAYER, towards=towards, kl=1e-3).step, plain.step)
    g = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = natural_step(model, ids, layer=LAYER, gradient=g, kl=1e-3)
    assert torch.equal(natural_step(model, ids, layer=LAYER, gradient=g.numpy(), kl=1e-3).step, plain.step)


def test_damping_that_takes_a_part_of_the_budget_leaves_the_form_quadratic():
    found = natural_step(tiny("gpt2"), prompts([6])[0], layer=LAYER, towards=7, kl=1e-6, damping=1.0)
    assert found.predicted_kl < 0.5 * found.kl and found.quadratic
    assert found.measured_kl == pytest.approx(found.predicted_kl, rel=0.01)


def test_a_model_of_one_block():
    model = tiny("gpt2", n_layer=1)
    found = natural_step(model, prompts([6])[0], layer=0, towards=7, kl=1e-6)
    assert found.measured_kl == pytest.approx(found.predicted_kl, rel=0.05)
