"""Completions that a model writes itself: greedy, or drawn from its own distribution with a seed for each.

Tokens are drawn by the Gumbel-max trick: the largest of log p / temperature + Gumbel noise is a draw from the softmax.
The noise of a completion depends on its seed and on the step alone, so a prompt's completions do not depend on the
prompts that are computed with it, but for rounding.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.model.offload import input_device
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.validation import check_whole, in_halves

TOGETHER = 16  # completions that a model writes at a time
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
    _check_generates(model)
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


@dataclass(frozen=True)
class Completions:
    """Which completions a model writes to each prompt.

    Attributes:
        targets: "last", "completion" or "all": it writes none; a number: it writes so many tokens.
        samples: S, how many completions of a prompt.
        temperature: of these; None: the likeliest tokens for one completion, 1 for several; 0: the likeliest.
        seed: of the completions that are drawn.

    Raises:
        ValueError: a value is not one of these, or two of them exclude each other.
    """

    targets: str | int = "last"
    samples: int = 1
    temperature: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        targets, written = self.targets, isinstance(self.targets, int) and not isinstance(self.targets, bool)
        if not (written and int(targets) >= 1) and targets not in ("last", "completion", "all"):
            raise ValueError(
                f"targets is {targets!r}; expected 'last', 'completion', 'all' or a number of tokens to write"
            )
        check_whole("samples", self.samples, 1)
        check_whole("seed", self.seed, 0)
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}; expected 0, for the likeliest tokens, or more")
        if not written and (self.samples > 1 or self.temperature is not None):
            raise ValueError(
                f"samples and temperature are of completions that the model writes, and targets is {targets!r}; give a "
                "number of tokens as targets, or leave them out"
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples}, but at temperature 0 all are equal; give a temperature above")

    def check(self, model: nn.Module, positions: object) -> None:
        """Raise ValueError unless the model can write them, and they have the positions that a bias is added at."""
        if isinstance(self.targets, int):
            _check_generates(model)
        if not isinstance(positions, str) or positions not in ("all", "last", "prompt", "completion"):
            raise ValueError(f"positions is {positions!r}; expected 'all', 'last', 'prompt' or 'completion'")
        if positions == "completion" and self.targets in ("last", "all"):
            raise ValueError(
                f"positions is 'completion', and with targets {self.targets!r} there is none; set targets as well"
            )

    def room(self, positions: int) -> int:
        """The most tokens of a prompt in a model of so many positions, beside those that are written.

        Raises:
            ValueError: there is no room for a prompt.
        """
        if not isinstance(self.targets, int):
            return positions
        if self.targets >= positions:
            raise ValueError(
                f"targets is {self.targets} tokens to write, and this model has {positions} positions, those of the "
                "prompt included; lower targets"
            )
        return positions - self.targets

    def write(self, model: nn.Module, prompts_ids: Sequence[Sequence[int]]) -> list[list[list[int]]]:
        """The completions of each prompt, S lists of token ids; of `targets` tokens at most.

        A completion depends on its prompt's tokens, the seed and its number; on the other prompts by rounding only.
        """
        temperature = self.temperature if self.temperature is not None else float(self.samples > 1)
        rows = [(b, number) for b in range(len(prompts_ids)) for number in range(self.samples)]
        rows.sort(key=lambda row: -len(prompts_ids[row[0]]))  # stable: a prompt's completions stay in order
        found: list[list[list[int]]] = [[] for _ in prompts_ids]

        def written(some: Sequence[tuple[int, int]]) -> list[list[int]]:
            seeds = [completion_seed(prompts_ids[b], self.seed, number) for b, number in some] if temperature else None
            ids = [prompts_ids[b] for b, _ in some]
            return complete(model, ids, int(self.targets), seeds=seeds, temperature=temperature or 1.0)

        for start in range(0, len(rows), TOGETHER):
            some = rows[start : start + TOGETHER]
            for (b, _), tokens in zip(some, in_halves(written, some), strict=True):
                found[b].append(tokens)
        return found


def _check_generates(model: nn.Module) -> None:
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{type(model).__name__} has no generate, so it cannot write completions; give them as data")


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
