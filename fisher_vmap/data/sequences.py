"""`Tokens`: a prompt and its completion as token ids; and its targets, as columns of the prompts table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.render import TokenizedPrompt


class Tokens(NamedTuple):
    """A prompt, with its completion if it has one, as token ids.

    Attributes:
        ids: all of them.
        start: the number of the completion's first token; None: there is no completion.
    """

    ids: list[int]
    start: int | None = None

    def completed(self, ids: Sequence[int]) -> "Tokens":
        """The prompt, all of these tokens, with a completion."""
        return Tokens([*self.ids, *ids], len(self.ids))

    def targets(self, asked: str | int) -> int:
        """How many targets it has; `asked` is as the argument of `FisherModel`."""
        if asked in ("last", "all"):
            return len(self.ids) if asked == "all" else 1
        return sum(self.mask(len(self.ids), "targets"))

    def mask(self, width: int, part: str) -> list[bool]:
        """[width] of some columns: the tokens of the "prompt", those of the "completion", or "targets" before these.

        A target is the position whose distribution predicts the next token.
        """
        start = len(self.ids) if self.start is None else self.start
        first, stop = {
            "prompt": (0, start),
            "completion": (start, len(self.ids)),
            "targets": (start - 1, max(start, len(self.ids) - 1)),
        }[part]
        return [first <= column < stop for column in range(width)]


class TargetNumbers(NamedTuple):
    """What is known of the n targets of a prompt, of all its completions one after the other.

    Attributes:
        positions: [n] int, the target's place in its completion's tokens, from 0.
        samples: [n] int, the completion.
        log_probs: [n] nats, of the token that follows; NaN if none does.
        entropy: [n] nats.
        of_outcome: [K] int, the target of each outcome that is kept; -1 pads.
        traces: for each layer, [n], the part of the trace that the target adds.
        trace_errors: for each layer, the standard error of the trace over completions; NaN of a single one.
    """

    positions: np.ndarray
    samples: np.ndarray
    log_probs: np.ndarray
    entropy: np.ndarray
    of_outcome: np.ndarray
    traces: dict[str, np.ndarray]
    trace_errors: dict[str, float]


def tokens_of(sequences: Sequence[Tokens]) -> int:
    """The tokens that a prompt's sequences take in a batch."""
    return len(sequences) * max(len(one.ids) for one in sequences)


def as_sequences(prompt: Sequence[int] | Tokens | Sequence[Tokens]) -> list[Tokens]:
    """The sequences of a prompt that is given as token ids, as `Tokens`, or as several of these."""
    if isinstance(prompt, Tokens):
        return [prompt]
    given = list(prompt)
    return given if isinstance(given[0], Tokens) else [Tokens(given)]  # type: ignore[arg-type, return-value]


def padded(rows: Sequence[Tokens], device: torch.device, width: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [B, width], of sequences padded on the right."""
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(input_ids)
    for b, row in enumerate(rows):
        input_ids[b, : len(row.ids)], mask[b, : len(row.ids)] = torch.tensor(row.ids, device="cpu"), 1
    return input_ids.to(device), mask.to(device)


def masked(rows: Sequence[Tokens], mask: Tensor, part: str) -> Tensor:
    """[B, T] bool, a part of each sequence, as `Tokens.mask` names it; `mask` is the batch's attention_mask."""
    return torch.tensor([row.mask(mask.shape[1], part) for row in rows], device=mask.device)


class Written(NamedTuple):
    """The completions of a prompt, as columns of the prompts table."""

    completions: list[str] | None
    """The text of each; None without a tokenizer."""
    completion_ids: list[list[int]]
    """The token ids of each."""
    completion_tokens: list[list[str]] | None
    """The tokens of each as text; None without a tokenizer."""


def completions_of(sequences: Sequence[Tokens], prompt: TokenizedPrompt, pieces: Pieces | None) -> Written | None:
    """The completions of a prompt's sequences; None if they have none."""
    if not sequences or sequences[0].start is None:
        return None
    ids = [one.ids[one.start :] for one in sequences]
    if pieces is None:
        return Written(None, ids, None)
    tokens = [pieces.each(each) for each in ids]
    texts = ["".join(each) for each in tokens] if prompt.completion is None else [prompt.completion]
    return Written(texts, ids, tokens)


def target_columns(targets: TargetNumbers) -> dict[str, Any]:
    """Columns of the prompts table, by name."""
    given = targets.log_probs[np.isfinite(targets.log_probs)]
    return {
        "targets": len(targets.positions),
        "mean_entropy": float(targets.entropy.mean()),
        "mean_log_prob": float(given.mean()) if len(given) else None,
        "target_positions": targets.positions.tolist(),
        "target_samples": targets.samples.tolist(),
        "target_log_probs": [float(x) if np.isfinite(x) else None for x in targets.log_probs],
        "target_entropy": targets.entropy.tolist(),
        "token_targets": targets.of_outcome.tolist(),
        **{f"{layer}/target_trace": trace.tolist() for layer, trace in targets.traces.items()},
        **{f"{layer}/trace_error": x if np.isfinite(x) else None for layer, x in targets.trace_errors.items()},
    }
