"""What the report says of several targets: numbers of each prompt, its completions, and the pairs that are traded.

A target is a position whose next-token distribution was read; the token that it predicts stands one further.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fisher_vmap.escape import visible
from fisher_vmap.results.record import PromptRecord
from fisher_vmap.results.targets import RecordTargets

PAIRS = 12  # (target, token) pairs of a direction that are shown
COLUMNS = ("targets", "mean_entropy", "mean_log_prob", "completions")
TEXT = 180  # characters of a prompt in the table

Floats = NDArray[np.float64]


class Shade(NamedTuple):
    """What points are coloured by, and a histogram shows: a value for each prompt, NaN without numbers."""

    values: Floats
    title: str
    short: str
    """The same in two lines, for plotly."""
    most: float | None
    """The largest possible value; None: there is no bound."""
    tickformat: str | None


@dataclass(frozen=True)
class TargetRows:
    """All prompts of a run with several targets, column by column; NaN where there are no numbers."""

    targets: Floats
    """[n] their number."""
    mean_entropy: Floats
    """[n] nats."""
    mean_log_prob: Floats
    """[n] nats, of the tokens that follow."""
    completions: list[str] | None
    """The first completion of each prompt as one line, and how many others there are; None: there is none."""


def read_targets(tables: Sequence[pa.Table]) -> TargetRows | None:
    """Collect the `COLUMNS` from the shards' rows; None if there are no tables."""
    if not tables:
        return None
    *numbers, completions = ([x for table in tables for x in table.column(name).to_pylist()] for name in COLUMNS)
    counts, entropy, log_prob = (
        np.array([np.nan if x is None else x for x in column], np.float64) for column in numbers
    )
    return TargetRows(
        counts, entropy, log_prob, [_first_of(found) for found in completions] if any(completions) else None
    )


def shortened(text: str | None) -> str | None:
    """The beginning of a text, on one line."""
    if text is None:
        return None
    text = " ".join(text[: 2 * TEXT].split())
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _first_of(completions: list[str] | None) -> str:
    first, *others = completions or ("",)
    return (shortened(first) or "") + (f" (and {len(others)} more)" if others else "")


def shade_of(mass: Floats, rows: TargetRows | None) -> Shade:
    """The covered mass of one target, or the mean entropy of several."""
    if rows is None:
        return Shade(mass, "covered mass", "covered<br>mass", 1.0, ".0%")
    return Shade(rows.mean_entropy, "mean entropy of a target (nats)", "entropy<br>(nats)", None, None)


def tiles_of(rows: TargetRows) -> list[tuple[str, str]]:
    """The numbers at the top of the page, each with what it is."""
    tiles = []
    for values, digits, what in (
        (rows.targets, ".4g", "targets a prompt (median)"),
        (rows.mean_entropy, ".3g", "nats of entropy a target (median)"),
        (rows.mean_log_prob, ".3g", "nats of log p of the token that follows a target (median)"),
    ):
        known = values[np.isfinite(values)]
        if len(known):
            tiles.append((f"{np.median(known):{digits}}", what))
    return tiles


def describe_targets(record: PromptRecord, rounded: Any) -> dict[str, Any] | None:
    """What the page shows of one prompt's targets, for all layers; None if the last token is the only one.

    Args:
        record: of any layer.
        rounded: makes numbers fit for JSON.
    """
    targets = record.targets
    if targets is None:
        return None
    prompt, completions = list(record.prompt_tokens or ()), _completions(record)
    # Without the prompt's text, the first target tells where its completion begins, and the last how long it is.
    start = len(prompt) or int(targets.positions.min() if completions else targets.positions.max()) + 1
    blocks, before = [], [""] * len(targets.positions)
    for number in range(int(targets.samples.max()) + 1):
        own = np.flatnonzero(targets.samples == number)
        follows = {int(targets.positions[j]) + 1: int(j) for j in own}  # the target that predicts each position
        written = completions[number] if completions else None
        tokens = (prompt or [""] * start) + (written or [])
        for position, j in follows.items():
            before[j] = _name(tokens, position - 1)
        first = 0 if written is None else start
        shown = prompt if written is None else written
        blocks.append(
            {
                "pieces": shown or None,
                "of": [follows.get(first + i) for i in range(len(shown))],
                "after": follows.get(first + len(shown)) if shown else None,
                "first": first,
                "targets": own.tolist(),
                "log_prob": rounded(np.nansum(targets.log_probs[own])),
                "entropy": rounded(targets.entropy[own].mean()),
            }
        )
    return {
        "start": start if len(completions) == 1 else None,
        "written": bool(completions),
        "blocks": blocks,
        "position": targets.positions.tolist(),
        "sample": targets.samples.tolist(),
        "before": before,
        "log_prob": rounded(targets.log_probs),
        "entropy": rounded(targets.entropy),
        "of": [] if record.token_targets is None else record.token_targets.tolist(),
        "taken": _taken(record, targets),
    }


def describe_trades(record: PromptRecord, rounded: Any) -> dict[str, Any]:
    """What one layer adds: of each target its trace, and of each direction the pairs that it trades most.

    A pair is its number among the record's outcomes and the change of its log p for a step of length 1, highest first.
    """
    there = np.flatnonzero(record.token_ids >= 0)
    pairs = []
    for change in record.trades()[:, record.S > 0].T:
        most = there[np.argsort(-np.abs(change[there]), kind="stable")[:PAIRS]]
        order = most[np.argsort(-change[most], kind="stable")]
        pairs.append([[int(k), rounded(change[k])] for k in order])
    return {"target_trace": rounded(record.target_trace), "trace_error": rounded(record.trace_error), "pairs": pairs}


def _name(pieces: Sequence[str], place: int) -> str:
    """A token's text, fit to be seen. Of the tokens of one character only the last has it; others are named by it."""
    whole = next((piece for piece in pieces[place:] if piece), "")
    return visible(pieces[place]) if pieces[place] or not whole else f"part of {visible(whole)}"


def _completions(record: PromptRecord) -> list[list[str]]:
    """The tokens of each completion as text, or by their ids if the text is not stored."""
    row: Mapping[str, Any] = record.row
    texts = row.get("completion_tokens")
    if texts is not None:
        return [list(tokens) for tokens in texts]
    return [[f"#{token}" for token in ids] for ids in record.completion_ids or ()]


def _taken(record: PromptRecord, targets: RecordTargets) -> list[bool]:
    """Of each outcome, whether it is the completion's own token."""
    if record.token_targets is None or record.completion_ids is None:
        return [False] * len(record.token_ids)
    first = [int(targets.positions[targets.samples == s].min()) for s in range(len(record.completion_ids))]
    found = []
    for token, j in zip(record.token_ids.tolist(), record.token_targets.tolist(), strict=True):
        sample = int(targets.samples[j]) if j >= 0 else 0
        place = int(targets.positions[j]) - first[sample] if j >= 0 else -1
        ids = record.completion_ids[sample]
        found.append(0 <= place < len(ids) and ids[place] == token)
    return found
