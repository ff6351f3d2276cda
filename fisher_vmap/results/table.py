"""The prompts table: one row a prompt, stored beside each shard and joined into prompts.parquet at the end.

Columns: prompt_index, source_row, text, the kept columns, status, reason, audit (what it
changed in how the prompt was computed, and why), tokens, truncated, mass (the probability that
the K tokens cover), top_tokens and prompt_tokens (the K tokens and the prompt's own, as text), and for each layer
"<layer>/trace", "<layer>/trace_norm2" (trace x residual_norm^2, comparable between layers), "<layer>/effective_rank",
"<layer>/share_kept" (sum of S / trace); and, where random vectors were drawn for it, estimates: "<layer>/trace_full" of
the whole vocabulary's matrix with its standard error, "<layer>/trace_full_error", "<layer>/share_full" (sum of S /
trace_full) and "<layer>/relative_error" (of the stored matrix against the whole vocabulary's, in the Frobenius norm).

A shard's own table has a CRC-32 of each row's arrays besides ("crc32" for the tokens, "<layer>/crc32"), so that a
single row can be read and checked without the rest of its shard.

Names on one line: in the order of their numbers, and many of them in a few words.

What the pipeline hands to the results folder: one record a prompt, and the shape all records of a run share.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt

from fisher_vmap.errors import UserError, listed

RUN = 4  # names in a row from which they are summed up

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def several(names: Iterable[str]) -> str:
    """Names on one line: a run of numbered ones by its first and last, and of what is left ten at most."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    total = sum(map(len, runs))
    parts = [part for run in runs for part in ([f"{run[0]} ... {run[-1]}"] if len(run) >= RUN else run)]
    return listed(parts) + (f", {total} in all" if len(parts) < total else "")


def _follows(one: str, other: str) -> bool:
    a, b = _LAST_NUMBER.match(one), _LAST_NUMBER.match(other)
    return a is not None and b is not None and (a[1], a[3], int(a[2]) + 1) == (b[1], b[3], int(b[2]))


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


QUALITY = ("share_kept", "trace_full", "trace_full_error", "share_full", "relative_error")


def rows_table(results: Sequence[PromptResult], layout: ShardLayout, checksums: dict[str, list[int]]) -> pa.Table:
    """One shard's rows. `checksums` has a list of CRC-32 for "crc32" and for each "<layer>/crc32"."""
    columns: dict[str, pa.Array] = {
        "prompt_index": pa.array([r.index for r in results], pa.int64()),
        "source_row": pa.array([r.source_row for r in results], pa.int64()),
        "text": pa.array([_encodable(r.text) if layout.store_text else None for r in results], pa.string()),
    }
    for column in layout.keep_columns:
        columns[column] = _kept_column([r.kept.get(column) for r in results])
    columns |= {
        "status": pa.array([r.status for r in results], pa.string()),
        "reason": pa.array([_encodable(r.reason) for r in results], pa.string()),
        "audit": pa.array([_encodable(r.audit) for r in results], pa.string()),
        "tokens": pa.array([r.num_tokens for r in results], pa.int64()),
        "truncated": pa.array([r.truncated for r in results], pa.bool_()),
        "mass": pa.array(
            [covered_mass(r.log_probs, r.token_ids) if r.status == "ok" else None for r in results], pa.float64()
        ),
    }
    columns["top_tokens"] = _texts([r.top_tokens if r.status == "ok" else None for r in results])
    columns["prompt_tokens"] = _texts([r.prompt_tokens if layout.store_text else None for r in results])
    for layer in layout.layers:
        per_layer = [r.layers[layer] if r.status == "ok" else None for r in results]
        columns[f"{layer}/trace"] = pa.array([x and float(x.trace) for x in per_layer], pa.float64())
        columns[f"{layer}/trace_norm2"] = pa.array(
            [x and float(x.trace) * float(x.residual_norm) ** 2 for x in per_layer], pa.float64()
        )
        columns[f"{layer}/effective_rank"] = pa.array([x and effective_rank(x.S) for x in per_layer], pa.float64())
        for name in QUALITY:
            values = [None if x is None else how_good(x)[name] for x in per_layer]
            columns[f"{layer}/{name}"] = pa.array(values, pa.float64())
    columns |= {name: pa.array(values, pa.int64()) for name, values in checksums.items()}
    return pa.table(columns)


