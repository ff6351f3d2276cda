"""`compress` against the dense SVD of F = A^T A in float64."""

import pytest
import torch
from devices import on
from oracles import dense_svd, relative
from torch import Tensor

from fisher_vmap import compress
from fisher_vmap.decomposition import compress_layers


def random_factor(B: int, K: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Factors of unequal sizes and of unequal rows."""
    generator = torch.Generator().manual_seed(seed)
    size_BK1 = torch.rand(B, K, 1, generator=generator, dtype=torch.float64) ** 2
    return (size_BK1 * torch.randn(B, K, D, generator=generator, dtype=torch.float64)).to(dtype)


def with_spectrum(sigma: list[float], K: int, D: int, seed: int = 0) -> Tensor:
    """[1, K, D] float64 with the given singular values."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(K, len(sigma), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(D, len(sigma), generator=generator, dtype=torch.float64))
    return (Q * torch.tensor(sigma, dtype=torch.float64) @ V.T)[None]


def assert_is_the_svd(factor: Tensor, rank: int, device: torch.device, orthonormal: float = 1e-5) -> None:
    """All that a result promises, whatever the spectrum: S, rank, truncated F, orthonormal rows, Q, signs, trace."""
    low = on(device, compress)(factor, rank)
    B, K, D = factor.shape
    assert low.singular_values.shape == (B, rank)
    assert low.vectors.shape == (B, rank, D)
    assert low.left_vectors.shape == (B, K, rank)
    assert low.rank.shape == low.trace.shape == (B,)
    eps = torch.finfo(low.singular_values.dtype).eps
    for b in range(B):
        A = factor[b].double()
        F = A.T @ A
        S_dense, V_dense = dense_svd(F)
        S, V, Q = (x[b].double() for x in (low.singular_values, low.vectors, low.left_vectors))
        n, scale = min(rank, D), S_dense[0]
        found = int(low.rank[b])
        kept = min(found, rank)

        padded_S = torch.cat([S_dense, S_dense.new_zeros(rank)])[:rank]
        dropped = padded_S <= 4 * K * eps * scale  # at the edge of the rank either answer is right
        assert ((S - padded_S).abs() <= 1e-5 * scale + dropped * 4 * K * eps * scale).all()
        assert (S[:-1] >= S[1:]).all() and (S >= 0).all()

        edge = K * eps * scale
        assert (S_dense[:found] > 0.5 * edge).all() and (S_dense[found:] < 2 * edge + 4 * D * 2.2e-16 * scale).all()
        assert (S[kept:] == 0).all() and (V[kept:] == 0).all() and (Q[:, kept:] == 0).all()
        identity = torch.eye(kept, dtype=torch.float64)
        torch.testing.assert_close(V[:kept] @ V[:kept].T, identity, atol=orthonormal, rtol=0)
        torch.testing.assert_close(Q[:, :kept].T @ Q[:, :kept], identity, atol=orthonormal, rtol=0)

        # F in place of V: with tied values no vector is determined, and the truncated F only where the cut is no tie.
        cut = n >= len(S_dense) or padded_S[n - 1] - S_dense[n] > 1e-3 * scale or S_dense[n] < 1e-6 * scale
        if cut:
            best = (V_dense[:n].T * S_dense[:n]) @ V_dense[:n]
            torch.testing.assert_close((V.T * S) @ V, best, atol=float(2e-5 * scale), rtol=0)
        residual = (F @ V[:kept].T - V[:kept].T * S[:kept]).norm(dim=0)  # each pair is a pair
        assert (residual <= 2e-5 * scale).all()

        largest = V[:kept].abs().argmax(1, keepdim=True)
        assert (V[:kept].gather(1, largest) > 0).all()
        torch.testing.assert_close(low.trace[b].double(), F.trace(), rtol=1e-5, atol=0)
        expected_rows = (S[:kept].sqrt()[:, None]) * V[:kept]  # Q^T A = sqrt(S) V
        torch.testing.assert_close(Q[:, :kept].T @ A, expected_rows, atol=float(1e-5 * scale.sqrt()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("K", "D", "rank"),
    [(10, 36, 10), (10, 36, 4), (10, 36, 17), (7, 5, 5), (7, 5, 9), (1, 36, 3), (33, 40, 33), (3, 1, 2)],
)
def test_random_factors_of_all_shapes(K, D, rank, dtype, device):
    assert_is_the_svd(random_factor(3, K, D, dtype=dtype), rank, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_are_decomposed_as_the_numbers_they_are(dtype, device):
    factor = random_factor(2, 6, 36, dtype=dtype)
    assert compress(factor, 6).vectors.dtype == torch.float32
    assert_is_the_svd(factor, 6, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_depend_on_one_another(dtype, device):
    base = random_factor(2, 3, 36, seed=1, dtype=torch.float64)
    mix = random_factor(2, 8, 3, seed=2, dtype=torch.float64)
    factor = (mix @ base).to(dtype)
    assert compress(factor, 8).rank.tolist() == [3, 3]
    assert_is_the_svd(factor, 8, device)
    equal_rows = random_factor(1, 1, 36).expand(1, 5, 36).to(dtype)
    assert compress(equal_rows, 5).rank.tolist() == [1]
    assert_is_the_svd(equal_rows, 5, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "sigma", [[2.0] * 6, [3.0, 1.0, 1.0, 1.0, 0.5, 0.5], [1.0, 1.0 - 1e-7, 1.0 - 2e-7, 0.3, 0.3, 0.3]], ids=str
)
def test_tied_spectra(sigma, dtype, device):
    for rank in (1, 3, 6):
        assert_is_the_svd(with_spectrum(sigma, 6, 36).to(dtype), rank, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra_that_fall_steeply(dtype, device):
    """Through all the range of S that counts as rank: down to K eps S_1."""
    lowest = -8 if dtype == torch.float64 else -4
    sigma = torch.logspace(0, lowest, 12, dtype=torch.float64).tolist()
    for seed in range(3):
        assert_is_the_svd(with_spectrum(sigma, 12, 36, seed).to(dtype), 12, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-20, 1e-9, 1e15])
def test_tiny_and_huge_factors(size, dtype, device):
    assert_is_the_svd(random_factor(2, 6, 36, dtype=dtype) * size, 6, device)


def test_prompts_of_very_different_size_in_one_batch(device):
    factor = random_factor(3, 6, 36) * torch.tensor([1e-12, 1.0, 1e12])[:, None, None]
    assert_is_the_svd(factor, 6, device)


def test_a_factor_of_zeros():
    low = compress(torch.zeros(2, 4, 9), 4)
    assert low.rank.tolist() == [0, 0]
    for x in (low.singular_values, low.vectors, low.left_vectors, low.trace):
        assert (x == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_prompt_that_is_not_finite_leaves_its_neighbours_alone(bad):
    factor = random_factor(3, 4, 9)
    expected = compress(factor, 4)
    factor[1, 2, 5] = bad
    low = compress(factor, 4)
    assert low.rank[1] == 0
    for found, before in zip(low, expected, strict=True):
        assert torch.equal(found[[0, 2]], before[[0, 2]])
        if found.is_floating_point():
            assert found[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_comes_back_when_all_is_kept(dtype):
    factor = random_factor(4, 6, 36, dtype=dtype)
    for rank in (6, 8):
        low = compress(factor, rank)
        again = low.left_vectors @ (low.singular_values.sqrt()[:, :, None] * low.vectors)
        assert relative(again, factor) < (2e-6 if dtype == torch.float32 else 1e-13)


def test_what_a_cut_at_the_rank_leaves_of_unlikely_tokens():
    """The rows of A are sqrt(p_t) g_t: what lies beyond the rank is at most sqrt(K eps S_1) a direction, and a score
    comes back to that over sqrt(p_t): well for likely tokens, and not at all where p_t is below K eps."""
    p_K = torch.tensor([0.6, 0.39, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    G_KD = torch.randn(8, 36, generator=torch.Generator().manual_seed(0))
    low = compress((p_K.sqrt()[:, None] * G_KD)[None], 8)
    again = (low.left_vectors @ (low.singular_values.sqrt()[:, :, None] * low.vectors))[0] / p_K.sqrt()[:, None]
    bound = (8 * 8 * torch.finfo(torch.float32).eps * low.singular_values[0, 0] / p_K).sqrt()
    assert ((again - G_KD).norm(dim=1) <= bound + 1e-5 * G_KD.norm(dim=1)).all()
    for token in range(4):
        assert relative(again[token], G_KD[token]) < 1e-3


def test_a_truncated_trace_is_that_of_all_of_f():
    factor = random_factor(3, 6, 36, dtype=torch.float64)
    torch.testing.assert_close(compress(factor, 2).trace, (factor**2).sum((1, 2)))


def test_the_result_does_not_depend_on_the_batch():
    factor = random_factor(5, 6, 36)
    together = compress(factor, 6)
    for b in range(5):
        alone = compress(factor[b : b + 1], 6)
        for found, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(found[0], expected[b], atol=1e-5, rtol=1e-5)


def test_the_factor_is_left_as_it_was():
    factor = random_factor(2, 6, 36)
    before = factor.clone()
    compress(factor, 3)
    assert torch.equal(factor, before)


@pytest.mark.parametrize(
    ("factor", "rank", "message"),
    [(torch.zeros(3, 4), 2, r"shape \(3, 4\); expected \[B, K, D\]"), (torch.zeros(1, 3, 4), 0, "rank is 0")],
)
def test_what_is_wrong_with_an_argument_is_said(factor, rank, message):
    with pytest.raises(ValueError, match=message):
        compress(factor, rank)


def test_an_empty_batch_gives_an_empty_result():
    assert compress(torch.zeros(0, 4, 9), 3).vectors.shape == (0, 3, 9)


def test_layers_of_one_shape_together_are_the_layers_alone():
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: torch.randn(3, 4, width, generator=generator) for name, width in (("a", 9), ("b", 7), ("c", 9), ("d", 9))
    }
    found = compress_layers(factors, 3)
    assert list(found) == list(factors)
    for name, factor in factors.items():
        for together, alone in zip(found[name], compress(factor, 3), strict=True):
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
