"""What a folder says of the targets of its prompts, where the last token is not the only one."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fisher_vmap.results.kept import encodable

CERTAIN = 0.999  # a next token of more than this probability: F of it alone is nearly zero

_INTS, _FLOATS, _WORDS = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.string())
# Of several targets, the columns of every prompt and of every layer: see `RecordTargets` and `PromptRecord`.
TARGET_COLUMNS = (
    *("targets", "mean_entropy", "mean_log_prob", "target_positions", "target_samples", "token_targets"),
    *("target_log_probs", "target_entropy", "completions", "completion_ids", "completion_tokens"),
)

_KINDS = (
    *(pa.int64(), pa.float64(), pa.float64(), _INTS, _INTS, _INTS),
    *(_FLOATS, _FLOATS, _WORDS, pa.list_(_INTS), pa.list_(_WORDS)),
)
_TYPES: dict[str, pa.DataType] = dict(zip(TARGET_COLUMNS, _KINDS, strict=True))
_OF_LAYER = {"target_trace": _FLOATS, "trace_error": pa.float64()}
_IN_WORDS = {
    "last": "the next token",
    "completion": "the tokens of a given completion",
    "all": "the token after each position",
}


class RecordTargets(NamedTuple):
    """The n targets of a prompt, whose next-token distribution was read, one completion after the other."""

    positions: NDArray[np.int64]
    """[n] the place of each in the tokens of prompt and completion, from 0."""
    samples: NDArray[np.int64]
    """[n] the number of its completion."""
    log_probs: NDArray[np.float64]
    """[n] nats, log p of the token that follows it; NaN if none does."""
    entropy: NDArray[np.float64]
    """[n] nats, of the distribution of the token that follows."""
    trace: NDArray[np.float64]
    """[n] the part of the matrix's trace that each adds at this layer; of one of several completions, to its own."""


def table_columns(
    described: Sequence[Mapping[str, Any]], layers: Sequence[str], with_text: bool
) -> dict[str, pa.Array]:
    """The columns of the prompts table, from what is known of each prompt's targets; nothing without numbers."""
    of_layers = {f"{layer}/{name}": kind for layer in layers for name, kind in _OF_LAYER.items()}
    columns = {}
    for name, kind in (_TYPES | of_layers).items():
        values = [one.get(name) for one in described]
        if name in ("completions", "completion_tokens"):
            values = [_encodable(value) if with_text else None for value in values]
        columns[name] = pa.array(values, kind)
    return columns


def targets_of(row: Mapping[str, Any], layer: str) -> RecordTargets | None:
    """The targets of a row of the table at one layer; None if the last token is the only one."""
    trace = row.get(f"{layer}/target_trace")
    if trace is None:
        return None
    return RecordTargets(
        np.array(row["target_positions"], np.int64),
        np.array(row["target_samples"], np.int64),
        np.array([nan if x is None else x for x in row["target_log_probs"]]),
        np.array(row["target_entropy"], float),
        np.array(trace, float),
    )


def targets_in_words(fingerprint: Mapping[str, Any]) -> str:
    """Which targets a run has, by its fingerprint; what is at its default is not in it."""
    targets, samples = fingerprint.get("targets", "last"), fingerprint.get("samples", 1)
    if targets in _IN_WORDS:
        return _IN_WORDS[targets]
    temperature = fingerprint.get("temperature")
    drawn = samples > 1 if temperature is None else temperature > 0
    seed = fingerprint.get("completion_seed", 0)
    how = f"drawn at temperature {temperature or 1:g} with seed {seed}" if drawn else "the likeliest"
    each = f"in each of {samples} samples, " if samples > 1 else ""
    return f"{targets} tokens that the model writes, {each}{how}"


def note_of(top_probability: NDArray[np.floating[Any]]) -> str | None:
    """A line if the next token is certain in most of the prompts, [M] of them; else None."""
    certain, of = int((top_probability > CERTAIN).sum()), len(top_probability)
    if 2 * certain <= of:
        return None
    return (
        f"the next token is certain (p > {CERTAIN}) for {certain:,} of {of:,} prompts: F of one target is nearly "
        "nothing there; use --targets completion, or a number"
    )


def _encodable(value: Any) -> Any:
    return [_encodable(one) for one in value] if isinstance(value, list) else encodable(value)
