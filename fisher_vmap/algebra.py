"""Algebra of low-rank Fisher matrices, F = V^T diag(S) V, without forming them. Numpy only, in float64.

A matrix is given as anything with S [R] and V [R, D] (a record of a results folder, a `Spectrum`), as a `LowRank`, or
as a pair (S, V). Functions of many matrices take S [n, R] and V [n, R, D]: a batch's `LowRank`, or
`results.stack(where={"status": "ok"})`, which leaves out prompts without numbers. Theirs are NaN, and so is everything
computed from them. Units: F is in nats^2 per squared unit of the residual stream.

`eigenvectors` and `contrast` take dense means, [D, D], because a mean of many low-rank matrices has no low rank. They
find one group's leading directions, and the directions that distinguish two groups of prompts. Where [D, D] is too
large, `mean_factors` has the mean's leading directions without it, and `contrast` takes them too.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [  # noqa: RUF022, the order of the reference
    "Spectrum",
    "Contrast",
    "MeanFactors",
    "factors",
    "matvec",
    "quadratic",
    "trace",
    "inner",
    "norm",
    "cosine",
    "inner_products",
    "cosines",
    "principal_angles",
    "overlap",
    "project",
    "eigenvectors",
    "contrast",
    "mean_factors",
]

Float64 = NDArray[np.float64]

ROWS_BYTES = 256 * 2**20  # of the directions that `mean_factors` keeps; it needs about four times as much
LEAST_ROWS, MOST_ROWS = 64, 2048  # their number
RIDGES = (1e-6, 1e6)  # of `contrast`
NOISE = 1e-11  # of the largest eigenvalue: below it, an eigenvector of a Gram matrix is no longer orthogonal to others

_BLOCK_ROWS = 2048  # rows of V multiplied at a time: [2048, 2048] products of float64 are 32 MB


class Spectrum(NamedTuple):
    """The leading eigenvalues S [R] and eigenvectors V [R, D], as rows, of a symmetric matrix; float64."""

    S: Float64
    V: Float64

    def matvec(self, x: ArrayLike) -> Float64:
        """V^T diag(S) V x; see `matvec`."""
        return matvec(self, x)


def factors(matrix: Any) -> tuple[Float64, Float64]:
    """S [..., R] and V [..., R, D] in float64 of low-rank matrices in any of the accepted forms.

    Raises:
        ValueError: it has neither S and V nor the fields of a `LowRank`, or their shapes do not match.
    """
    if hasattr(matrix, "S") and hasattr(matrix, "V"):
        pair = (matrix.S, matrix.V)
    elif hasattr(matrix, "singular_values"):
        pair = (matrix.singular_values, matrix.vectors)
    elif isinstance(matrix, tuple) and len(matrix) == 2:
        pair = matrix
    else:
        raise ValueError(
            f"{type(matrix).__name__} is not a low-rank matrix; expected a record, a LowRank or a pair (S, V)"
        )
    S, V = (np.asarray(x.cpu() if hasattr(x, "cpu") else x, np.float64) for x in pair)
    if V.ndim != S.ndim + 1 or V.shape[:-1] != S.shape:
        raise ValueError(f"S has shape {S.shape} and V {V.shape}; expected [..., R] and [..., R, D]")
    return S, V


def matvec(matrix: Any, x: ArrayLike) -> Float64:
    """F x = V^T (S * (V x)).

    Args:
        matrix: one low-rank matrix.
        x: [D], or [D, n] for n vectors at once.

    Returns:
        F x, of the shape of x.
    """
    S, V = factors(matrix)
    return np.asarray(V.T @ ((V @ vectors_of(x, V.shape[-1])).T * S).T)


def vectors_of(x: ArrayLike, width: int) -> Float64:
    """Vectors in float64, [D] or [D, n].

    Raises:
        ValueError: the width is not that of the matrix.
    """
    array = np.asarray(x, np.float64)
    if array.ndim not in (1, 2) or len(array) != width:
        raise ValueError(f"x has shape {array.shape}; expected [{width}] or [{width}, n], as wide as the matrix")
    return array


class Contrast(NamedTuple):
    """Directions that one mean Fisher matrix A responds to and another, B, does not; see `contrast`."""

    ratios: Float64
    """[R] generalised eigenvalues (v^T A v) / (v^T (B + ridge I) v), highest first."""
    directions: Float64
    """[R, D] the directions v, of unit length; orthogonal in the metric of B + ridge I, not in the plain one."""
    inside: Float64
    """[R] v^T A v."""
    outside: Float64
    """[R] v^T B v."""
    ridge: float
    """The value added to B's diagonal, in the units of B."""