def covered_mass(log_probs: FloatArray | None, token_ids: NDArray[np.integer[Any]] | None) -> float | None:
    """Probability of the K tokens together: sum exp(log p), "any other token" left out. None without numbers."""
    if log_probs is None or token_ids is None:
        return None
    rest = (np.asarray(token_ids) < 0) & np.isfinite(log_probs)
    return float(np.exp(np.asarray(log_probs, np.float64))[~rest].sum())


def how_good(result: LayerResult) -> dict[str, float | None]:
    """How good a layer's matrix is; None for what was not estimated."""
    kept = float(np.asarray(result.S, np.float64).sum())
    values = {
        "share_kept": kept / result.trace if result.trace > 0 else np.nan,
        "trace_full": result.trace_full,
        "trace_full_error": result.trace_full_error,
        "share_full": kept / result.trace_full if result.trace_full > 0 else np.nan,
        "relative_error": result.relative_error,
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in values.items()}


def effective_rank(S: FloatArray) -> float:
    """Number of directions that matter: exp of the entropy of the kept S, normalised to sum to 1; 0 for a zero matrix.

    It is R when all are equal and 1 when one direction holds everything. [Roy and Vetterli, EUSIPCO 2007]

    Args:
        S: [R] singular values, not negative.
    """
    S = np.asarray(S, np.float64)
    share = S[S > 0] / S.sum()
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0


def common_schema(schemas: Iterable[pa.Schema], layout: ShardLayout) -> pa.Schema:
    """The columns of prompts.parquet: the shards' without checksums, each kept column of a type that holds all."""
    first: pa.Schema | None = None
    kept: dict[str, set[pa.DataType]] = {column: set() for column in layout.keep_columns}
    for schema in schemas:
        first = first or schema
        for column, types in kept.items():
            types.add(schema.field(column).type)
    if first is None:
        first = rows_table([], layout, {}).schema
    fields = [
        pa.field(field.name, _common_type(kept[field.name]) if field.name in kept else field.type)
        for field in first
        if field.name != "crc32" and not field.name.endswith("/crc32")  # no kept column has a "/" in its name
    ]
    return pa.schema(fields)


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A shard's rows as they stand in prompts.parquet."""
    columns = [pc.cast(table.column(field.name), field.type, safe=False) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _common_type(types: set[pa.DataType]) -> pa.DataType:
    types = types - {pa.null()}
    if len(types) <= 1:
        return next(iter(types), pa.string())
    return pa.float64() if types == {pa.int64(), pa.float64()} else pa.string()


def _kept_column(values: list[Any]) -> pa.Array:
    """Numbers, booleans and text as they are; anything else, and columns of mixed types, as JSON text."""
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    if any(value is not None and not isinstance(value, str | int | float) for value in values):
        return pa.array([_json_text(value) for value in values], pa.string())
    try:
        return pa.array([_encodable(value) if isinstance(value, str) else value for value in values])
    except (pa.ArrowException, OverflowError):  # text among numbers, or an integer beyond 64 bits
        return pa.array([_json_text(value) for value in values], pa.string())


def _texts(values: list[list[str] | None]) -> pa.Array:
    return pa.array([v if v is None else [_encodable(text) for text in v] for v in values], pa.list_(pa.string()))


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return _encodable(value)
    return _encodable(json.dumps(value, ensure_ascii=False, default=str))


def _encodable(text: str | None) -> str | None:
    # JSON can carry half of a surrogate pair, which UTF-8 has no bytes for.
    return text if text is None else text.encode("utf-8", "replace").decode()
