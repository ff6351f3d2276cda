"""What a batch takes in a worker's memory beside the weights, by the shapes of what its computation holds at once.

The peak is in the pullback through one block: what the forward has recorded stands by, all cotangents are there, and a
chunk of them passes through the block's layers.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fisher_vmap.anatomy.position_table import most_positions
from fisher_vmap.config import Settings
from fisher_vmap.head import MIN_ROWS, VOCABULARY_CHUNK_ELEMENTS
from fisher_vmap.loading.devices import choose_device
from fisher_vmap.network import cotangents_at_a_time
from fisher_vmap.planning.plan_sample import Sample
from fisher_vmap.planning.skeleton import Skeleton
from fisher_vmap.prompts.batches import CPU_BATCH_TOKENS, pack
from fisher_vmap.pullbacks.fused_block import KEPT_BYTES, WORTH_KEEPING


class BatchMemory(NamedTuple):
    """Bytes of one batch.

    Attributes:
        prompts: how many.
        tokens: of all of them, without padding.
        parts: bytes by what they are for.
    """

    prompts: int
    tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def largest_batch(sample: Sample, batch_size: int, max_batch_tokens: int) -> list[int]:
    """The lengths of the prompts of the batch with the most tokens, among those of the sample."""
    batches: list[list[int]] = [[]]
    for shard in sample.shards:
        lengths = [len(prompt.ids) for prompt in shard.rendered.values()]
        batches += [[lengths[i] for i in batch] for batch in pack(lengths, batch_size, max_batch_tokens)]
    return max(batches, key=sum)


def batches_of(
    settings: Settings, skeleton: Skeleton, sample: Sample, vectors: int, itemsize: int
) -> tuple[BatchMemory, BatchMemory]:
    """What the largest batch of a sample takes, and what a prompt of the most tokens that are allowed would.

    Args:
        settings: of the run.
        skeleton: of its model.
        sample: of its prompts.
        vectors: that are pulled down together.
        itemsize: bytes of a number of the pullback.
    """
    tokens = CPU_BATCH_TOKENS if settings.max_batch_tokens == "auto" else settings.max_batch_tokens
    size = sys.maxsize if settings.batch_size == "auto" else settings.batch_size
    limit = most_positions(skeleton.model)
    longest = settings.max_length if limit is None else min(limit, settings.max_length)
    chunk = None if settings.cotangent_chunk == "auto" else settings.cotangent_chunk
    device = choose_device(settings.device)
    batches = largest_batch(sample, size, tokens), [longest]
    largest, allowed = (batch_memory(skeleton, batch, vectors, itemsize, device, chunk) for batch in batches)
    return largest, allowed


def batch_memory(
    skeleton: Skeleton,
    lengths: Sequence[int],
    cotangents: int,
    itemsize: int,
    device: torch.device,
    chunk_size: int | None = None,
) -> BatchMemory:
    """What a batch of prompts takes.

    Args:
        skeleton: of the model.
        lengths: tokens of each prompt.
        cotangents: K, the vectors that are pulled down together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on.
        chunk_size: how many vectors pass through a block at a time; None: as many as a run takes.
    """
    B, N, K = len(lengths), sum(lengths), cotangents
    D = int(skeleton.model.config.get_text_config().hidden_size)
    block = next(iter(skeleton.blocks.values()))
    width = sum(m.out_features for m in block.modules() if isinstance(m, torch.nn.Linear))
    above = len(skeleton.blocks) - 1 - min(skeleton.hooks)
    chunk = min(K, chunk_size or cotangents_at_a_time(K, N, device) or K)
    numbers = {
        "recorded": N * D * (above + 2),  # each block's input, and what came in and went out
        "kept": _kept(N * (width - D), above - 1, itemsize, device),
        "cotangents": 3 * N * K * D,  # all of them, a block's below, and their squares
        "chunk": 2 * chunk * N * width,  # the outputs of a block's layers and their gradients
        "block": 2 * N * width,  # its forward, again
    }
    parts = {name: count * itemsize for name, count in numbers.items()}
    unembedding = skeleton.model.get_output_embeddings()
    V = int(skeleton.model.config.get_text_config().vocab_size)
    upcast = VOCABULARY_CHUNK_ELEMENTS.get(device.type, 2**22) if itemsize < 4 and unembedding is not None else 0
    parts["head"] = 4 * (min(upcast, V * D) + 3 * max(B, MIN_ROWS) * V)  # logits, and the rest's, in float32
    return BatchMemory(B, N, parts)


def _kept(each: int, calls: int, itemsize: int, device: torch.device) -> int:
    """How many numbers of the forwards of so many blocks are kept for the pullback, of `each` of them."""
    room = KEPT_BYTES.get(device.type, 0) // itemsize
    if calls < 1 or each * calls > WORTH_KEEPING * room:
        return 0
    return each * min(calls, room // max(each, 1))
