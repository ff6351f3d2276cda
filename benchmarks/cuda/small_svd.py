"""The small decompositions of a batch: by the Gram matrix, as the package does, and by torch's SVD of the factors.

Which is fastest differs between devices: a GPU's routine for the SVD of small matrices may be slow, and so may float64.
`compress` is the package's whole way, with vectors, signs and ranks.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.cuda.session import Session
from benchmarks.timing import by_turns
from fisher_vmap import compress

RANK = 10  # pairs that are compared
SIZES = ((64, 10, 1536), (64, 32, 1536), (64, 100, 1536), (8, 10, 4096))
SMALL_SIZES = ((3, 4, 36), (3, 12, 36), (3, 20, 36))
ROUNDS, SMALL_ROUNDS = 5, 2

Pairs = tuple[Tensor, Tensor]


def factors(prompts: int, rows: int, width: int) -> Tensor:
    """[B, K, D] float32: rows of falling size, down to a hundredth, as the likelihood of tokens makes them."""
    A_BKD = torch.randn(prompts, rows, width, generator=torch.Generator().manual_seed(rows))
    return A_BKD * torch.logspace(0, -2, rows)[:, None]


def by_compress(A_BKD: Tensor) -> Pairs:
    low = compress(A_BKD, min(RANK, A_BKD.shape[1]))
    return low.singular_values, low.vectors


def by_svd(A_BKD: Tensor) -> Pairs:
    _U, sigma_BK, V_BKD = torch.linalg.svd(A_BKD, full_matrices=False)
    return sigma_BK[:, :RANK] ** 2, V_BKD[:, :RANK]


def by_gram_eigh(A_BKD: Tensor, dtype: torch.dtype) -> Pairs:
    """eigh of A A^T gives the values in ascending order; V = Sigma^-1 Q^T A."""
    A_BKD = A_BKD.to(dtype)
    S_BK, Q_BKK = torch.linalg.eigh(A_BKD @ A_BKD.mT)
    S_BR, Q_BKR = S_BK.flip(1)[:, :RANK], Q_BKK.flip(2)[:, :, :RANK]
    return S_BR, S_BR.rsqrt()[:, :, None] * (Q_BKR.mT @ A_BKD)


WAYS: dict[str, Callable[[Tensor], Pairs]] = {
    "compress": by_compress,
    "Gram by eigh, float64": partial(by_gram_eigh, dtype=torch.float64),
    "Gram by eigh, float32": partial(by_gram_eigh, dtype=torch.float32),
    "svd of A": by_svd,
}


def errors(A_BKD: Tensor, found: Pairs) -> dict[str, float]:
    """How far singular values, pairs (F v = s v) and orthonormal rows are off, against the float64 SVD on the CPU.

    The largest of all prompts; values and pairs relative to the prompt's largest singular value.
    """
    A_BKD = A_BKD.cpu().double()
    S_BR, V_BRD = (x.cpu().double() for x in found)
    exact_BR = torch.linalg.svdvals(A_BKD)[:, : S_BR.shape[1]] ** 2
    largest_B1 = exact_BR[:, :1]
    residual_BRD = (V_BRD @ A_BKD.mT) @ A_BKD - S_BR[:, :, None] * V_BRD
    identity = torch.eye(S_BR.shape[1], dtype=torch.float64)
    return {
        "singular_values": float(((S_BR - exact_BR).abs() / largest_B1).max()),
        "pairs": float((residual_BRD.norm(dim=2) / largest_B1).max()),
        "orthonormality": float((V_BRD @ V_BRD.mT - identity).abs().max()),
    }


def decompositions(session: Session) -> None:
    """Each size by all ways, by turns."""
    for size in SMALL_SIZES if session.small else SIZES:
        name = "{} factors of {} x {}".format(*size)
        if session.left() <= 0:
            session.leave_out(name)
            continue
        session.attempt(name, partial(_one_size, session, name, size))


def _one_size(session: Session, name: str, size: tuple[int, int, int]) -> None:
    A_BKD = factors(*size).to(session.device)
    ways: dict[str, Callable[[], Pairs]] = {}
    for way, function in WAYS.items():
        try:
            function(A_BKD)
        except Exception as error:  # a routine that this device has not: the others are measured
            session.failed(f"{name}: {way}", error)
        else:
            ways[way] = partial(function, A_BKD)
    timed = by_turns(ways, SMALL_ROUNDS if session.small else ROUNDS)
    wrong = {way: errors(A_BKD, found) for way, found in timed.outputs.items()}
    told = (f"{way} {1e3 * min(timed.seconds[way]):.2f} ms (S off {wrong[way]['singular_values']:.0e})" for way in ways)
    entry = {"prompts": size[0], "top_k": size[1], "width": size[2], "seconds": timed.seconds, "errors": wrong}
    session.add("small_svd", entry, f"{name}: {'; '.join(told)}")
    worst = max(wrong["compress"].values()) if "compress" in wrong else 0.0
    assert worst <= 1e-5, f"compress is {worst:.1e} from the float64 decomposition; expected at most 1e-05"
