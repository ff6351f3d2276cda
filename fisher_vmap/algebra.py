"""Algebra of low-rank Fisher matrices, F = V^T diag(S) V, without forming them. Numpy only, in float64.

A matrix is given as anything with S [R] and V [R, D] (a record of a results folder, a `Spectrum`), as a `LowRank`, or
as a pair (S, V). Functions of many at once want S [n, R] and V [n, R, D]: a batch's `LowRank`, or
`results.stack(where={"status": "ok"})`, which leaves out prompts without numbers: those are NaN, and all that is
computed from them.
Units: F is in nats^2 per squared unit of the residual stream. `eigenvectors` and `contrast` take dense means of many.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fisher_vmap.group_means import Contrast, contrast, eigenvectors
from fisher_vmap.low_rank import Float64, Spectrum, factors, matvec, vectors_of

__all__ = [  # noqa: RUF022, the order of the reference
    "Spectrum",
    "Contrast",
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
]

_BLOCK_ROWS = 2048  # rows of V multiplied at a time: [2048, 2048] products of float64 are 32 MB


def quadratic(matrix: Any, v: ArrayLike) -> Any:
    """v^T F v = sum_r S_r (V_r . v)^2; half of it times eps^2 is the KL divergence, in nats, of a small step eps v.

    Args:
        matrix: one low-rank matrix or many, S [n, R].
        v: [D], or [D, m] for m vectors at once.

    Returns:
        A number (an array of one dimension less than v) for one matrix; for n, [n] or [n, m].
    """
    S, V = factors(matrix)
    along = V @ vectors_of(v, V.shape[-1])  # [..., R] or [..., R, m]
    weights = S if np.ndim(v) == 1 else S[..., None]
    return (weights * along**2).sum(S.ndim - 1)


def trace(matrix: Any) -> Any:
    """The trace, sum_r S_r: a number, or [n] for many. Of the kept rank; `record.trace` is of all K tokens."""
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
    """`cosine` of all pairs: [n, m]; NaN where one of the two is zero. Arguments as `inner_products`."""
    lengths = norm(many), norm(many if others is None else others)
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner_products(many, others) / np.outer(*lengths)


def principal_angles(one: Any, other: Any, rank: int | None = None) -> Float64:
    """The angles, in radians, between the spans of the leading `rank` directions of two matrices, smallest first.

    The cosines are the singular values of V W^T, which say nothing of small angles; those come from the sines, the
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
    """How much of the one's leading subspace lies in the other's: |V W^T|^2 / rank, the mean of cos^2 of their angles.

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
