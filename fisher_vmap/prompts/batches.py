"""Which prompts are computed together: a pure function of their lengths and two limits: runs can be repeated."""

from collections.abc import Sequence

import torch
from torch import nn

from fisher_vmap.anatomy.layers import decoder_blocks
from fisher_vmap.anatomy.placement import model_dtype

# On a CPU larger batches gain nothing and leave its caches; on a GPU memory is the limit.
CPU_BATCH_TOKENS = 1024
GPU_MEMORY_SHARE = 0.4


def pack(lengths: Sequence[int], batch_size: int, max_batch_tokens: int) -> list[list[int]]:
    """Indices of prompts in batches, longest first; batch tokens count the padding to the batch's longest prompt.

    Args:
        lengths: the number of tokens of each prompt.
        batch_size: most prompts in a batch.
        max_batch_tokens: most tokens in a batch; a prompt longer than that is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else []
        longest = lengths[current[0]] if current else 0
        if current and len(current) < batch_size and (len(current) + 1) * longest <= max_batch_tokens:
            current.append(index)
        else:
            batches.append([index])
    return batches


def batch_tokens_for(model: nn.Module, device: torch.device, top_k: int) -> int:
    """How many tokens the pullback of K cotangents through one block has room for on this device.

    A token holds, for each cotangent, the outputs of the block's linear layers about twice over.
    """
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    devices = {device} | {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    free = min(torch.cuda.mem_get_info(each)[0] for each in devices)
    block = next(iter(decoder_blocks(model).values()))
    width = sum(module.out_features for module in block.modules() if isinstance(module, nn.Linear))
    itemsize = model_dtype(model).itemsize
    return max(256, int(GPU_MEMORY_SHARE * free / (2 * (top_k + 2) * max(width, 1) * itemsize)))
