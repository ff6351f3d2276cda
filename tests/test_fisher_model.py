"""`FisherModel`: from prompts to matrices, and the linearised upper network."""

import sys

import numpy as np
import pytest
import torch
from models import WIDTH, WORDS, block, fresh, padded, prompts, tiny
from oracles import plain_scores, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import ToyLM

from fisher_vmap import FisherModel, compress, fisher_scores
from fisher_vmap.linearize import blockwise
from fisher_vmap.linearize.output import Asked, distribution
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import validation

LENGTHS = (7, 1, 12, 3)


def texts(count: int) -> list[str]:
    """Prompts of 1 to 13 words."""
    return [" ".join(WORDS[(3 * n + 7 * i) % 99] for i in range(1 + (5 * n) % 13)) for n in range(count)]


def ids_of(tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def test_records_come_in_order_and_are_the_scores_compressed(tokenizer):
    model, layer = tiny("gpt2", torch.float32), block("gpt2", 1)
    opened = FisherModel(model, tokenizer, layers=1, top_k=6, batch_size=3)
    for i, (text, record) in enumerate(zip(texts(11), opened.fisher(texts(11), rank=4), strict=True)):
        assert record.index == i and record.text == text and record.status == "ok"
        scores = fisher_scores(model, ids_of(tokenizer, text)[None], layers=layer, top_k=6)
        low = compress(scores.factor(), 4)
        assert record.token_ids.tolist() == scores.token_ids[0].tolist()
        np.testing.assert_allclose(record.log_probs, scores.log_probs[0], atol=1e-5)
        np.testing.assert_allclose(record.S, low.singular_values[0], rtol=1e-4, atol=1e-6 * record.S[0])
        F = (low.vectors[0].T * low.singular_values[0]) @ low.vectors[0]
        np.testing.assert_allclose(record.matrix(), F, atol=2e-5 * float(record.S[0]))
        np.testing.assert_allclose(record.U, record.V.T)
        np.testing.assert_allclose(record.position_energy, scores.position_energy[layer][0], rtol=1e-4)
        assert len(record.position_energy) == len(text.split())
        np.testing.assert_allclose(record.residual_norm, scores.residual_norm[layer][0], rtol=1e-5)
        np.testing.assert_allclose(record.trace, low.trace[0], rtol=1e-4)
        np.testing.assert_allclose(record.mass, scores.log_probs[0].exp().sum(), rtol=1e-5)
        x = np.linspace(-1, 1, WIDTH)
        np.testing.assert_allclose(record.matvec(x), record.matrix() @ x, atol=1e-5 * record.S[0])


def test_the_scores_come_back_from_a_record(tokenizer):
    opened = FisherModel(tiny("gpt2"), tokenizer, layers=1, top_k=5)
    for text, record in zip(texts(4), opened.fisher(texts(4), rank=5), strict=True):
        expected = plain_scores(tiny("gpt2"), ids_of(tokenizer, text), block("gpt2", 1), top_k=5)
        assert relative(torch.from_numpy(record.scores()), expected.gradients) < 1e-5


def test_prompts_are_taken_as_they_are_needed(tokenizer):
    opened = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=-1, top_k=3)
    taken = []

    def endless():
        for n in range(10**9):
            taken.append(n)
            yield texts(40)[n % 40]

    stream = opened.fisher(endless(), rank=2)
    assert next(stream).index == 0
    assert len(taken) <= 64
    later = [next(stream) for _ in range(60)]  # across the end of what is looked at together
    assert [record.index for record in later] == list(range(1, 61))
    assert [record.text for record in later] == [texts(40)[n % 40] for n in range(1, 61)]


def test_several_layers_and_no_prompts(tokenizer):
    names = [block("gpt2", 2), block("gpt2", 0)]
    opened = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=names, top_k=3)
    assert opened.layers == names and opened.widths == dict.fromkeys(names, WIDTH) and opened.vocabulary == 101
    assert list(opened.fisher([])) == []
    for record in opened.fisher(texts(3), rank=2):
        assert list(record.layers) == names
        with pytest.raises(AttributeError, match="2 layers"):
            _ = record.S
        for name, own in record.layers.items():
            assert own.layer == name and own.S.shape == (2,) and own.V.shape == (2, WIDTH)