def eigenvectors(matrix_DD: ArrayLike, rank: int) -> Spectrum:
    """The leading eigenvalues and eigenvectors of a dense symmetric matrix, such as a mean Fisher matrix.

    Args:
        matrix_DD: [D, D], symmetric.
        rank: how many; at most D.

    Returns:
        S [rank], highest first, and V [rank, D]; each row's entry of largest magnitude is positive.

    Raises:
        ValueError: it is not square, not finite, or smaller than `rank`.
    """
    matrix = _square(matrix_DD, "the matrix")
    if not 1 <= rank <= len(matrix):
        raise ValueError(f"rank is {rank}; expected 1 to {len(matrix)}, the width of the matrix")
    values, vectors = np.linalg.eigh(matrix)
    return Spectrum(values[::-1][:rank].copy(), _signed(vectors.T[::-1][:rank]))


class MeanFactors(NamedTuple):
    """A mean of low-rank matrices by its own leading directions, V^T diag(S) V, without [D, D]; see `mean_factors`."""

    S: Float64
    """[m] eigenvalues, highest first."""
    V: Float64
    """[m, D] eigenvectors, orthonormal rows."""
    trace: float
    """Of the whole mean, at least the sum of S; NaN of no matrices."""
    prompts: int
    """How many matrices it is the mean of."""

    @property
    def share(self) -> float:
        """The share of the trace that the m directions hold: 1 where they are all."""
        return float(self.S.sum() / self.trace) if self.trace > 0 else 1.0


