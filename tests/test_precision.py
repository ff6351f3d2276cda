"""Low precision against the float64 truth: the kernel may be no further from it than a plain loop in the same dtype.

The truth has the very same weights, widened. The tokens are the kernel's in all three.
"""

import copy

import pytest
import torch
from models import block, padded, prompts, tiny
from oracles import plain_scores, relative

from fisher_vmap import fisher_scores

SEEDS = range(8)
LENGTHS = (18, 5, 40)
SLACK = 1.1  # two ways to round are never equally good on every prompt
KERNELS = ("layerwise", "whole", "loop")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_further_from_the_truth_than_a_plain_loop(family, dtype):
    layer = block(family, 0)
    errors: dict[str, list[float]] = {name: [] for name in (*KERNELS, "plain")}
    for seed in SEEDS:
        model, rows = tiny(family, dtype, seed), prompts(LENGTHS, seed=seed)
        truth = copy.deepcopy(model).double()
        ids, mask = padded(rows, "right")
        tokens = fisher_scores(model, ids, mask, layers=layer, top_k=6).token_ids
        found = {
            kernel: fisher_scores(model, ids, mask, layers=layer, token_ids=tokens, kernel=kernel).gradients[layer]
            for kernel in KERNELS
        }
        found["plain"] = [plain_scores(model, row, layer, token_ids=tokens[b]).gradients for b, row in enumerate(rows)]
        for b, row in enumerate(rows):
            expected = plain_scores(truth, row, layer, token_ids=tokens[b]).gradients
            for name, gradients in found.items():
                errors[name].append(relative(gradients[b], expected))

    plain = torch.tensor(errors.pop("plain"))
    assert plain.median() > torch.finfo(dtype).eps / 10  # the comparison compares something
    for kernel, listed in errors.items():
        ours = torch.tensor(listed)
        assert ours.median() <= SLACK * plain.median(), kernel
        assert ours.square().mean().sqrt() <= SLACK * plain.square().mean().sqrt(), kernel