def test_a_conversation_is_a_prompt(tokenizer):
    opened = FisherModel(tiny("gpt2", torch.float32), tokenizer, layers=1, top_k=3)
    text = texts(3)[2]
    first, second = opened.fisher([text, [{"role": "user", "content": text}]], rank=3)
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_allclose(first.S, second.S, rtol=1e-5)


def test_a_prompt_without_text_or_numbers_fails_alone(tokenizer):
    model = fresh("gpt2", torch.float32)
    with torch.no_grad():
        model.transformer.wte.weight[ids_of(tokenizer, "w77")[0]] = torch.nan
        model.lm_head.weight = torch.nn.Parameter(tiny("gpt2", torch.float32).lm_head.weight.detach().clone())
    opened = FisherModel(model, tokenizer, layers=1, top_k=3)
    records = list(opened.fisher(["w1 w2", "", "w3 w77", "   ", "w4 w5 w6"], rank=2))
    assert [record.index for record in records] == [0, 1, 2, 3, 4]
    assert [record.status == "ok" for record in records] == [True, False, False, False, True]
    assert records[1].reason and "not finite" in records[2].reason
    for record in (records[0], records[4]):
        assert np.isfinite(record.S).all() and (record.S > 0).all()


def test_settings_are_those_of_fisher_scores():
    model, rows = fresh("gpt2"), prompts(LENGTHS)
    ids, mask = padded(rows, "left")
    opened = FisherModel(model, layers=1, top_k=4, positions="last", kernel="whole", chunk_size=2)
    assert opened.forms == {}
    found = opened.scores(ids, mask)
    expected = fisher_scores(model, ids, mask, layers=1, top_k=4, positions="last")
    assert relative(found.gradients[block("gpt2", 1)], expected.gradients[block("gpt2", 1)]) < 1e-12
    assert list(opened.forms) == [block("gpt2", 1)]
    ran = opened.forms[block("gpt2", 1)]
    assert (ran["form"], ran["why"], ran["precision"]) == ("whole", "asked for", "model")
    assert ran["audit"] == "2 of 2 batches compared, and they agreed"
    other = opened.scores(ids, mask, positions="all", top_k=2)
    assert other.token_ids.shape == (4, 2)
    assert relative(other.gradients[block("gpt2", 1)], expected.gradients[block("gpt2", 1)][:, :2]) > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "transformer.h.9"}, "no module named 'transformer.h.9'"),
        ({"layers": 1, "top_k": 102}, "top_k is 102; expected 1 to 101"),
        ({"layers": 1, "kernel": "fast"}, "kernel is 'fast'"),
        ({"layers": 1, "positions": "first"}, "positions is 'first'"),
    ],
)
def test_what_can_be_checked_is_checked_when_it_is_opened(arguments, message):
    with pytest.raises(ValueError, match=message):
        FisherModel(tiny("gpt2"), **arguments)


def test_prompts_need_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        next(FisherModel(tiny("gpt2"), layers=1).fisher(["w1"]))


