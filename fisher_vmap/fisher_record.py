"""`FisherRecord`: one prompt's Fisher matrices as `FisherModel.fisher` yields them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisher_vmap.prompts.pieces import Pieces
from fisher_vmap.prompts.prompt_numbers import PromptNumbers
from fisher_vmap.prompts.tokens import TokenizedPrompt
from fisher_vmap.storage.prompt_record import PromptRecord
from fisher_vmap.storage.records import LayerResult
from fisher_vmap.storage.table import covered_mass, how_good


@dataclass(frozen=True)
class FisherRecord:
    """One prompt's Fisher matrices: a `PromptRecord` (S, V, U, Q, matrix(), matvec(x), scores()) for each layer."""

    index: int
    layers: dict[str, PromptRecord]

    def __getattr__(self, name: str) -> Any:
        """The attributes of the only layer's record; with several layers, ask `record.layers[name]`."""
        if name.startswith("_") or len(self.layers) != 1:
            raise AttributeError(f"{name}: this record has {len(self.layers)} layers; use record.layers[layer].{name}")
        return getattr(next(iter(self.layers.values())), name)


def record_of(
    index: int, prompt: TokenizedPrompt, numbers: PromptNumbers, pieces: Pieces | None, status: str = "failed"
) -> FisherRecord:
    """A prompt's numbers with what the tokenizer made of it; `status` is that of numbers that have a reason."""
    row: dict[str, Any] = {
        "text": prompt.text,
        "status": "ok" if numbers.reason is None else status,
        "reason": numbers.reason,
        "tokens": len(prompt.ids),
        "truncated": prompt.truncated,
        "mass": covered_mass(numbers.log_probs, numbers.token_ids),
        "top_tokens": None if pieces is None else [pieces.single(int(token)) for token in numbers.token_ids],
        "prompt_tokens": None if pieces is None else pieces.each(prompt.ids),
        **{f"{layer}/trace": result.trace for layer, result in numbers.layers.items()},
        **{
            f"{layer}/{name}": value
            for layer, result in numbers.layers.items()
            for name, value in how_good(result).items()
        },
    }
    records = {
        layer: PromptRecord(
            index=index,
            layer=layer,
            S=result.S,
            V=result.V,
            Q=result.Q,
            residual_norm=result.residual_norm,
            position_energy=result.position_energy,
            token_ids=numbers.token_ids,
            log_probs=numbers.log_probs,
            row=row,
        )
        for layer, result in numbers.layers.items()
    }
    return FisherRecord(index, records)


def empty_record(index: int, reason: str, widths: Mapping[str, int], outcomes: int, rank: int) -> FisherRecord:
    """A prompt that could not be computed: NaN everywhere, and the reason.

    Args:
        index: of the prompt.
        reason: why.
        widths: D of each layer.
        outcomes: K.
        rank: R.
    """

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    layers = {
        layer: LayerResult(nan(rank), nan(rank, D), nan(outcomes, rank), float("nan"), nan(0), float("nan"))
        for layer, D in widths.items()
    }
    numbers = PromptNumbers(np.full(outcomes, -1), nan(outcomes), layers, reason)
    return record_of(index, TokenizedPrompt([], "", False), numbers, None, status="skipped")
