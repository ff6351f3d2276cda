"""torch.autocast around a call: the dtype is the model's, so that the numbers are those without it, to the bit."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from models import WIDTH, fresh, prompts

from fisher_vmap import FisherModel, compress, fisher_full, fisher_scores, measured_kl

IDS = torch.stack(prompts([9, 9]))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0


def tensors_in(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, np.ndarray | float):
        yield torch.as_tensor(found)
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors_in(value)
    elif isinstance(found, tuple | list):
        for value in found:
            yield from tensors_in(value)


def vectors() -> torch.Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


def with_network(product: Any) -> Any:
    def call(model: Any, _tokenizer: Any) -> Any:
        with FisherModel(model, layers=1).linearize(IDS, MASK) as net:
            return product(net)

    return call


def of_records(model: Any, tokenizer: Any) -> Any:
    records = FisherModel(model, tokenizer, layers=1, top_k=3, trace_samples=2).fisher(["w1 w2 w3", "w4"], rank=2)
    return [(r.S, r.V, r.Q, r.log_probs, r.position_energy, r.trace, r.relative_error) for r in records]


CALLS = {
    "fisher_scores": lambda model, _: fisher_scores(model, IDS, MASK, layers=[0, 2], top_k=3, trace_samples=2),
    "whole": lambda model, _: fisher_scores(model, IDS, MASK, layers=1, top_k=3, kernel="whole"),
    "loop": lambda model, _: fisher_scores(model, IDS, MASK, layers=1, top_k=3, kernel="loop"),
    "fisher_full": lambda model, _: fisher_full(model, IDS, MASK, layers=[0, 2], rank=3),
    "compress": lambda _model, _: compress(vectors(), 2),
    "FisherModel.scores": lambda model, _: FisherModel(model, layers=1).scores(IDS, MASK),
    "FisherModel.estimate": lambda model, _: FisherModel(model, layers=1).estimate(IDS, MASK),
    "FisherModel.numbers": lambda model, _: FisherModel(model, layers=1, trace_samples=2).numbers([[1, 2, 3], [4]], 2),
    "FisherModel.fisher": of_records,
    "pullback": with_network(lambda net: net.pullback(vectors())),
    "pushforward": with_network(lambda net: net.pushforward(vectors())),
    "of tokens": with_network(lambda net: (net.pullback(token_ids=IDS[:, :2]), net.metric().probs)),
    "to tokens": with_network(lambda net: net.pushforward(vectors(), token_ids=IDS[:, :2])),
    "measured_kl": lambda model, _: measured_kl(model, IDS[0], 1, 0.01 * vectors()[0]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_without_autocast(name, family, dtype, tokenizer):
    call = CALLS[name]
    expected = list(tensors_in(call(fresh(family, torch.float32), tokenizer)))
    with torch.autocast("cpu", dtype=dtype):
        found = list(tensors_in(call(fresh(family, torch.float32), tokenizer)))
        assert torch.is_autocast_enabled("cpu")
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_model_opened_before_is_not_cast_either():
    opened = FisherModel(fresh("llama", torch.float32), layers=1, top_k=3)
    expected = opened.scores(IDS, MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16), opened.linearize(IDS, MASK) as net:
        pulled = net.pullback(vectors())
    with opened.linearize(IDS, MASK) as net:
        again = net.pullback(vectors())
    torch.testing.assert_close(pulled, again, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(opened.scores(IDS, MASK).gradients, expected.gradients, rtol=0, atol=0)
