"""What stands for a low-rank matrix F = V^T diag(S) V, and its product with vectors. Numpy only, in float64."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


class Spectrum(NamedTuple):
    """The leading eigenvalues S [R] and eigenvectors V [R, D], as rows, of a symmetric matrix; float64."""

    S: Float64
    V: Float64

    def matvec(self, x: ArrayLike) -> Float64:
        """V^T diag(S) V x; see `matvec`."""
        return matvec(self, x)


def factors(matrix: Any) -> tuple[Float64, Float64]:
    """S [..., R] and V [..., R, D] in float64 of whatever stands for low-rank matrices.

    Raises:
        ValueError: it has neither S and V nor the fields of a `LowRank`, or their shapes do not fit.
    """
    if hasattr(matrix, "S") and hasattr(matrix, "V"):
        pair = (matrix.S, matrix.V)
    elif hasattr(matrix, "singular_values"):
        pair = (matrix.singular_values, matrix.vectors)
    elif isinstance(matrix, tuple) and len(matrix) == 2:
        pair = matrix
    else:
        raise ValueError(
            f"{type(matrix).__name__} is no low-rank matrix; expected a record, a LowRank or a pair (S, V)"
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
        Of x's shape.
    """
    S, V = factors(matrix)
    return np.asarray(V.T @ ((V @ vectors_of(x, V.shape[-1])).T * S).T)


def vectors_of(x: ArrayLike, width: int) -> Float64:
    """Vectors in float64, [D] or [D, n].

    Raises:
        ValueError: it is of another width than the matrix.
    """
    array = np.asarray(x, np.float64)
    if array.ndim not in (1, 2) or len(array) != width:
        raise ValueError(f"x has shape {array.shape}; expected [{width}] or [{width}, n], as wide as the matrix")
    return array
