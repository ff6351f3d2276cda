"""What the pipeline hands to the results folder: one record a prompt, and the shape all records of a run share."""

from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt

from fisher_vmap.errors import UserError

Status = Literal["ok", "failed", "skipped"]
FloatArray = NDArray[np.floating[Any]]

# Columns that every prompts table has; a kept column may not take their names.
TABLE_COLUMNS = (
    *("prompt_index", "source_row", "text", "status", "reason", "audit", "tokens", "truncated", "mass", "crc32"),
    *("top_tokens", "prompt_tokens"),
)


class LayerResult(NamedTuple):
    """One prompt's low-rank Fisher matrix at one layer: F = V^T diag(S) V, and A = Q diag(sqrt S) V with F = A^T A."""

    S: FloatArray
    """[R] singular values of F, highest first, zero beyond the rank."""
    V: FloatArray
    """[R, D] orthonormal rows, zero beyond the rank."""
    Q: FloatArray
    """[K, R] how much of which token each direction carries."""
    residual_norm: float
    """Mean norm of the residual stream over the prompt's real positions."""
    position_energy: FloatArray
    """[T] sum over tokens of p_t |g_t at that position|^2, for the prompt's T real positions."""
    trace: float
    """Trace of F before it was cut to rank R; at least the sum of the kept S."""
    trace_full: float = nan
    """Estimate of the trace of the whole vocabulary's Fisher matrix; NaN where it was not asked for."""
    trace_full_error: float = nan
    """Its standard error."""
    relative_error: float = nan
    """Estimate of |F - V^T diag(S) V| / |F|, F of the whole vocabulary, in the Frobenius norm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptResult:
    """One prompt's results. A prompt that failed or was skipped has a reason and no numbers."""

    index: int
    """Its place in the run, from 0: the order of the prompts asked for."""
    source_row: int | None = None
    """Its row in the data set."""
    text: str | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    """Values of the columns kept from the data set."""
    status: Status = "ok"
    reason: str | None = None
    num_tokens: int = 0
    truncated: bool = False
    audit: str | None = None
    """What the audit changed in how it was computed, and why; None: nothing."""
    token_ids: NDArray[np.integer[Any]] | None = None
    """[K] int64; with `include_rest` one more, -1, for any other token."""
    log_probs: FloatArray | None = None
    """[K] float32 nats, highest first."""
    layers: dict[str, LayerResult] = field(default_factory=dict)
    top_tokens: list[str] | None = None
    """The K tokens as text."""
    prompt_tokens: list[str] | None = None
    """The prompt's tokens as text, template and all; they are stored where the text is."""


class ShardLayout(BaseModel):
    """The shapes and types of a run's arrays, the same for every shard."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    widths: dict[str, PositiveInt]
    """Layer name -> D, in the order of the layers."""
    top_k: PositiveInt
    """K."""
    rank: PositiveInt
    """R; what a prompt lacks of it is zero."""
    include_rest: bool = False
    """Whether any other token is one more outcome, the last, with token id -1."""
    vectors_dtype: Literal["float32", "float16"] = "float32"
    store_text: bool = True
    keep_columns: tuple[str, ...] = ()
    means_only: bool = False
    """Shards lose their arrays once they are in the running sum: a million prompts leave their table and the mean."""

    @property
    def outcomes(self) -> int:
        """How many token ids, log-probabilities and rows of Q a prompt has: K, or K + 1 with `include_rest`."""
        return self.top_k + self.include_rest

    @property
    def layers(self) -> tuple[str, ...]:
        """The layer names, in order."""
        return tuple(self.widths)

    def check(self) -> None:
        """Refuse names that cannot be stored.

        Raises:
            UserError: no layer, a layer name that is no file name, or a kept column with a name of our own.
        """
        if not self.widths:
            raise UserError("no layer is hooked; name at least one in hook_layer_name")
        for layer in self.widths:
            # The name becomes part of a file name (the npz of each layer) and of tensor names ("<layer>/S").
            if not layer or layer.startswith("__") or any(character in layer for character in "/\\:\0\n"):
                raise UserError(f"layer name {layer!r} cannot be part of a file name; hook a module with a plain name")
        for column in self.keep_columns:
            if column in TABLE_COLUMNS or "/" in column:
                raise UserError(f"keep_columns has {column!r}, a name that prompts.parquet uses; rename it in the data")
        if len(set(self.keep_columns)) < len(self.keep_columns):
            raise UserError(f"keep_columns names a column twice: {', '.join(self.keep_columns)}")
