"""The output metric, its leading vectors, and random ones: against dense matrices."""

import pytest
import torch
from devices import on_cpu, placed
from models import VOCABULARY, WIDTH, block, padded, prompts, tiny
from oracles import dense_svd, plain_scores, relative

from fisher_vmap import FisherModel
from fisher_vmap.linearize.output import Asked, Probes, distribution, leading_vectors
from fisher_vmap.model.head import LogitsHead

LENGTHS = (5, 1, 8)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite", "phi"])
def test_the_metric_is_the_hessian_of_the_kl_at_the_heads_input(family, device):
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model, rows = tiny(family, **changes), prompts(LENGTHS)
    opened = FisherModel(placed(model, device), layers=-1)
    with opened.linearize(*placed(padded(rows, "right"), device)) as net, torch.no_grad():
        c = net.metric()
        C = c.product(torch.eye(WIDTH, dtype=torch.float64, device=device).expand(len(rows), -1, -1))
        a = c.rows(torch.arange(VOCABULARY, device=device).expand(len(rows), -1))
        C, a, probs = on_cpu((C, a, c.probs))
        assert relative(C, torch.einsum("bv,bvx,bvy->bxy", probs, a, a)) < 1e-6
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, block(family, -1), where_T=torch.arange(len(row)) == len(row) - 1).fisher
        assert relative(C[b], expected) < 1e-6


def test_leading_vectors_are_the_leading_eigenvectors(device):
    model, batch = placed((tiny("gpt2"), padded(prompts(LENGTHS), "right")), device)
    with FisherModel(model, layers=-1).linearize(*batch) as net, torch.no_grad():
        c = net.metric()
        C = c.product(torch.eye(WIDTH, dtype=torch.float64, device=device).expand(len(LENGTHS), -1, -1)).cpu()
        held = on_cpu({n: leading_vectors(c, 6, n) for n in (0, 2, 30)})
    for b in range(len(LENGTHS)):
        best = dense_svd(C[b])[0][:6].sum()
        traces = {n: float((u[b] @ C[b] @ u[b].T).trace() / best) for n, u in held.items()}
        assert traces[0] > 0.8 and traces[2] > 0.98 and traces[30] > 1 - 1e-9


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_random_vectors_have_the_right_second_moment(logits, centred):
    """Signs one by one: the sum over all of an orthogonal set of sign vectors is exact."""
    rows = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without = torch.tensor([[3, 7]])
    c = distribution(LogitsHead(), rows, Asked(None, without, centred, Probes(40_000, [5]), of_rest=True))
    a, p = c.rows(torch.arange(16)[None])[0], c.probs[0].clone()
    p[without[0]] = 0
    if centred:
        a = a - (p @ a) / p.sum()
    expected = torch.einsum("v,vx,vy->xy", p, a, a)
    many = c.reading.random[:, 0]
    assert relative(many.T @ many / len(many), expected) < 0.03
    assert relative(a.T @ a, expected) > 0.3
