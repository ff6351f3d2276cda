"""The output distribution: which tokens are the likeliest, how accurate log p and its cotangents are, kinds of head."""

import pytest
import torch
from devices import on, on_cpu, placed
from models import VOCABULARY, block, fresh, padded, prompts, tiny
from oracles import fisher_matrix, plain_scores, relative
from torch import Tensor, nn
from toys import ToyLM

from fisher_vmap import fisher_scores
from fisher_vmap.linearize.output import Asked, Probes, Reading, distribution
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import head
from fisher_vmap.model.head import LogitsHead, Phi, UnembeddingHead, likeliest

LENGTHS = (7, 1, 12, 3)


# Which tokens.


def test_ties_across_the_edge_are_broken_by_token_id():
    z = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0, 3.0], [0.0] * 6])
    assert likeliest(z, 3).tolist() == [[0, 2, 3], [5, 0, 1], [0, 1, 2]]
    assert likeliest(z, 1).tolist() == [[0], [5], [0]]
    assert likeliest(z, 6).tolist() == [[0, 2, 3, 4, 5, 1], [5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("top_k", [1, 2, 10, 299])
def test_likeliest_is_a_stable_sort(top_k, device):
    """Logits in steps, as bfloat16 has them: most ranks are ties."""
    z = torch.randint(-6, 7, (20, 300), generator=torch.Generator().manual_seed(0)).float()
    z[3, ::2] = -torch.inf
    assert torch.equal(on(device, likeliest)(z, top_k), z.sort(dim=1, descending=True, stable=True).indices[:, :top_k])


@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_ties_in_a_model_are_broken_by_token_id(kernel, device):
    model = ToyLM()
    with torch.no_grad():
        model.unembed.weight[30:60] = model.unembed.weight[60:90]  # every one of them has a twin
    rows = prompts(LENGTHS)
    scores = on(device, fisher_scores)(model, *padded(rows, "left"), layers="blocks.1", top_k=7, kernel=kernel)
    for b, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0, -1]
        logits[30:60] = logits[60:90]  # equal to the bit
        assert torch.equal(scores.token_ids[b], logits.sort(descending=True, stable=True).indices[:7])


# Accuracy.


IDENTITY, CPU = Phi(), torch.device("cpu")


class Problem:
    """A head of 5,003 tokens with bfloat16 weights, and the rows that go in."""

    def __init__(
        self, B: int, logits_std: float, phi: Phi = IDENTITY, biased: bool = False, device: torch.device = CPU
    ) -> None:
        generator = torch.Generator().manual_seed(B)
        V, D = 5003, 68
        self.rows = 3 * torch.randn(B, D, generator=generator)
        self.weight = (logits_std * torch.randn(V, D, generator=generator) / D**0.5).bfloat16()
        self.bias = torch.randn(V, generator=generator).bfloat16() if biased else None
        self.norm = nn.LayerNorm(D).requires_grad_(False)
        self.phi = phi
        unembedding = nn.Linear(D, V, bias=biased)
        unembedding.weight = nn.Parameter(self.weight, requires_grad=False)
        if biased:
            unembedding.bias = nn.Parameter(self.bias, requires_grad=False)
        self.head = UnembeddingHead(*placed((self.norm, unembedding), device), phi)

    def truth(self, dtype: torch.dtype, tokens: Tensor, times: int = 1) -> tuple[Tensor, Tensor]:
        """log p [B, K], and its gradients [K, B, D], by plain autograd in a dtype, of the rows so many times."""
        B, tokens = len(tokens), tokens.repeat(times, 1)
        rows = self.rows.repeat(times, 1).to(dtype).requires_grad_()
        x = torch.nn.functional.layer_norm(rows, rows.shape[1:]) @ self.weight.to(dtype).T
        x = self.phi.scale * (x if self.bias is None else x + self.bias.to(dtype))
        z = x if self.phi.cap is None else self.phi.cap * torch.tanh(x / self.phi.cap)
        log_p = z.log_softmax(1).gather(1, tokens)
        grads = [torch.autograd.grad(log_p[:, i].sum(), rows, retain_graph=True)[0] for i in range(tokens.shape[1])]
        return log_p.detach()[:B], torch.stack(grads)[:, :B]


def read(head, rows: Tensor, top_k: int, token_ids: Tensor | None = None, device: torch.device = CPU) -> Reading:
    rows, token_ids = placed((rows, token_ids), device)
    return on_cpu(distribution(head, rows, Asked(top_k, token_ids)).reading)


KINDS = pytest.mark.parametrize(
    ("phi", "biased"),
    [(Phi(), False), (Phi(), True), (Phi(0.3), False), (Phi(1.0, 9.0), False), (Phi(4.0, 12.0), True)],
)


@pytest.fixture(params=[1, 68 * 100, 2**26], ids=["a token at a time", "chunks with a rest", "one chunk"])
def chunks(request, monkeypatch, device):
    monkeypatch.setitem(head.VOCABULARY_CHUNK_ELEMENTS, device.type, request.param)


def assert_right_to_float32(problem: Problem, reading: Reading) -> None:
    """Against float64; where float32 itself cannot do better, no worse than plain autograd in float32.

    That is taken of the rows once and four times: processors sum products of few rows and of many in other orders, and
    either may be the worse.
    """
    log_p, grads = problem.truth(torch.float64, reading.token_ids)
    plain = [problem.truth(torch.float32, reading.token_ids, times) for times in (1, 4)]
    allowed = max(4e-6, *(1.5 * float((plain_log_p - log_p).abs().max()) for plain_log_p, _ in plain))
    torch.testing.assert_close(reading.log_probs.double(), log_p, atol=allowed, rtol=0)
    worst, *plain_worst = ((x.double() - grads).norm(dim=2).max() for x in (reading.cotangents, *(g for _, g in plain)))
    assert worst <= max(1.5 * max(plain_worst), 2e-6 * grads.norm(dim=2).max())


@KINDS
@pytest.mark.parametrize("B", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("logits_std", [1.0, 4.0])
def test_cotangents_are_right_to_float32(B, logits_std, phi, biased, device):
    problem = Problem(B, logits_std, phi, biased, device)
    reading = read(problem.head, problem.rows, 10, device=device)
    assert reading.log_probs.dtype == reading.cotangents.dtype == torch.float32
    assert (reading.log_probs[:, :-1] >= reading.log_probs[:, 1:]).all()
    assert_right_to_float32(problem, reading)


@pytest.mark.parametrize("B", [1, 2])
def test_few_rows_are_as_right_as_many(B, device):
    """Products of fewer than four rows take another path in some libraries; in this head they must not."""
    problem = Problem(B, 1.0, device=device)
    reading = read(problem.head, problem.rows, 10, device=device)
    _, grads = problem.truth(torch.float64, reading.token_ids)
    assert relative(reading.cotangents, grads) < 3e-7


@KINDS
def test_chunks_of_the_vocabulary_do_not_matter(phi, biased, chunks, device):
    problem = Problem(2, 1.0, phi, biased, device)
    assert_right_to_float32(problem, read(problem.head, problem.rows, 6, device=device))


@pytest.fixture(params=[2, 3])
def threads(request):
    """So many threads within a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@KINDS
@pytest.mark.parametrize("B", [1, 5])
def test_a_thread_for_each_part_of_the_vocabulary(B, phi, biased, chunks, threads, device):
    problem = Problem(B, 1.0, phi, biased, device)
    assert_right_to_float32(problem, read(problem.head, problem.rows, 6, device=device))


@pytest.mark.parametrize("v", [1, 7, 12])
def test_products_with_the_vocabulary_do_not_depend_on_the_threads(v, threads):
    generator = torch.Generator().manual_seed(v)
    x, y, weight = (torch.randn(*shape, generator=generator) for shape in ((5, 4), (5, v), (v, 4)))
    torch.testing.assert_close(head.times_rows(x, weight), x @ weight.T)
    torch.testing.assert_close(head.sum_rows(y, weight), y @ weight)


@pytest.mark.parametrize("chosen", [False, True])
@KINDS
def test_what_the_other_tokens_have_is_summed_in_the_same_pass(phi, biased, chosen, chunks, monkeypatch, device):
    """The rest's gradient, and random vectors of the rest, against float64 sums over all tokens one by one."""
    problem, passes, right = Problem(3, 4.0, phi, biased, device), [], UnembeddingHead.chunks
    monkeypatch.setattr(UnembeddingHead, "chunks", lambda self, dtype: passes.append(1) or right(self, dtype))
    tokens = torch.randint(0, 5003, (3, 6), generator=torch.Generator().manual_seed(1)) if chosen else None
    probes = Probes(2, [5, 6, 7])
    rows, tokens = placed((problem.rows, tokens), device)
    reading = on_cpu(distribution(problem.head, rows, Asked(6, tokens, True, probes, of_rest=True)).reading)
    assert len(passes) == 1
    assert_right_to_float32(problem, reading)
    every = torch.arange(5003).expand(3, -1)
    is_rest = ~(every[:, :, None] == reading.token_ids[:, None]).any(2)

    def truth(dtype: torch.dtype) -> list[Tensor]:
        rows = problem.rows.to(dtype).requires_grad_()
        x = torch.nn.functional.layer_norm(rows, rows.shape[1:]) @ problem.weight.to(dtype).T
        x = phi.scale * (x if problem.bias is None else x + problem.bias.to(dtype))
        log_p = (x if phi.cap is None else phi.cap * torch.tanh(x / phi.cap)).log_softmax(1)
        log_rest = torch.where(is_rest, log_p, -torch.inf).logsumexp(1)
        q = torch.where(is_rest, (log_p - log_rest[:, None]).exp(), 0).detach()
        signed = probes.signs(5003).to(dtype) * torch.where(is_rest, log_p.exp(), 0).sqrt().detach()[:, None]
        # Less what the rest has in common, which is an outcome of its own.
        signed = signed - signed.sum(2, keepdim=True) * q[:, None]
        outputs = [log_rest.sum(), *((signed[:, s] * log_p).sum() for s in range(2))]
        return [log_rest.detach(), *(torch.autograd.grad(y, rows, retain_graph=True)[0] for y in outputs)]

    log_rest, *gradients = truth(torch.float64)
    torch.testing.assert_close(reading.log_rest.double(), log_rest, atol=4e-6, rtol=0)
    found = [reading.rest[0], *reading.random]
    for one, expected, plain in zip(found, gradients, truth(torch.float32)[1:], strict=True):
        error, own = float((one - expected).norm()), float((plain - expected).norm())
        assert error <= max(2 * own, 1e-4 * float(expected.norm()))


def test_a_token_with_almost_all_the_probability():
    """Its row and the expected row all but cancel: F must be right to float32 all the same."""
    for seed in range(6):
        problem = Problem(5, 2.0)
        generator = torch.Generator().manual_seed(seed)
        problem.rows = 3 * torch.randn(5, 68, generator=generator)
        at = torch.randint(0, 5003, (5,), generator=generator)
        normed = torch.nn.functional.layer_norm(problem.rows, (68,))
        problem.weight[at] = (normed * torch.linspace(0.1, 0.4, 5)[:, None]).bfloat16()
        reading = read(problem.head, problem.rows, 5)
        log_p, grads = problem.truth(torch.float64, reading.token_ids)
        assert log_p[:, 0].max() > -1e-7
        for b in range(5):
            found = fisher_matrix(reading.log_probs[b], reading.cotangents[:, b])
            assert relative(found, fisher_matrix(log_p[b], grads[:, b])) < 3e-5


def test_a_row_does_not_depend_on_the_rows_beside_it(device):
    problem = Problem(5, 3.0, device=device)
    together = read(problem.head, problem.rows, 6, device=device)
    for b in range(5):
        alone = read(problem.head, problem.rows[b : b + 1], 6, device=device)
        assert torch.equal(alone.token_ids[0], together.token_ids[b])
        torch.testing.assert_close(alone.log_probs[0], together.log_probs[b], atol=4e-6, rtol=0)
        assert relative(alone.cotangents[:, 0], together.cotangents[:, b]) < 1e-6


def test_rows_of_bfloat16_are_read_in_float32():
    problem = Problem(2, 3.0)
    low = problem.rows.bfloat16()
    reading, widened = read(problem.head, low, 6), read(problem.head, low.float(), 6)
    for found, expected in zip(reading, widened, strict=True):
        assert torch.equal(found, expected)


def test_tokens_of_the_callers_choice_and_logits_as_they_come():
    problem = Problem(3, 3.0)
    tokens = torch.randint(0, 5003, (3, 4), generator=torch.Generator().manual_seed(1))
    reading = read(problem.head, problem.rows, 9, tokens)
    log_p, grads = problem.truth(torch.float64, tokens)
    assert torch.equal(reading.token_ids, tokens)
    torch.testing.assert_close(reading.log_probs.double(), log_p, atol=4e-6, rtol=0)
    assert relative(reading.cotangents, grads) < 1e-6

    logits = torch.nn.functional.layer_norm(problem.rows, (68,)) @ problem.weight.float().T
    plain = read(LogitsHead(), logits, 9, tokens)
    torch.testing.assert_close(plain.log_probs, reading.log_probs, atol=4e-6, rtol=0)
    expected = torch.nn.functional.one_hot(tokens, 5003).transpose(0, 1) - logits.softmax(1)
    torch.testing.assert_close(plain.cotangents, expected, atol=1e-6, rtol=0)
    best = read(LogitsHead(), logits, 9)
    assert torch.equal(best.token_ids, logits.sort(dim=1, descending=True, stable=True).indices[:, :9])


def test_logits_of_minus_infinity_have_no_probability():
    """As models give to tokens that are only there to round the vocabulary up."""
    problem = Problem(2, 3.0, biased=True)
    problem.bias[4000:] = -torch.inf
    reading = read(problem.head, problem.rows, 6)
    log_p, grads = problem.truth(torch.float64, reading.token_ids)
    assert reading.token_ids.max() < 4000
    torch.testing.assert_close(reading.log_probs.double(), log_p, atol=4e-6, rtol=0)
    assert relative(reading.cotangents, grads) < 1e-6


# Models with heads of every kind.

HEADS = {  # family: (changes, what the head must be found to be)
    "gemma2": ({"final_logit_softcapping": 5.0}, Phi(1.0, 5.0)),
    "granite": ({}, Phi(1 / 0.25)),
    "cohere": ({"logit_scale": 0.0625}, Phi(0.0625)),
    "phi": ({}, Phi()),
    "gpt2": ({}, Phi()),
}


@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
@pytest.mark.parametrize("family", HEADS)
def test_soft_caps_scales_and_biases(family, kernel, device):
    changes, phi = HEADS[family]
    model, rows, layer = tiny(family, **changes), prompts(LENGTHS), block(family, 1)
    there, batch = placed((model, padded(rows, "left")), device)
    scores = on_cpu(fisher_scores(there, *batch, layers=layer, top_k=6, kernel=kernel))
    assert known_of(there).parts.head.phi == phi  # taken apart, not left to the model
    assert (known_of(there).parts.head.bias is not None) == (family == "phi")
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=6)
        assert torch.equal(scores.token_ids[b], expected.token_ids)
        torch.testing.assert_close(scores.log_probs[b], expected.log_probs, atol=1e-6, rtol=0)
        assert relative(scores.gradients[layer][b], expected.gradients) < 1e-6


@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_a_soft_cap_at_large_logits(kernel):
    """Where the cap bends most: without its derivative the scores would be several times too long."""
    model, rows, layer = fresh("gemma2"), prompts(LENGTHS), block("gemma2", 1)
    with torch.no_grad():
        model.lm_head.weight *= 20
    tokens = torch.stack(prompts((20,) * len(rows), seed=8))
    scores = fisher_scores(model, *padded(rows, "right"), layers=layer, token_ids=tokens, kernel=kernel)
    assert known_of(model).parts.head.phi == Phi(1.0, 30.0)
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, token_ids=tokens[b])
        assert relative(scores.gradients[layer][b], expected.gradients) < 1e-5
        with torch.no_grad():
            hidden = model.model(input_ids=row[None]).last_hidden_state[0, -1]
            raw, capped = model.lm_head(hidden), model(input_ids=row[None]).logits[0, -1]
        assert raw.abs().max() > 60 and capped.abs().max() < 30.001


@pytest.mark.parametrize("seed", range(3))
def test_a_head_that_the_first_prompts_do_not_show_is_found(seed):
    """At small logits a soft-cap is the identity to rounding: the head must be told apart by other means."""
    model, layer = fresh("gemma2", torch.float32, seed), block("gemma2", 1)
    with torch.no_grad():
        model.lm_head.weight *= 1e-4
    rows = prompts(LENGTHS, seed=seed)
    fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=6)
    assert known_of(model).parts.head.phi == Phi(1.0, 30.0)


def test_all_of_the_vocabulary_and_one_more():
    model, (ids, mask) = tiny("phi"), padded(prompts(LENGTHS), "right")
    assert (
        fisher_scores(model, ids, mask, layers=1, top_k=VOCABULARY)
        .log_probs.exp()
        .sum(1)
        .allclose(torch.ones(len(ids), dtype=torch.float64))
    )
    for kernel in ("layerwise", "whole"):
        with pytest.raises(ValueError, match=f"expected 1 to {VOCABULARY}"):
            fisher_scores(model, ids, mask, layers=1, top_k=VOCABULARY + 1, kernel=kernel)
