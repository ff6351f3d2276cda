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
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fisher_vmap.storage.records import FloatArray, LayerResult, PromptResult, ShardLayout

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