# The linearised network.


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize(
    ("make", "layers", "tolerance"),
    [
        (lambda: tiny("gpt2"), [block("gpt2", 0), "transformer.h.2.mlp"], 1e-10),
        (lambda: tiny("opt"), [block("opt", 1)], 1e-6),  # its plain attention has a softmax in float32
        (ToyLM, ["blocks.3"], 1e-10),
        (lambda: tiny("llama"), [block("llama", 0)], 1e-5),
    ],
    ids=["gpt2", "opt", "toy", "llama"],
)
def test_pullback_and_pushforward_are_adjoint(make, layers, tolerance, positions):
    """u . (J v) = (J^T u) . v"""
    opened = FisherModel(make(), layers=layers, top_k=3, positions=positions)
    ids, mask = padded(prompts(LENGTHS), "left", extra=1)
    u, v = draw(len(ids), 3, WIDTH, seed=1), draw(len(ids), 2, WIDTH, seed=2)
    with opened.linearize(ids, mask) as net:
        assert net.layers == layers
        for layer in layers:
            left = torch.einsum("bid,bjd->bij", u, net.pushforward(v, layer).double())
            right = torch.einsum("bid,bjd->bij", net.pullback(u, layer).double(), v)
            assert relative(left, right) < tolerance
            assert left.abs().min() > 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_pulled_back_cotangents_of_the_head_are_the_scores(positions, side):
    names = [block("gpt2", 0), block("gpt2", 3)]
    opened = FisherModel(tiny("gpt2"), layers=names, top_k=5, positions=positions)
    ids, mask = padded(prompts(LENGTHS), side)
    scores = opened.scores(ids, mask)
    with opened.linearize(ids, mask) as net:
        reading = distribution(known_of(opened.model).parts.head, net.output, Asked(5)).reading
        assert torch.equal(reading.token_ids, scores.token_ids)
        for name in names:
            pulled = net.pullback(reading.cotangents.transpose(0, 1), name)
            assert relative(pulled, scores.gradients[name]) < 1e-10


