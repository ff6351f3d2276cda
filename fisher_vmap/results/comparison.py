"""How the Fisher matrices of the same prompts differ between two results folders, such as a model's before and after.

F_A and F_B are a prompt's matrices in the two folders, A = V^T diag(S) V as stored, at one layer of each; both layers
have the same width D. Shards are read one after the other, a shard of each folder in memory at a time.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral, Real
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

    value: Any
    """The column's value; None for all prompts, too."""
    prompt_index: NDArray[np.int64]
    """[m] the group's prompts, those with numbers in both folders."""
    directions: algebra.Contrast
    """Of the group's means: `inside` is v^T B v, B of the second folder, `outside` v^T A v; highest ratio first. None,
    R = 0, where all matrices of A or all of B are zero."""
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
    """By the column's value as it is shown, the largest first; at most `GROUPS` of them."""
    more_groups: int
    """How many smaller ones there are."""
    other_values: int
    """How many of the n prompts have another value of the column in B than in A, whose values are the groups."""

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
        by: a kept column whose values, those of A if it has them, are groups with directions of their own; None: none.

    Raises:
        UserError: other prompts, other widths, a folder that keeps the mean alone, no prompt with numbers in both, no
            such column, rank or ridge out of range, or a damaged folder.
    """
    check(a, b, rank, ridge)
    columns = _columns(a, b, by)
    matched_by = check_same(a, b)
    index, arrays = _of_prompts(a, b)
    stored = max(a.index.stop, b.index.stop)
    if not len(index):
        raise UserError(f"no prompt has numbers in both {a.folder} and {b.folder}; there is nothing to compare")
    mask = np.zeros(stored, bool)
    mask[index] = True
    labels = np.array(distinct_labels(columns[0]), object) if columns else None
    counts = Counter() if labels is None else Counter(labels[mask])
    chosen: dict[str | None, Mask] = {None: mask}
    chosen |= {label: mask & (labels == label) for label, _ in counts.most_common(GROUPS)}
    with step("finding directions"):
        found = {label: _contrast(a, b, group, rank, ridge) for label, group in chosen.items()}
        asked = [(chosen[label], contrast.directions) for label, contrast in found.items()]
        tokens = traded_tokens(b.shards, b.layer, asked)
    changes = {
        label: GroupChange(
            value=None if label is None else columns[0][int(np.argmax(chosen[label]))],
            prompt_index=np.flatnonzero(chosen[label]), directions=contrast, tokens=traded,
        )
        for (label, contrast), traded in zip(found.items(), tokens, strict=True)
    }  # fmt: skip
    return Comparison(
        folders=(a.folder, b.folder),
        layers=(a.layer, b.layer),
        matched_by=matched_by,
        left_out=len({*_numbers(a), *_numbers(b)}) - len(index),
        prompt_index=index,
        all=changes[None],
        by=by,
        groups={label: change for label, change in changes.items() if label is not None},
        more_groups=max(len(counts) - GROUPS, 0),
        other_values=sum(repr(columns[0][i]) != repr(columns[-1][i]) for i in index if columns),
        **arrays,
    )


def check(a: Side, b: Side, rank: int, ridge: float) -> None:
    """Check what can be said before anything is read.

    Raises:
        UserError: other widths, a folder that keeps the mean alone, or rank or ridge out of range.
    """
    if not (isinstance(rank, Integral) and not isinstance(rank, bool) and 1 <= rank <= b.width):
        raise UserError(f"rank is {shown(rank)}; expected 1 to {b.width}, the width of {b.layer}")
    low, high = algebra.RIDGES
    if not (isinstance(ridge, Real) and not isinstance(ridge, bool) and low <= ridge <= high):
        expected = f"a fraction of the mean eigenvalue from {low:g} to {high:g}, such as 0.01"
        raise UserError(f"ridge is {shown(ridge)}; expected {expected}")
    for side in (a, b):
        if side.index.layout.means_only:
            raise UserError(
                f"{side.folder} keeps the mean alone (save: mean), and prompts are compared by their own matrices; run "
                "it with save: both in another --output_dir"
            )
    if a.width != b.width:
        raise UserError(
            f"{a.layer} of {a.folder} has the width {a.width} and {b.layer} of {b.folder} {b.width}; expected equal "
            "ones: name others with --layer_a and --layer_b, or compare models of the same width"
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
    # Vectors are orthonormal only to their rounding: a thousandth in float16.
    across, gram_a, gram_b = (x @ y.swapaxes(1, 2) for x, y in ((V, W), (V, V), (W, W)))
    inner, own_a, own_b = (
        np.einsum("nr,nrs,ns->n", x, products**2, y)
        for x, products, y in ((S, across, T), (S, gram_a, S), (T, gram_b, T))
    )
    has = S > 0, T > 0
    common = np.minimum(has[0].sum(1), has[1].sum(1))
    sizes = np.einsum("nss->ns", gram_b)  # |w|^2 of each direction w of B
    held = np.einsum("nrs,nrs->ns", across, _inverse(gram_a, has[0]) @ across)  # |P_A w|^2
    leading = [np.arange(x.shape[1]) < common[:, None] for x in (S, T)]
    back = _inverse(gram_a, leading[0]) @ across @ _inverse(gram_b, leading[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.sqrt(np.maximum(own_a + own_b - 2 * inner, 0))
        return {
            "cosine": inner / np.sqrt(own_a * own_b),
            "change": distance / (np.sqrt(own_a) + np.sqrt(own_b)),
            "outside": np.clip(1 - (held * T).sum(1) / (sizes * T).sum(1), 0, 1),
            "overlap": (across * back).sum((1, 2)) / common,
        }


def _inverse(gram_nRR: Float64, chosen_nR: Mask) -> Float64:
    """[n, R, R] the inverse among the chosen rows, which are nearly orthonormal; zero elsewhere."""
    chosen_nRR = chosen_nR[:, :, None] & chosen_nR[:, None, :]
    return np.where(chosen_nRR, np.linalg.inv(np.where(chosen_nRR, gram_nRR, np.eye(gram_nRR.shape[1]))), 0.0)


def _contrast(a: Side, b: Side, mask: Mask, rank: int, ridge: float) -> algebra.Contrast:
    """Directions of the prompts in the mask, [stored], that B reacts to and A does not."""
    means = [
        mean_of_group(side.shards, side.index.layout, side.layer, lambda reader: mask[_range(reader.entry)])[0]
        for side in (b, a)
    ]
    if any(len(x.S) == 0 if isinstance(x, algebra.MeanFactors) else np.trace(x) <= 0 for x in means):
        nothing = np.zeros(0)
        return algebra.Contrast(nothing, np.zeros((0, b.width)), nothing, nothing, 0.0)
    most = min(rank, int(mask.sum()) * b.index.layout.rank)
    if isinstance(means[0], algebra.MeanFactors):
        most = min(most, len(means[0].S))
    return algebra.contrast(means[0], means[1], most, ridge)


def _range(entry: ShardEntry) -> slice:
    return slice(entry.start, entry.stop)


def _columns(a: Side, b: Side, by: str | None) -> list[list[Any]]:
    """The values of a kept column for all stored prompts, of each folder that has it; none without `by`."""
    if by is None:
        return []
    kept = [side.index.layout.keep_columns for side in (a, b)]
    sides = [side for side, names in zip((a, b), kept, strict=True) if by in names]
    if not sides:
        names = list(dict.fromkeys(kept[0] + kept[1]))
        there = f"there is {listed(names)}" if names else "none is kept: run with --keep_columns"
        raise UserError(f"{shown(by)} is no kept column of {a.folder} or {b.folder}; {there}")
    found = []
    for side in sides:
        schema = common_schema((reader.table.schema for reader in side.shards()), side.index.layout)
        values: list[Any] = [None] * max(a.index.stop, b.index.stop)
        for reader in side.shards():
            values[_range(reader.entry)] = as_type(reader.table.column(by), schema.field(by).type).to_pylist()
        found.append(values)
    return found
