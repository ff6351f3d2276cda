"""From the scores to singular values: the package's Gram route, the thin SVD, and the dense SVD of F."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fisher_vmap import compress

TOP_K = RANK = 10


def factors(prompts: int, width: int) -> Tensor:
    """[B, K, D]: rows of falling size, as probabilities make them."""
    A_BKD = torch.randn(prompts, TOP_K, width, generator=torch.Generator().manual_seed(0))
    return A_BKD * 2.0 ** -torch.arange(TOP_K)[:, None]


def by_gram(A_BKD: Tensor) -> Tensor:
    return compress(A_BKD, RANK).singular_values


def by_thin_svd(A_BKD: Tensor) -> Tensor:
    return torch.linalg.svd(A_BKD, full_matrices=False)[1] ** 2


def by_dense_svd(A_BKD: Tensor) -> Tensor:
    return torch.stack([torch.linalg.svd(A_KD.T @ A_KD)[1][:RANK] for A_KD in A_BKD])


@pytest.mark.parametrize("way", [by_gram, by_thin_svd, by_dense_svd], ids=["compress", "thin-svd", "dense-svd"])
@pytest.mark.parametrize(("prompts", "width"), [(8, 576), (2, 1536)])
def test_singular_values(benchmark: Any, way: Any, prompts: int, width: int) -> None:
    A_BKD = factors(prompts, width)
    benchmark.group = f"singular values of {prompts} matrices of {width} x {width}"
    S_BR = benchmark.pedantic(way, (A_BKD,), rounds=3, warmup_rounds=1, iterations=1)
    expected_BR = torch.linalg.svdvals(A_BKD.double()) ** 2
    assert ((S_BR - expected_BR).abs() <= 1e-5 * expected_BR[:, :1]).all()
