"""How the Fisher matrices of the same prompts differ between two results folders, such as a model's before and after.

F_A and F_B are a prompt's matrices in the two folders, A = V^T diag(S) V as stored, at one layer of each; both layers
have the same width D. Shards are read one after the other, a shard of each folder in memory at a time.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisher_vmap import algebra
from fisher_vmap.errors import UserError, listed, shown
from fisher_vmap.escape import distinct_labels
from fisher_vmap.progress import step
from fisher_vmap.results.index import ShardEntry
from fisher_vmap.results.kept import as_type
from fisher_vmap.results.means import mean_of_group
from fisher_vmap.results.record import Stack
from fisher_vmap.results.same_prompts import Matched, Side, both_ok, check_same, stacks
from fisher_vmap.results.shard import common_schema
from fisher_vmap.results.traded import Float64, Mask, Traded, traded_tokens

GROUPS = 20  # the largest groups of a column are compared

_PIECE_NUMBERS = 2**22  # of V in float64 at a time: 32 MB


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupChange:
    """Directions to which the second folder's prompts react and the first one's do not, of a group of prompts."""

    prompt_index: NDArray[np.int64]
    """[m] the group's prompts, those with numbers in both folders."""
    directions: algebra.Contrast
    """Of the group's means: `inside` is v^T B v, B of the second folder, `outside` v^T A v; highest ratio first."""
    tokens: tuple[Traded, ...]
    """[R] of each direction."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The same prompts in two folders, A and B: [n] of them have numbers in both. Arrays are float64.

    A prompt's F_A and F_B are the stored matrices, of the R kept directions; |F| is the Frobenius norm.
    """

    folders: tuple[Path, Path]
    """A and B."""
    layers: tuple[str, str]
    """The layer of each."""
    matched_by: Matched
    """By what the prompts were found to be the same."""
    left_out: int
    """How many prompts have no numbers in A, in B, or in both."""
    prompt_index: NDArray[np.int64]
    """[n] their numbers, in order."""
    cosine: Float64
    """[n] tr(F_A F_B) / (|F_A| |F_B|): 1 for multiples of one another, 0 for orthogonal ranges; NaN if one is zero."""
    change: Float64
    """[n] |F_B - F_A| / (|F_A| + |F_B|): 0 for equal matrices, 1 if one of them is zero; NaN if both are."""
    trace_a: Float64
    """[n] the trace of F_A over all K tokens, nats^2 per squared unit of the residual stream."""
    trace_b: Float64
    """[n] that of F_B."""
    outside: Float64
    """[n] 1 - tr(P_A F_B) / tr(F_B), P_A the projector on A's directions: the part of F_B that A does not hold."""
    overlap: Float64
    """[n] |V_A V_B^T|^2 / r of the leading r directions, as many as both have; see `algebra.overlap`."""
    all: GroupChange
    """Directions and tokens of all n prompts."""
    by: str | None
    """The column of the groups."""
    groups: dict[str, GroupChange]
    """By the column's value, the largest first; at most `GROUPS` of them."""
    more_groups: int
    """How many smaller ones there are."""

    @property
    def directions(self) -> algebra.Contrast:
        """The directions of all n prompts."""
        return self.all.directions

    @property
    def ratio(self) -> Float64:
        """[n] trace_b / trace_a; infinite or NaN where trace_a is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.trace_b / self.trace_a

    def order(self) -> NDArray[np.int64]:
        """[n] places in the arrays, the largest change first; NaN last."""
        return np.argsort(-self.change, kind="stable")


def compare(a: Side, b: Side, rank: int = 5, ridge: float = 0.01, by: str | None = None) -> Comparison:
    """Compare two folders of the same prompts, at one layer of each.

    Args:
        a: the first folder, such as that of a base model.
        b: the second one, such as that of a fine-tuned model.
        rank: how many directions, at most; a group has no more than its prompts' matrices of B together.
        ridge: r of `algebra.contrast` as a fraction of A's mean eigenvalue.
        by: a kept column whose values are groups with directions of their own; None: none.

    Raises:
        UserError: other prompts, other widths, a folder that keeps the mean alone, no prompt with numbers in both, no
            such column, rank or ridge out of range, or a damaged folder.
    """
    if not 1 <= rank <= b.width:
        raise UserError(f"rank is {rank}; expected 1 to {b.width}, the width of {b.layer}")
    if not (isfinite(ridge) and ridge > 0):
        raise UserError(f"ridge is {ridge}; expected a fraction of the mean eigenvalue above zero, such as 0.01")
    for side in (a, b):
        if side.index.layout.means_only:
            raise UserError(
                f"{side.folder} keeps the mean alone (save: mean), and prompts are compared by their own matrices; run "
                "it with save: both in another --output_dir"
            )
    if a.width != b.width:
        raise UserError(
            f"{a.layer} of {a.folder} has the width {a.width} and {b.layer} of {b.folder} {b.width}; expected equal "
            "ones: compare models with residual streams of the same width"
        )
    column = _column(a, b, by)
    matched_by = check_same(a, b)
    index, arrays = _of_prompts(a, b)
    stored = max(a.index.stop, b.index.stop)
    if not len(index):
        raise UserError(f"no prompt has numbers in both {a.folder} and {b.folder}; there is nothing to compare")
    mask = np.zeros(stored, bool)
    mask[index] = True
    labels = None if column is None else np.array(distinct_labels(column), object)
    counts = Counter() if labels is None else Counter(labels[mask])
    chosen: dict[str | None, Mask] = {None: mask}
    chosen |= {label: mask & (labels == label) for label, _ in counts.most_common(GROUPS)}
    with step("finding directions"):
        found = {label: _contrast(a, b, group, rank, ridge) for label, group in chosen.items()}
        asked = [(chosen[label], contrast.directions) for label, contrast in found.items()]
        tokens = traded_tokens(b.shards, b.layer, asked)
    changes = [
        GroupChange(prompt_index=np.flatnonzero(chosen[label]), directions=contrast, tokens=traded)
        for (label, contrast), traded in zip(found.items(), tokens, strict=True)
    ]
    groups = {label: change for label, change in zip(found, changes, strict=True) if label is not None}
    return Comparison(
        folders=(a.folder, b.folder),
        layers=(a.layer, b.layer),
        matched_by=matched_by,
        left_out=len({*_numbers(a), *_numbers(b)}) - len(index),
        prompt_index=index,
        all=changes[0],
        by=by,
        groups=groups,
        more_groups=max(len(counts) - GROUPS, 0),
        **arrays,
    )


def _numbers(side: Side) -> Iterator[int]:
    """The numbers of the stored prompts."""
    for entry in side.index.shards:
        yield from range(entry.start, entry.stop)


def _of_prompts(a: Side, b: Side) -> tuple[NDArray[np.int64], dict[str, Float64]]:
    """The numbers [n] of the prompts with numbers in both folders, and what is computed of each, [n]."""
    numbers: list[NDArray[np.int64]] = []
    found: list[dict[str, Float64]] = []
    few = max(1, _PIECE_NUMBERS // (a.width * max(a.index.layout.rank, b.index.layout.rank)))
    for piece, one, other in stacks(a, b, f"comparing {a.layer}"):
        rows = np.flatnonzero(both_ok(piece))
        traces = {
            name: np.array(piece.columns(reader, [f"{side.layer}/trace"])[0], np.float64)[rows]
            for name, side, reader in (("trace_a", a, piece.one), ("trace_b", b, piece.other))
        }
        for start in range(0, len(rows), few):
            part = rows[start : start + few]
            numbers.append(piece.start + part)
            at = slice(start, start + few)
            found.append(_pair(one, other, part) | {name: trace[at] for name, trace in traces.items()})
        del one, other  # before the next shard is read
    names = ("cosine", "change", "trace_a", "trace_b", "outside", "overlap")
    if not numbers:
        return np.zeros(0, np.int64), {name: np.zeros(0) for name in names}
    return np.concatenate(numbers), {name: np.concatenate([part[name] for part in found]) for name in names}


def _pair(one: Stack, other: Stack, rows: NDArray[np.int64]) -> dict[str, Float64]:
    """What two prompts' matrices have in common, from the products of their directions, [n, R, R']."""
    S, V, T, W = (np.asarray(x[rows], np.float64) for x in (one.S, one.V, other.S, other.V))
    squares = (V @ W.swapaxes(1, 2)) ** 2
    # Also of each with itself, since vectors in float16 are orthonormal only to their rounding.
    own = (
        np.einsum("nr,nrs,ns->n", S, (V @ V.swapaxes(1, 2)) ** 2, S),
        np.einsum("nr,nrs,ns->n", T, (W @ W.swapaxes(1, 2)) ** 2, T),
    )
    across = np.einsum("nr,nrs,ns->n", S, squares, T)
    has = S > 0, T > 0
    common = np.minimum(has[0].sum(1), has[1].sum(1))
    leading = [np.arange(x.shape[1]) < common[:, None] for x in (S, T)]
    held = (squares * has[0][:, :, None]).sum(1)  # |P_A w|^2 of each direction w of B
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.sqrt(np.maximum(own[0] + own[1] - 2 * across, 0))
        return {
            "cosine": across / np.sqrt(own[0] * own[1]),
            "change": distance / (np.sqrt(own[0]) + np.sqrt(own[1])),
            "outside": np.clip(1 - (held * T).sum(1) / T.sum(1), 0, 1),
            "overlap": (squares * leading[0][:, :, None] * leading[1][:, None, :]).sum((1, 2)) / common,
        }


def _contrast(a: Side, b: Side, mask: Mask, rank: int, ridge: float) -> algebra.Contrast:
    """Directions of the prompts in the mask, [stored], that B reacts to and A does not."""
    means = [
        mean_of_group(side.shards, side.index.layout, side.layer, lambda reader: mask[_range(reader.entry)])[0]
        for side in (b, a)
    ]
    most = min(rank, int(mask.sum()) * b.index.layout.rank)
    if isinstance(means[0], algebra.MeanFactors):
        most = min(most, len(means[0].S))
    try:
        return algebra.contrast(means[0], means[1], max(most, 1), ridge)
    except ValueError as error:
        raise UserError(
            f"the matrices of prompts {listed([str(i) for i in np.flatnonzero(mask)], 3)} at {a.layer} of {a.folder} "
            f"are zero ({error}); compare other layers or prompts"
        ) from error


def _range(entry: ShardEntry) -> slice:
    return slice(entry.start, entry.stop)


def _column(a: Side, b: Side, by: str | None) -> list[Any] | None:
    """The values of a kept column for all stored prompts, from the first folder that has it; None without `by`."""
    if by is None:
        return None
    kept = [side.index.layout.keep_columns for side in (a, b)]
    side = next((side for side, names in zip((a, b), kept, strict=True) if by in names), None)
    if side is None:
        names = list(dict.fromkeys(kept[0] + kept[1]))
        there = f"there is {listed(names)}" if names else "none is kept: run with --keep_columns"
        raise UserError(f"{shown(by)} is no kept column of {a.folder} or {b.folder}; {there}")
    schema = common_schema((reader.table.schema for reader in side.shards()), side.index.layout)
    values: list[Any] = [None] * max(a.index.stop, b.index.stop)
    for reader in side.shards():
        values[_range(reader.entry)] = as_type(reader.table.column(by), schema.field(by).type).to_pylist()
    return values
