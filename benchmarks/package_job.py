"""The package's side of every comparison: the same job as the loops', by the public functions alone."""

from typing import Any

from torch import Tensor

from benchmarks.baselines import Decomposed, Loop
from benchmarks.workloads import Batch
from fisher_vmap import FisherModel, compress, fisher_scores
from fisher_vmap.data.batching import pack

SHARD = 32  # prompts that a run sorts by length at a time, its default shard


def package_loop(
    model: Any, batch: Batch, layer: str, top_k: int, kernel: str = "auto", positions: str = "all"
) -> Loop:
    """The scores of a batch, by the form of the kernel that is named."""
    scores = fisher_scores(model, *batch, layers=layer, top_k=top_k, kernel=kernel, positions=positions)
    return Loop(scores.log_probs, scores.token_ids, scores.gradients[layer])


def package_pipeline(
    model: Any, batch: Batch, layer: str, top_k: int, rank: int, kernel: str = "auto", positions: str = "all"
) -> Decomposed:
    """The scores of a batch and the leading singular values and vectors of its F."""
    scores = package_loop(model, batch, layer, top_k, kernel, positions)
    factor_BKD: Tensor = (scores.log_probs / 2).exp()[:, :, None] * scores.gradients
    low_rank = compress(factor_BKD, rank)
    return Decomposed(scores, low_rank.singular_values, low_rank.vectors)


def package_run(fisher: FisherModel, prompts: list[list[int]], rank: int) -> list[Any]:
    """What a run does to its prompts between the tokenizer and the disk, in the prompts' order."""
    found: list[Any] = [None] * len(prompts)
    for start in range(0, len(prompts), SHARD):
        shard = prompts[start : start + SHARD]
        for places in pack([len(ids) for ids in shard], fisher.batch_size, fisher.max_batch_tokens):
            for place, numbers in zip(places, fisher.numbers([shard[i] for i in places], rank), strict=True):
                found[start + place] = numbers
    return found