def mean_factors(matrices: Iterable[Any], width: int, most: int | None = None) -> MeanFactors:
    """The mean of low-rank matrices by its eigenvalues and eigenvectors, in memory that their number does not change.

    With W = diag(sqrt S) V, the rows of all n matrices below one another, their sum is W^T W, and the eigenvectors
    follow from those of W W^T. When W has more than 2 m rows, it is cut to its m leading directions, again and again.
    An eigenvalue is then too small, at most by the part of the trace that was cut off (`share`). [Brand, 2006]

    Args:
        matrices: low-rank matrices of the same D, or parts of many: S [n, R], V [n, R, D].
        width: D.
        most: m; None: what `ROWS_BYTES` hold in float64, from `LEAST_ROWS` to `MOST_ROWS`, no more than D.

    Returns:
        S [at most 2 m], V, the trace of the whole mean and the number of matrices.

    Raises:
        ValueError: something is no low-rank matrix of that width, or not finite.
    """
    m = most or min(max(LEAST_ROWS, ROWS_BYTES // (8 * width)), MOST_ROWS, width)
    rows, filled, trace, count = np.empty((2 * m, width)), 0, 0.0, 0
    for matrix in matrices:
        S, V = factors(matrix)
        if V.shape[-1] != width or not (np.isfinite(S).all() and np.isfinite(V).all()):
            raise ValueError(f"a matrix of width {V.shape[-1]} is not finite, or not of width {width}")
        trace, count = trace + float(S.sum()), count + (len(S) if S.ndim == 2 else 1)
        W = (np.sqrt(S)[..., None] * V).reshape(-1, width)[S.reshape(-1) > 0]
        while len(W):
            if filled == len(rows):
                kept = _leading_rows(rows, m)[1]
                rows[: len(kept)], filled = kept, len(kept)
            part, W = W[: len(rows) - filled], W[len(rows) - filled :]
            rows[filled : filled + len(part)] = part
            filled += len(part)
    if not count:
        return MeanFactors(np.zeros(0), np.zeros((0, width)), float("nan"), 0)
    S, V = _leading_rows(rows[:filled], filled)
    del rows
    for row, root in zip(V, np.sqrt(S), strict=True):  # in place, as `_signed` does
        row /= root if row[np.abs(row).argmax()] > 0 else -root
    return MeanFactors(S / count, V, trace / count, count)


def _leading_rows(rows: Float64, most: int) -> tuple[Float64, Float64]:
    """The leading eigenvalues of W^T W and their eigenvectors times the roots, [at most `most`, D]."""
    values, turned = np.linalg.eigh(rows @ rows.T)
    chosen = np.flatnonzero(values > NOISE * values.max(initial=0.0))[::-1][:most]
    return values[chosen], turned[:, chosen].T @ rows


def contrast(inside_DD: Any, outside_DD: Any, rank: int = 5, ridge: float = 0.01) -> Contrast:
    """Directions that matter for one group of prompts and not for another.

    With A and B the mean Fisher matrices of the two groups, the v that maximise (v^T A v) / (v^T (B + r I) v): the
    generalised eigenvectors A v = ratio (B + r I) v. Without r a direction that B ignores, whose v^T B v is well below
    r, would win for any A. [Fukunaga, Introduction to Statistical Pattern Recognition, 1990, ch. 10]

    Args:
        inside_DD: A, [D, D]; or the `MeanFactors` of A.
        outside_DD: B, [D, D]; or the `MeanFactors` of B.
        rank: how many directions; at most D, or the directions of A's factors.
        ridge: r / (tr(B) / D), a part of B's mean eigenvalue, in `RIDGES`: below, rounding decides; above, A alone.

    Raises:
        ValueError: the matrices' shapes differ, they are not finite, B is zero, or rank or ridge is out of range.
    """
    if isinstance(inside_DD, MeanFactors) and isinstance(outside_DD, MeanFactors):
        return _contrast_of_factors(inside_DD, outside_DD, rank, ridge)
    A, B = _square(inside_DD, "the group's mean"), _square(outside_DD, "the other group's mean")
    if B.shape != A.shape:
        raise ValueError(f"the two means have the shapes {A.shape} and {B.shape}; expected equal ones")
    r = _ridge_of(rank, len(A), ridge, float(np.trace(B)) / len(A))
    values, vectors = np.linalg.eigh(B + r * np.eye(len(A)))
    whitening = vectors / np.sqrt(values)  # (B + r I)^(-1/2) up to a rotation, [D, D]
    ratios, turned = np.linalg.eigh(whitening.T @ A @ whitening)
    directions = (whitening @ turned[:, ::-1][:, :rank]).T
    directions = _signed(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    inside, outside = (np.einsum("rd,de,re->r", directions, M, directions) for M in (A, B))
    return Contrast(ratios[::-1][:rank].copy(), directions, inside, outside, r)


def _contrast_of_factors(A: MeanFactors, B: MeanFactors, rank: int, ridge: float) -> Contrast:
    """`contrast` without [D, D].

    With A = W^T W, W = diag(sqrt S_A) V_A, the ratios are the eigenvalues of W (B + r I)^-1 W^T, and with u its
    eigenvectors v is along (B + r I)^-1 W^T u. By B's orthonormal rows, (B + r I)^-1 = I / r + V_B^T diag(c) V_B with
    c = 1 / (S_B + r) - 1 / r.
    """
    D = A.V.shape[1]
    if B.V.shape[1] != D:
        raise ValueError(f"the two means have the widths {D} and {B.V.shape[1]}; expected equal ones")
    r = _ridge_of(rank, len(A.S), ridge, B.trace / D)
    c = 1 / (B.S + r) - 1 / r
    along = (np.sqrt(A.S)[:, None] * A.V) @ B.V.T  # W V_B^T, [a, b]
    ratios, u = np.linalg.eigh(np.diag(A.S) / r + (along * c) @ along.T)
    ratios, u = ratios[::-1][:rank].copy(), u[:, ::-1][:, :rank]
    directions = (np.sqrt(A.S) * u.T) @ A.V / r + ((u.T @ along) * c) @ B.V
    directions = _signed(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    inside, outside = (quadratic((M.S, M.V), directions.T) for M in (A, B))
    return Contrast(ratios, directions, inside, outside, r)


def _ridge_of(rank: int, most: int, ridge: float, eigenvalue: float) -> float:
    """r, a fraction of the mean eigenvalue, if rank and ridge are in their ranges."""
    if not (1 <= rank <= most and RIDGES[0] <= ridge <= RIDGES[1]):
        raise ValueError(f"rank is {rank} and ridge {ridge}; expected 1 to {most}, and {RIDGES[0]:g} to {RIDGES[1]:g}")
    if not eigenvalue > 0:
        raise ValueError("the other group's mean is zero; there is nothing to contrast with")
    return ridge * eigenvalue


def _square(matrix: ArrayLike, what: str) -> Float64:
    square = np.asarray(matrix, np.float64)
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        raise ValueError(f"{what} has shape {square.shape}; expected [D, D]")
    if not np.isfinite(square).all():
        raise ValueError(f"{what} is not finite; a mean over no prompts is NaN")
    return 0.5 * (square + square.T)


def _signed(rows: Float64) -> Float64:
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.where(largest < 0, -1.0, 1.0) * rows


def quadratic(matrix: Any, v: ArrayLike) -> Any:
    """v^T F v = sum_r S_r (V_r . v)^2; half of it times eps^2 is the KL divergence, in nats, of a small step eps v.

    Args:
        matrix: one low-rank matrix or many, S [n, R].
        v: [D], or [D, m] for m vectors at once.

    Returns:
        For one matrix a number, or [m]; for n matrices [n], or [n, m].
    """
    S, V = factors(matrix)
    along = V @ vectors_of(v, V.shape[-1])  # [..., R] or [..., R, m]
    weights = S if np.ndim(v) == 1 else S[..., None]
    return (weights * along**2).sum(S.ndim - 1)


def trace(matrix: Any) -> Any:
    """The trace, sum_r S_r, of the kept rank: a number, or [n] for many. `record.trace` covers all K tokens."""
    return factors(matrix)[0].sum(-1)


def inner(one: Any, other: Any) -> float:
    """The Frobenius inner product tr(F G) = sum_rs S_r T_s (V_r . W_s)^2 of two matrices V^T S V and W^T T W."""
    (S, V), (T, W) = factors(one), factors(other)
    return float(S @ (V @ W.T) ** 2 @ T)


def norm(matrix: Any) -> Any:
    """The Frobenius norm, sqrt(sum_r S_r^2), of matrices with orthonormal V: a number, or [n] for many."""
    return np.sqrt((factors(matrix)[0] ** 2).sum(-1))


def cosine(one: Any, other: Any) -> float:
    """tr(F G) / (|F| |G|): 1 for multiples of one another, 0 for orthogonal ranges; NaN if one of them is zero."""
    with np.errstate(invalid="ignore"):
        return float(np.float64(inner(one, other)) / (norm(one) * norm(other)))


def inner_products(many: Any, others: Any = None) -> Float64:
    """tr(F_i G_j) of all pairs: [n, m], by products of blocks of V.

    Args:
        many: S [n, R], V [n, R, D], such as `results.stack(where={"status": "ok"})`; rows of NaN give NaN.
        others: S [m, R'], V [m, R', D]; None: `many` again.
    """
    S, V = factors(many)
    T, W = (S, V) if others is None else factors(others)
    found = np.empty((len(S), len(T)))
    rows, columns = (max(1, _BLOCK_ROWS // max(1, x.shape[1])) for x in (S, T))
    for i in range(0, len(S), rows):
        A = (np.sqrt(S[i : i + rows])[..., None] * V[i : i + rows]).reshape(-1, V.shape[2])
        for j in range(0, len(T), columns):
            B = (np.sqrt(T[j : j + columns])[..., None] * W[j : j + columns]).reshape(-1, W.shape[2])
            squares = (A @ B.T) ** 2
            shape = (len(A) // S.shape[1], S.shape[1], len(B) // T.shape[1], T.shape[1])
            found[i : i + shape[0], j : j + shape[2]] = squares.reshape(shape).sum((1, 3))
    return found


def cosines(many: Any, others: Any = None) -> Float64:
    """`cosine` of all pairs: [n, m]; NaN if one of the two is zero. Arguments as `inner_products`."""
    lengths = norm(many), norm(many if others is None else others)
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner_products(many, others) / np.outer(*lengths)


def principal_angles(one: Any, other: Any, rank: int | None = None) -> Float64:
    """The angles, in radians, between the spans of the leading `rank` directions of two matrices, smallest first.

    The cosines are the singular values of V W^T, which do not resolve small angles; those come from the sines, the
    singular values of W - (W V^T) V. [Bjorck and Golub, Math. Comp. 1973; Knyazev and Argentati, SISC 2002]

    Args:
        one: a low-rank matrix.
        other: another of the same D.
        rank: directions of each; None: as many as both have with S above zero.

    Raises:
        ValueError: one of them has fewer directions than `rank`.
    """
    V, W = _leading(one, other, rank)
    cos = np.linalg.svd(V @ W.T, compute_uv=False)
    sin = np.linalg.svd(W - (W @ V.T) @ V, compute_uv=False)[::-1]  # the smallest sine belongs to the largest cosine
    return np.asarray(np.where(cos**2 > 0.5, np.arcsin(np.clip(sin, 0, 1)), np.arccos(np.clip(cos, 0, 1))))


def overlap(one: Any, other: Any, rank: int | None = None) -> float:
    """The share of one leading subspace that lies in the other: |V W^T|^2 / rank, the mean of cos^2 of their angles.

    1 for equal spans, 0 for orthogonal ones, rank / D on average for random ones. Arguments as `principal_angles`.
    """
    V, W = _leading(one, other, rank)
    return float(((V @ W.T) ** 2).sum() / len(V))


def project(matrix: Any, x: ArrayLike, rank: int | None = None) -> Float64:
    """The part of x in the span of the leading `rank` directions: V^T V x.

    Args:
        matrix: one low-rank matrix.
        x: [D], or [D, n].
        rank: None: all directions with S above zero.
    """
    S, V = factors(matrix)
    V = V[: (S > 0).sum() if rank is None else rank]
    return np.asarray(V.T @ (V @ vectors_of(x, V.shape[-1])))


def _leading(one: Any, other: Any, rank: int | None) -> tuple[Float64, Float64]:
    (S, V), (T, W) = factors(one), factors(other)
    have = int(min((S > 0).sum(), (T > 0).sum()))
    rank = have if rank is None else rank
    if not 1 <= rank <= have:
        raise ValueError(f"rank is {rank}; expected 1 to {have}, the directions that both matrices have")
    return V[:rank], W[:rank]
