"""Prompts whose Fisher matrix is unlike the rest, with the reason.

Four measures of each prompt, each turned into a robust z-score over the prompts, (x - median) / (1.4826 MAD); the
largest of a prompt's four is its score. 3.5 and more is worth a look. [Iglewicz and Hoaglin, How to Detect and Handle
Outliers, 1993]

* trace and leading value: log10 of each, to both sides.
* distance: 1 - cosine of the matrix and the mean of the others, all scaled to trace 1. To the far side only.
* shared with few: how far a prompt stands out along a direction that it shares with at most 5% of the prompts. A group
  shows here that is no further from the mean than others are. docs/backdoor.md measured all four on planted triggers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fisher_vmap import algebra
from fisher_vmap.errors import listed
from fisher_vmap.results.reader import Results
from fisher_vmap.results.shard_reader import is_ok

Float = NDArray[np.float64]

WORTH_A_LOOK = 3.5
CANDIDATES = 2000  # directions that are compared with all prompts, or fewer at a wide layer:
CANDIDATE_NUMBERS = 2**27  # in all of them together
FEW = 0.05  # of the prompts, and at least two, may share a direction that counts as shared with few
LEAST_SHARE = 0.02  # of a prompt's trace, for a direction to be a candidate
LEAST_PROMPTS = 8  # with fewer, no outliers are reported

# The least spread that a measure is divided by: 5% of a trace, a hundredth of a cosine, one z.
_FLOORS = {"trace": 0.02, "leading value": 0.02, "distance": 0.01, "shared with few": 1.0}


@dataclass(frozen=True)
class Outlier:
    """An outlier: the prompt, its score, and the reasons, strongest first."""

    index: int
    score: float
    reasons: tuple[str, ...]
    company: tuple[int, ...]
    """All prompts that share its direction, if that is a reason."""


class Scores(NamedTuple):
    """The scores at one layer of the n prompts that have numbers, in order."""

    prompts: NDArray[np.int64]
    """[n] their indices."""
    z: dict[str, Float]
    """Measure -> [n] robust z-scores."""
    company: list[tuple[int, ...]]
    """The prompts that share the direction of "shared with few"."""
    share: Float
    """[n] the part of a prompt's trace that lies along that direction."""
    distance: Float
    """[n] 1 - cosine to the mean of the others."""
    trace: Float
    leading: Float

    @property
    def total(self) -> Float:
        """[n] the largest z-score of each prompt."""
        return np.max(list(self.z.values()), axis=0) if len(self.prompts) else np.zeros(0)


def rank_outliers(scores: Scores, limit: int = 50) -> list[Outlier]:
    """The prompts worth a look, the strongest first."""
    total, found = scores.total, list[Outlier]()
    for i in np.argsort(-total, kind="stable")[:limit]:
        if not total[i] >= WORTH_A_LOOK:
            break
        names = sorted((name for name in scores.z if scores.z[name][i] >= WORTH_A_LOOK), key=lambda n: -scores.z[n][i])
        company = scores.company[i] if "shared with few" in names else ()
        reasons = tuple(_reason(scores, name, int(i)) for name in names)
        found.append(Outlier(int(scores.prompts[i]), float(total[i]), reasons, company))
    return found


def score_prompts(results: Results, layer: str, seed: int = 0) -> Scores:
    """Score every prompt of a layer in four passes over the shards; holds one shard and `CANDIDATES` x n numbers.

    Args:
        results: a folder that keeps its prompts.
        layer: the layer's name.
        seed: breaks ties between directions that are equally worth trying.

    Raises:
        UserError: the folder is damaged.
    """
    view = results.at(layer)
    D, wide = results.index.layout.widths[layer], view.is_wide()
    mean, parts = np.zeros((0, 0) if wide else (D, D)), list[tuple[NDArray[np.int64], Float, Float]]()
    for prompts, share, V, S in _normalised(view):
        if not wide:
            W = (np.sqrt(share)[..., None] * V).reshape(-1, D)
            mean += W.T @ W
        parts.append((prompts, share, S))
    if not parts:
        parts.append((np.zeros(0, np.int64), np.zeros((0, 1)), np.zeros((0, 1))))
    prompts, share, S = (np.concatenate(part) for part in zip(*parts, strict=True))
    traces, leading = S.sum(1), S[:, 0]
    n = len(prompts)
    if n < LEAST_PROMPTS:
        nothing = np.zeros(n)
        return Scores(prompts, dict.fromkeys(_FLOORS, nothing), [()] * n, nothing, nothing, traces, leading)
    if wide:
        M = algebra.mean_factors(((part, V) for _, part, V, _ in _normalised(view)), D)
        rows, size = M.V.astype(np.float32), float((M.S**2).sum())
        own = np.concatenate([(V @ rows.T) ** 2 @ M.S for _, _, V, _ in _normalised(view)])  # v^T M v
    else:
        mean /= n
        size = float((mean**2).sum())
        own = np.concatenate([((V @ mean.astype(np.float32)) * V).sum(-1) for _, _, V, _ in _normalised(view)])
    distance = _distances(share, own, size)
    z_few, company, along = _shared_with_few(view, share, own, np.random.default_rng(seed))
    measures = {
        "trace": np.abs(_robust_z(np.log10(traces), "trace")),
        "leading value": np.abs(_robust_z(np.log10(leading), "leading value")),
        "distance": _robust_z(distance, "distance"),
        "shared with few": _robust_z(z_few, "shared with few"),
    }
    named = [tuple(int(prompts[j]) for j in members) for members in company]
    return Scores(prompts, measures, named, along, distance, traces, leading)


