"""Directions of the dense mean matrices of groups of prompts: one group's leading ones, and what sets two groups apart.

A mean of many low-rank matrices is of no low rank itself: here [D, D] is formed and decomposed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fisher_vmap.low_rank import Float64, Spectrum


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
    """What was added to B's diagonal, in its own units."""


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


def contrast(inside_DD: ArrayLike, outside_DD: ArrayLike, rank: int = 5, ridge: float = 0.01) -> Contrast:
    """Directions that matter for one group of prompts and not for another.

    With A and B the mean Fisher matrices of the two groups, the v that maximise (v^T A v) / (v^T (B + r I) v): the
    generalised eigenvectors A v = ratio (B + r I) v. Without r a direction that B ignores would win whatever A makes of
    it. r is stated as a fraction of B's mean eigenvalue, r = ridge tr(B) / D: a direction counts as ignored by B when
    its v^T B v is well below r. [Fukunaga, Introduction to Statistical Pattern Recognition, 1990, ch. 10]

    Args:
        inside_DD: A, [D, D].
        outside_DD: B, [D, D].
        rank: how many directions; at most D.
        ridge: r as a fraction of tr(B) / D, above zero.

    Raises:
        ValueError: the matrices do not fit or are not finite, or ridge is not above zero.
    """
    A, B = _square(inside_DD, "the group's mean"), _square(outside_DD, "the other group's mean")
    D = len(A)
    if B.shape != A.shape:
        raise ValueError(f"the two means have the shapes {A.shape} and {B.shape}; expected equal ones")
    if not (1 <= rank <= D and ridge > 0):
        raise ValueError(f"rank is {rank} and ridge {ridge}; expected 1 to {D}, and above zero")
    r = ridge * float(np.trace(B)) / D
    if not r > 0:
        raise ValueError("the other group's mean is zero; there is nothing to contrast with")
    values, vectors = np.linalg.eigh(B + r * np.eye(D))
    whitening = vectors / np.sqrt(values)  # (B + r I)^(-1/2) up to a rotation, [D, D]
    ratios, turned = np.linalg.eigh(whitening.T @ A @ whitening)
    directions = (whitening @ turned[:, ::-1][:, :rank]).T
    directions = _signed(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    inside, outside = (np.einsum("rd,de,re->r", directions, M, directions) for M in (A, B))
    return Contrast(ratios[::-1][:rank].copy(), directions, inside, outside, r)


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
