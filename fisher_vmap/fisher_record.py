"""`FisherRecord`: one prompt's Fisher matrices, as `FisherModel.fisher` yields them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fisher_vmap.data.batching import PromptNumbers
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.render import TokenizedPrompt
from fisher_vmap.data.sequences import Tokens, completions_of, target_columns
from fisher_vmap.results.record import LayerResult, PromptRecord, covered_mass, how_good


@dataclass(frozen=True)
class FisherRecord:
    """One prompt's Fisher matrices: a `PromptRecord` (S, V, U, Q, matrix(), matvec(x), scores()) for each layer."""

    index: int
    layers: dict[str, PromptRecord]

    def __getattr__(self, name: str) -> Any:
        """The attributes of the only layer's record; with several layers, use `record.layers[name]`."""
        if name.startswith("_") or len(self.layers) != 1:
            raise AttributeError(f"{name}: this record has {len(self.layers)} layers; use record.layers[layer].{name}")
        return getattr(next(iter(self.layers.values())), name)


def record_of(
    index: int,
    prompt: TokenizedPrompt,
    numbers: PromptNumbers,
    pieces: Pieces | None,
    sequences: Sequence[Tokens] = (),
    status: str = "failed",
) -> FisherRecord:
    """The record of a prompt's numbers and tokens; `status` is the status of numbers with a reason."""
    several = numbers.targets
    written = completions_of(sequences, prompt, pieces)
    row: dict[str, Any] = {
        "text": prompt.text,
        "status": "ok" if numbers.reason is None else status,
        "reason": numbers.reason,
        "tokens": len(prompt.ids) if prompt.start is None else prompt.start,
        "truncated": prompt.truncated,
        "mass": covered_mass(numbers.log_probs, numbers.token_ids) if several is None else None,
        "top_tokens": None if pieces is None else [pieces.single(int(token)) for token in numbers.token_ids],
        "prompt_tokens": None if pieces is None else pieces.each(prompt.ids[: prompt.start]),
        **({} if written is None else written._asdict()),
        **({} if several is None else target_columns(several)),
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
    """The record of a prompt that was not computed: NaN everywhere, and the reason; K is `outcomes`."""

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    layers = {
        layer: LayerResult(nan(rank), nan(rank, D), nan(outcomes, rank), float("nan"), nan(0), float("nan"))
        for layer, D in widths.items()
    }
    numbers = PromptNumbers(np.full(outcomes, -1), nan(outcomes), layers, reason)
    return record_of(index, TokenizedPrompt([], "", False), numbers, None, status="skipped")