def test_a_pushforward_is_what_a_small_bias_does():
    model, layer, rows = tiny("gpt2"), block("gpt2", 1), prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    v = draw(len(rows), 1, WIDTH, seed=3)
    with FisherModel(model, layers=layer).linearize(ids, mask) as net:
        pushed = net.pushforward(v)[:, 0]

    def last_row(row: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        def add(_module, _args, output):
            return output + bias

        with model.get_submodule(layer).register_forward_hook(add), torch.no_grad():
            seen = []
            handle = model.get_submodule(block("gpt2", -1)).register_forward_hook(lambda _m, _a, out: seen.append(out))
            model(input_ids=row[None])
            handle.remove()
        return seen[0][0, -1]

    for b, row in enumerate(rows):
        step = 1e-5 * v[b, 0]
        assert relative((last_row(row, step) - last_row(row, -step)) / 2e-5, pushed[b]) < 1e-7


def test_what_is_wrong_with_vectors_is_said_and_the_model_left_as_it_was():
    model = fresh("llama")
    model.train()
    ids, mask = padded(prompts(LENGTHS), "right")
    opened = FisherModel(model, layers=[0, 1])
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with opened.linearize(ids, mask) as net:
        with pytest.raises(ValueError, match="expected one of the hooked layers"):
            net.pullback(torch.zeros(4, 1, WIDTH))
        with pytest.raises(ValueError, match=r"shape \(4, 36\); expected \[4, K, 36\]"):
            net.pushforward(torch.zeros(4, WIDTH), opened.layers[0])
    with pytest.raises(KeyError, match="planted"), opened.linearize(ids, mask):
        raise KeyError("planted")
    assert model.training and all(module.training for module in model.modules())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert model.config._attn_implementation == tiny("llama").config._attn_implementation


def test_records_of_every_estimator_say_how_good_they_are(tokenizer):
    model = tiny("gpt2", torch.float32)
    for estimator, samples in (("full", None), ("topk", 3), ("topk", None)):
        opened = FisherModel(model, tokenizer, layers=1, top_k=5, estimator=estimator, trace_samples=samples)
        for record in opened.fisher([*texts(3), ""], rank=4):
            assert record.Q.shape == (5, 4)
            known = record.status == "ok" and (estimator, samples) != ("topk", None)
            for value in (record.trace_full, record.trace_full_error, record.share_full, record.relative_error):
                assert (value > 0) == known and np.isnan(value) != known
            assert np.isnan(record.share_kept) == (record.status != "ok")


def told(caplog):
    """What `FisherModel` logged."""
    names = ("fisher_vmap.fisher_model", "fisher_vmap.data.batching")
    return [record.getMessage() for record in caplog.records if record.name in names]


def too_small(monkeypatch, most):
    """A pull of more than `most` cotangents at a time runs out of memory; returns the numbers that were tried."""
    tried, right = [], blockwise.pullback_blocks

    def limited(recording, cotangents, layers, chunk_size, *rest):
        tried.append(chunk_size or cotangents.shape[2])
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from right(recording, cotangents, layers, chunk_size, *rest)

    monkeypatch.setattr(blockwise, "pullback_blocks", limited)
    return tried


@pytest.mark.parametrize("options", [{}, {"estimator": "full", "oversampling": 3, "trace_samples": 0}])
def test_a_prompt_out_of_memory_takes_half_the_cotangents_at_a_time(monkeypatch, caplog, options):
    opened = FisherModel(tiny("llama", torch.float32), layers=1, top_k=7, audit="off", **options)
    (expected,) = opened.numbers([list(range(1, 9))], 4)
    tried = too_small(monkeypatch, 2)
    (found,) = opened.numbers([list(range(1, 9))], 4)
    assert sorted(set(tried), reverse=True) == [7, 4, 2]
    ((layer, result),) = found.layers.items()
    np.testing.assert_allclose(result.S, expected.layers[layer].S, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    assert told(caplog) == ["out of memory on a prompt of 8 tokens: cotangent_chunk 2 was used"]


def test_a_prompt_that_fits_with_no_chunk_is_out_of_memory(monkeypatch):
    opened = FisherModel(tiny("llama", torch.float32), layers=1, top_k=7, audit="off")
    opened.numbers([[1, 2, 3]], 4)
    tried = too_small(monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        opened.numbers([list(range(1, 9))], 4)
    assert tried == [7, 4, 2, 1]


def test_a_batch_out_of_memory_is_halved(tokenizer, monkeypatch, caplog):
    opened = FisherModel(tiny("llama", torch.float32), tokenizer, layers=1, top_k=4, batch_size=4, audit="off")
    expected = [record.S for record in opened.fisher(texts(4), rank=4)]
    right = FisherModel._numbers

    def limited(self, prompts_ids, *args):
        if len(prompts_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, prompts_ids, *args)

    monkeypatch.setattr(FisherModel, "_numbers", limited)
    for record, S in zip(opened.fisher(texts(4), rank=4), expected, strict=True):
        np.testing.assert_allclose(record.S, S, rtol=1e-4, atol=1e-6)
    assert told(caplog)[0].startswith("out of memory on 4 prompts of up to")


class WithoutFloat64(TorchDispatchMode):
    """Raises as a device without float64 does, unless an operator's floating inputs are in float64 already.

    Those stand for what has been moved to the CPU; `moving` is True while the package moves something there.
    """

    moving = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
        if made and not self.moving and any(x.dtype != torch.float64 for x in inputs):
            raise TypeError(f"{func}: the device has no float64")
        return out


@pytest.mark.parametrize(
    "options",
    [{"include_rest": True, "trace_samples": 3}, {"trace_samples": 2}, {"estimator": "full"}, {"kernel": "whole"}],
    ids=["rest", "traces", "full", "whole"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_device_without_float64_computes_the_same(family, options, monkeypatch):
    batch = [list(range(1, 9)), [4, 5, 6]]

    def run():
        return FisherModel(fresh(family, torch.float32), layers=1, top_k=5, audit="always", **options).numbers(batch, 4)

    expected, mode, right = run(), WithoutFloat64(), validation.in_float64

    def moved(x):
        mode.moving = True
        try:
            return right(x)
        finally:
            mode.moving = False

    monkeypatch.setattr(validation, "WITHOUT_FLOAT64", ("cpu",))
    for name, module in list(sys.modules.items()):
        if name.startswith("fisher_vmap") and hasattr(module, "in_float64"):
            monkeypatch.setattr(module, "in_float64", moved)
    with mode:
        for operation in (torch.Tensor.double, lambda x: x.new_zeros(2, dtype=torch.float64)):
            with pytest.raises(TypeError, match="no float64"):
                operation(torch.ones(3))
        found = run()
    for one, other in zip(found, expected, strict=True):
        for layer, result in one.layers.items():
            np.testing.assert_allclose(result.S, other.layers[layer].S, rtol=1e-4, atol=1e-6)
