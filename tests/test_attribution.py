"""Attribution at the embedding: plain autograd's sum over tokens and targets of p |g at the position|^2."""

import numpy as np
import pytest
import torch
from devices import on
from models import VOCABULARY, WIDTH, padded, prompts, tiny, word_tokenizer
from oracles import log_probabilities, position_scores, relative
from torch import Tensor, nn
from toys import ToyLM

from fisher_vmap import FisherModel, fisher_full, fisher_sampled, fisher_scores

EMBEDDING = {"gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in", "llama": "model.embed_tokens"}
EXACT = {"gpt2": 1e-8, "gpt_neox": 1e-6, "llama": 1e-5}  # llama computes its norms in float32 whatever the dtype
LENGTHS, TARGETS = (6, 3, 9), ((1, 4, 5), (2,), (0, 7))


def expected(model, row, layer, targets, top_k=None):
    """[T], one target after the other, each of the prompt up to there: what follows it cannot matter to it."""
    total = torch.zeros(len(row), dtype=torch.float64)
    for at in targets:
        log_p = log_probabilities(model, row[: at + 1]).detach()
        tokens = log_p.sort(descending=True, stable=True).indices[:top_k]
        grads_KTD = position_scores(model, row[: at + 1], layer, tokens)
        total[: at + 1] += torch.einsum("k,ktd->t", log_p[tokens].exp(), grads_KTD**2)
    return total


def mask_of(targets, mask):
    """The targets, counted from each prompt's first token, in the columns of a padded batch."""
    chosen = torch.zeros_like(mask)
    for b, places in enumerate(targets):
        chosen[b, mask[b].argmax() + torch.tensor(places)] = 1
    return chosen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("top_k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("family", EMBEDDING)
def test_of_one_target(family, top_k, side, device):
    model, layer, rows = tiny(family), EMBEDDING[family], prompts(LENGTHS)
    ids, mask = padded(rows, side, extra=1)
    energy = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=top_k).position_energy[layer]
    for b, row in enumerate(rows):
        assert relative(energy[b, mask[b] == 1], expected(model, row, layer, [len(row) - 1], top_k)) < EXACT[family]
        assert not energy[b, mask[b] == 0].any()


@pytest.mark.parametrize("kernel", ["auto", "whole", "loop"])
@pytest.mark.parametrize("top_k", [3, VOCABULARY])
@pytest.mark.parametrize("family", EMBEDDING)
def test_of_several_targets(family, top_k, kernel, device):
    model, layer, rows = tiny(family), EMBEDDING[family], prompts(LENGTHS)
    ids, mask = padded(rows, "left", extra=1)
    options = {"layers": layer, "top_k": top_k, "targets": mask_of(TARGETS, mask), "kernel": kernel}
    energy = on(device, fisher_scores)(model, ids, mask, **options).position_energy[layer]
    for b, row in enumerate(rows):
        assert relative(energy[b, mask[b] == 1], expected(model, row, layer, TARGETS[b], top_k)) < EXACT[family]


@pytest.mark.parametrize("targets", ["last", "all"])
def test_of_drawn_scores_within_its_error(targets):
    """`sampled` is unbiased at every position by itself."""
    model, layer, (row,) = tiny("gpt2"), EMBEDDING["gpt2"], prompts((7,))
    found = fisher_sampled(model, row[None], layers=layer, samples=4000, targets=targets)
    truth = expected(model, row, layer, range(7) if targets == "all" else [6])
    # |g|^2 of a position spreads about as much as its mean: 4000 of them are within a few per cent.
    np.testing.assert_allclose(found.position_energy[layer][0], truth, rtol=0.15, atol=float(truth.max()) * 1e-3)


def test_full_of_one_target_is_that_of_all_tokens():
    model, layer, rows = tiny("gpt2"), EMBEDDING["gpt2"], prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    energy = fisher_full(model, ids, mask, layers=layer, rank=WIDTH, oversampling=0).position_energy[layer]
    for b, row in enumerate(rows):
        assert relative(energy[b, : len(row)], expected(model, row, layer, [len(row) - 1])) < EXACT["gpt2"]


@pytest.mark.parametrize("targets", ["last", "all", "completion"])
def test_the_record_of_a_text_has_a_number_for_each_of_its_tokens(targets):
    """From a text and its words to the numbers, the completion's tokens last."""
    model, layer = tiny("gpt2"), EMBEDDING["gpt2"]
    fm = FisherModel(model, word_tokenizer(), layers=layer, top_k=VOCABULARY, targets=targets, precision="model")
    given = {"completions": ["w7 w8", "w9"]} if targets == "completion" else {}
    for record in fm.fisher(["w3 w1 w4 w1 w5", "w9 w2"], rank=3, **given):
        written = [token for ids in record.completion_ids or () for token in ids]
        row = torch.tensor([int(word[1:]) + 2 for word in record.text.split()] + written)
        n, start = len(row), len(row) - len(written)
        places = {"last": [n - 1], "all": range(n), "completion": range(start - 1, n - 1)}[targets]
        assert record.attribution().shape == (n,) and len(record.prompt_tokens) == start
        assert relative(torch.tensor(record.attribution()), expected(model, row, layer, places)) < 1e-5


class ReadsOne(nn.Module):
    """A block that gives, from one position on, what stands at that position alone."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, hidden_states: Tensor) -> Tensor:
        known = hidden_states[:, self.at : self.at + 1].expand(-1, max(0, hidden_states.shape[1] - self.at), -1)
        return torch.tanh(torch.cat([hidden_states[:, : self.at], known], 1))


@pytest.mark.parametrize("at", [0, 2, 6])
@pytest.mark.parametrize("targets", ["last", "two"])
def test_the_one_token_that_matters_is_found(at, targets):
    model, (row,) = ToyLM([ReadsOne(at), ReadsOne(at)]), prompts((9,))
    mask = torch.zeros(1, 9, dtype=torch.int64)
    mask[0, [7, 8] if targets == "two" else [8]] = 1
    energy = fisher_scores(model, row[None], layers="embed", top_k=5, targets=mask).position_energy["embed"][0]
    assert energy[at] > 0 and not energy[torch.arange(9) != at].any()
