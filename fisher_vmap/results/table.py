"""The prompts table: one row a prompt, stored beside each shard and joined into prompts.parquet at the end.

Columns of every prompt: prompt_index, source_row, text, the kept columns, status, reason, audit (what the audit changed
in how the prompt was computed, and why), tokens, truncated, mass (the total probability of the K tokens), top_tokens
and prompt_tokens (as text).

Columns of every layer, named "<layer>/...": trace, trace_norm2 (trace x residual_norm^2, comparable between layers),
effective_rank, and share_kept (sum of S / trace). If the whole vocabulary's matrix was estimated: trace_full,
trace_full_error (its standard error), share_full (sum of S / trace_full) and relative_error (of the stored matrix, in
the Frobenius norm).

A shard's own table also has a CRC-32 of each row's arrays ("crc32" for the tokens, "<layer>/crc32"), so that a single
row can be read and checked without the rest of its shard.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fisher_vmap.results.index import ShardLayout
from fisher_vmap.results.record import QUALITY, PromptResult, covered_mass, effective_rank, how_good


def rows_table(results: Sequence[PromptResult], layout: ShardLayout, checksums: dict[str, list[int]]) -> pa.Table:
    """One shard's rows. `checksums` has a list of CRC-32 for "crc32" and for each "<layer>/crc32"."""
    columns: dict[str, pa.Array] = {
        "prompt_index": pa.array([r.index for r in results], pa.int64()),
        "source_row": pa.array([r.source_row for r in results], pa.int64()),
        "text": pa.array([_encodable(r.text) if layout.store_text else None for r in results], pa.string()),
    }
    for column in layout.keep_columns:
        columns[column] = _kept_column([r.kept.get(column) for r in results])
    masses = [covered_mass(r.log_probs, r.token_ids) if r.status == "ok" else None for r in results]
    columns |= {
        "status": pa.array([r.status for r in results], pa.string()),
        "reason": pa.array([_encodable(r.reason) for r in results], pa.string()),
        "audit": pa.array([_encodable(r.audit) for r in results], pa.string()),
        "tokens": pa.array([r.num_tokens for r in results], pa.int64()),
        "truncated": pa.array([r.truncated for r in results], pa.bool_()),
        "mass": pa.array(masses, pa.float64()),
        "top_tokens": _texts([r.top_tokens if r.status == "ok" else None for r in results]),
        "prompt_tokens": _texts([r.prompt_tokens if layout.store_text else None for r in results]),
    }
    for layer in layout.layers:
        numbers = [_layer_numbers(r, layer) for r in results]
        for name in ("trace", "trace_norm2", "effective_rank", *QUALITY):
            columns[f"{layer}/{name}"] = pa.array([row.get(name) for row in numbers], pa.float64())
    columns |= {name: pa.array(values, pa.int64()) for name, values in checksums.items()}
    return pa.table(columns)


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
        if not is_checksum(field.name)
    ]
    return pa.schema(fields)


def is_checksum(column: str) -> bool:
    """Whether a column holds checksums; names of kept columns have no "/"."""
    return column == "crc32" or column.endswith("/crc32")


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A shard's rows with the columns and types of prompts.parquet."""
    columns = [pc.cast(table.column(field.name), field.type, safe=False) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _layer_numbers(result: PromptResult, layer: str) -> dict[str, float | None]:
    if result.status != "ok":
        return {}
    found = result.layers[layer]
    trace = float(found.trace)
    trace_norm2 = trace * float(found.residual_norm) ** 2
    return {"trace": trace, "trace_norm2": trace_norm2, "effective_rank": effective_rank(found.S), **how_good(found)}


def _common_type(types: set[pa.DataType]) -> pa.DataType:
    types = types - {pa.null()}
    if len(types) <= 1:
        return next(iter(types), pa.string())
    return pa.float64() if types == {pa.int64(), pa.float64()} else pa.string()


def _kept_column(values: list[Any]) -> pa.Array:
    """Numbers, booleans and text unchanged; other values, and columns of mixed types, as JSON text."""
    values = [value.item() if isinstance(value, np.generic) else value for value in values]
    if all(value is None or isinstance(value, str | int | float) for value in values):
        # An error means text among numbers, or an integer beyond 64 bits.
        with suppress(pa.ArrowException, OverflowError):
            return pa.array([_encodable(value) if isinstance(value, str) else value for value in values])
    return pa.array([_json_text(value) for value in values], pa.string())


def _texts(values: list[list[str] | None]) -> pa.Array:
    return pa.array([v if v is None else [_encodable(text) for text in v] for v in values], pa.list_(pa.string()))


def _json_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return _encodable(value)
    return _encodable(json.dumps(value, ensure_ascii=False, default=str))


def _encodable(text: str | None) -> str | None:
    # JSON can hold half of a surrogate pair, which UTF-8 cannot encode.
    return text if text is None else text.encode("utf-8", "replace").decode()
