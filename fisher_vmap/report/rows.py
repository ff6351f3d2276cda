"""The prompts as the page lists them, and the few of which it shows everything."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_vmap.results import Results
from fisher_vmap.storage.prompt_record import PromptRecord

TEXT = 180  # characters of a prompt in the table
GROUP_VALUES = 60  # a kept column with at most so many different values divides the prompts into groups
GROUPS = 9  # the largest of them have colours of their own
OTHERS = "others"


@dataclass(frozen=True)
class Rows:
    """All prompts of a run, column by column."""

    index: NDArray[np.int64]
    status: list[str]
    text: list[str]
    top: list[str]
    """The five likeliest next tokens, as one line."""
    tokens: NDArray[np.int64]
    mass: NDArray[np.float64]
    trace: dict[str, NDArray[np.float64]]
    """Layer -> [n]; NaN without numbers, and so in the next two."""
    trace_norm2: dict[str, NDArray[np.float64]]
    effective_rank: dict[str, NDArray[np.float64]]
    groups: dict[str, list[str]]
    """Kept columns of few values."""

    @property
    def ok(self) -> NDArray[np.bool_]:
        """[n] which have numbers."""
        return np.array([status == "ok" for status in self.status], bool)


def read_rows(results: Results) -> Rows:
    """The table's columns that the page needs, shard by shard, so that the prompts' own tokens are not held."""
    layers, kept = results.layers, results.index.layout.keep_columns
    lists: dict[str, list[Any]] = {
        name: [] for name in ("prompt_index", "status", "text", "top_tokens", "tokens", "mass", "reason", *kept)
    }
    lists |= {f"{layer}/{name}": [] for layer in layers for name in ("trace", "trace_norm2", "effective_rank")}
    for reader in results.shards():
        for name, values in lists.items():
            if name not in reader.table.schema.names:
                found = [None] * reader.table.num_rows
            else:
                found = reader.table.column(name).to_pylist()
            values.extend(_short(text) for text in found) if name == "text" else values.extend(found)
    shown = [
        text or f"({reason or 'no text stored'})" for text, reason in zip(lists["text"], lists["reason"], strict=True)
    ]
    per_layer = {
        name: {layer: _floats(lists[f"{layer}/{name}"]) for layer in layers}
        for name in ("trace", "trace_norm2", "effective_rank")
    }
    return Rows(
        index=np.array(lists["prompt_index"], np.int64),
        status=lists["status"],
        text=shown,
        top=[" ".join(_visible(token) for token in (tokens or ())[:5]) for tokens in lists["top_tokens"]],
        tokens=np.array(lists["tokens"], np.int64),
        mass=_floats(lists["mass"]),
        groups=_groups({name: lists[name] for name in kept}),
        **per_layer,
    )


def describe_prompt(records: dict[str, PromptRecord]) -> dict[str, Any]:
    """Everything that the page shows of one prompt, from its record at each layer."""
    first = next(iter(records.values()))
    names = first.top_tokens or tuple(f"#{token}" for token in first.token_ids)
    return {
        "text": first.text,
        "pieces": None if first.prompt_tokens is None else list(first.prompt_tokens),
        "top": list(names),
        "p": rounded(np.exp(first.log_probs)),
        "layers": {
            layer: {
                "S": rounded(record.S[record.S > 0]),
                "trace": rounded(record.trace),
                "norm": rounded(record.residual_norm),
                "energy": rounded(record.position_energy),
                "trades": [rounded(row) for row in record.trades()[:, record.S > 0].T],
            }
            for layer, record in records.items()
        },
    }


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers to a few significant digits, for JSON; NaN becomes None."""
    if np.ndim(values):
        return [rounded(value, digits) for value in values]
    return float(f"{float(values):.{digits}g}") if np.isfinite(values) else None


def _groups(columns: dict[str, list[Any]]) -> dict[str, list[str]]:
    """Kept columns of few values; what is not among a column's `GROUPS` most frequent values is of the others."""
    groups = {}
    for name, values in columns.items():
        texts = ["none" if value is None else str(value) for value in values]
        counts = Counter(texts).most_common()
        if 2 <= len(counts) <= GROUP_VALUES:
            large = {text for text, _ in counts[: GROUPS if len(counts) > GROUPS + 1 else len(counts)]}
            groups[name] = [text if text in large else OTHERS for text in texts]
    return groups


def _floats(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _short(text: str | None) -> str | None:
    if text is None:
        return None
    text = " ".join(text[: 2 * TEXT].split())
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _visible(token: str) -> str:
    return repr(token)[1:-1] if token.strip() != token or not token else token
