"""Completions that a model writes itself: greedy, or drawn from its own distribution with a seed for each.

Tokens are drawn by the Gumbel-max trick: the largest of log p / temperature + Gumbel noise is a draw from the softmax.
The noise of a completion depends on its seed and on the step alone, so a prompt's completions do not depend on the
prompts that are computed with it, but for rounding.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.model.offload import input_device
from fisher_vmap.model.patches import autocast_off

_NEUTRAL = ("eos_token_id", "bos_token_id", "pad_token_id", "cache_implementation")  # what a model's own settings keep


@autocast_off()
def complete(
    model: nn.Module,
    prompts_ids: Sequence[Sequence[int]],
    tokens: int,
    *,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Let a model complete prompts.

    A completion ends with the end-of-text token if the model wrote one. Its own settings for generation, such as
    a repetition penalty, are left aside: they would draw from another distribution than the one that is described.

    Args:
        model: a causal LM of transformers.
        prompts_ids: the token ids of each prompt.
        tokens: most tokens of a completion.
        seeds: one for each prompt; None: take the likeliest token at each step.
        temperature: by which logits are divided; at 1 the tokens are drawn from the model's own distribution.

    Returns:
        The token ids of each completion, at least one.

    Raises:
        ValueError: the model cannot generate.
    """
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{type(model).__name__} has no generate, so it cannot write completions; give them as data")
    device, longest = input_device(model), max(map(len, prompts_ids))
    input_ids = torch.zeros(len(prompts_ids), longest, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(prompts_ids):  # on the left, so that the next token is the last column of each
        input_ids[b, longest - len(ids) :], mask[b, longest - len(ids) :] = torch.tensor(ids, device="cpu"), 1
    noise = [] if seeds is None else [_Gumbel(seeds, longest, temperature)]
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), _plain_generation(model) as ends:
        model.eval()
        try:
            written: Any = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=noise,
            )
        finally:
            for module in training:
                module.training = True
    return [_up_to_end(row, ends) for row in written[:, longest:].tolist()]


def completion_seed(ids: Sequence[int], seed: int, number: int) -> int:
    """The seed of one completion of a prompt: it depends on the prompt's tokens, the run's seed and the number."""
    return zlib.crc32(repr((list(ids), seed, number)).encode())


class _Gumbel:
    """A logits processor that adds Gumbel noise to log p / temperature."""

    def __init__(self, seeds: Sequence[int], start: int, temperature: float) -> None:
        self._seeds, self._start, self._temperature = seeds, start, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, V = input_ids.shape[1] - self._start, scores.shape[1]
        noise = []
        for seed in self._seeds:
            generator = torch.Generator().manual_seed(zlib.crc32(step.to_bytes(8, "little"), seed))
            noise.append(torch.rand(V, generator=generator, dtype=torch.float64, device="cpu"))
        uniform = torch.stack(noise).clamp_(min=torch.finfo(torch.float64).tiny)
        gumbel = -(-uniform.log()).log()
        return scores.float() / self._temperature + gumbel.to(scores.device, torch.float32)


@contextmanager
def _plain_generation(model: Any) -> Iterator[list[int]]:
    """Within the context the model's settings for generation are neutral; yields its end-of-text tokens."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    kept = {name: value for name in _NEUTRAL if (value := getattr(own, name, None)) is not None}
    end = kept.get("eos_token_id")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    kept.setdefault("pad_token_id", ends[0] if ends else 0)
    model.generation_config = GenerationConfig(**copy.deepcopy(kept))
    try:
        yield ends
    finally:
        model.generation_config = own


def _up_to_end(row: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end-of-text token, which is included."""
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