def _normalised(view: Results) -> Iterator[tuple[NDArray[np.int64], Float, NDArray[np.float32], Float]]:
    """For each shard, the prompts with nonzero matrix: index [n], S / trace [n, R], V [n, R, D] and S."""
    for reader in view.shards():
        ok = is_ok(reader)
        S, V, _ = reader.stack(view.layer)
        ok[ok] = S[ok, 0] > 0
        if ok.any():
            kept = S[ok].astype(np.float64)
            yield np.flatnonzero(ok) + reader.entry.start, kept / kept.sum(1, keepdims=True), V[ok], kept


def _distances(share: Float, own: Float, size: float) -> Float:
    """1 - cosine of each scaled matrix F_i and the mean of the others, M_i = (n M - F_i) / (n - 1); size is |M|^2."""
    n = len(share)
    with_mean, squares = (share * own).sum(1), (share**2).sum(1)  # tr(F_i M), |F_i|^2
    with_others = (n * with_mean - squares) / (n - 1)
    others = (n * n * size - 2 * n * with_mean + squares) / (n - 1) ** 2
    return np.asarray(1 - with_others / np.sqrt(squares * np.maximum(others, 1e-300)))


def _shared_with_few(
    view: Results, share: Float, own: Float, rng: np.random.Generator
) -> tuple[Float, list[tuple[int, ...]], Float]:
    """For each prompt: its z-score along a direction that few share, the prompts that share it, and its share along it.

    Candidates are the prompts' own directions that hold more of their trace than of the others'. Along one of them, v,
    each prompt has the share v^T F_j v / tr F_j of its trace. The prompts with at least half the share of the
    candidate's own prompt are its company. A company of 2 up to `FEW` counts; its members get their z-score.
    """
    n, R = share.shape
    excess = share - (n * own - share) / (n - 1)
    order = np.argsort(-(excess + 1e-9 * rng.random(excess.shape)).ravel(), kind="stable")
    most = min(CANDIDATES, CANDIDATE_NUMBERS // view.index.layout.widths[view.layer])
    picked = np.sort(order[share.ravel()[order] > LEAST_SHARE][:most])
    vectors, start = list[NDArray[np.float32]](), 0
    for _, _, V, _ in _normalised(view):
        rows = picked[(picked >= start * R) & (picked < (start + len(V)) * R)] - start * R
        vectors.append(V.reshape(-1, V.shape[2])[rows])
        start += len(V)
    candidates = np.concatenate(vectors)
    along = np.empty((len(candidates), n), np.float32)
    start = 0
    for _, part, V, _ in _normalised(view):
        squares = ((candidates @ V.reshape(-1, V.shape[2]).T) ** 2).reshape(len(candidates), len(V), R)
        along[:, start : start + len(V)] = (squares * part.astype(np.float32)).sum(2)
        start += len(V)
    z, best = np.zeros(n), np.zeros(n)
    company: list[tuple[int, ...]] = [()] * n
    for row, own_prompt in zip(along.astype(np.float64), picked // R, strict=True):
        members = np.flatnonzero(row >= 0.5 * row[own_prompt])
        if not 2 <= len(members) <= max(2, FEW * n):
            continue
        median = np.median(row)
        spread = max(1.4826 * float(np.median(np.abs(row - median))), 0.005)  # half a percent of the trace
        for j in members:
            if (found := (row[j] - median) / spread) > z[j]:
                z[j], best[j], company[j] = found, row[j], tuple(members)
    return z, company, best


def _robust_z(values: Float, measure: str) -> Float:
    median = np.median(values)
    return np.asarray((values - median) / max(1.4826 * float(np.median(np.abs(values - median))), _FLOORS[measure]))


def _reason(scores: Scores, name: str, i: int) -> str:
    z = f"z {scores.z[name][i]:.1f}"
    if name in ("trace", "leading value"):
        values = scores.trace if name == "trace" else scores.leading
        ratio = values[i] / np.median(values)
        much = f"{ratio:.2g} times" if ratio >= 1 else f"1/{1 / ratio:.2g} of"
        return f"{name} {much} the median ({z})"
    if name == "distance":
        return f"unlike the mean of the others: cosine {1 - scores.distance[i]:.2f} ({z})"
    others = [j for j in scores.company[i] if j != scores.prompts[i]]
    shown = listed([str(j) for j in others], 8)
    return f"{scores.share[i]:.0%} of its trace along a direction shared with {shown} and hardly any others ({z})"
