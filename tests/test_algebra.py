"""The algebra of low-rank matrices against dense ones in float64."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fisher_vmap import algebra
from fisher_vmap.decomposition import compress

D, R = 13, 4


def low_rank(seed, n=None, rank=R, width=D, zeros=0):
    """Orthonormal V by QR of noise, S falling; the last `zeros` directions are zero."""
    rng = np.random.default_rng(seed)
    shape = () if n is None else (n,)
    V = np.swapaxes(np.linalg.qr(rng.normal(size=(*shape, width, rank)))[0], -1, -2)
    S = np.sort(rng.random((*shape, rank)) + 0.1, axis=-1)[..., ::-1].copy()
    if zeros:
        S[..., -zeros:], V[..., -zeros:, :] = 0, 0
    return S, V


def dense(pair):
    S, V = pair
    return np.einsum("...rd,...r,...re->...de", V, S, V)


def test_products_are_those_of_the_dense_matrix():
    pair, rng = low_rank(0, zeros=1), np.random.default_rng(1)
    F, x, X = dense(pair), rng.normal(size=D), rng.normal(size=(D, 3))
    np.testing.assert_allclose(algebra.matvec(pair, x), F @ x, rtol=1e-12)
    np.testing.assert_allclose(algebra.matvec(pair, X), F @ X, rtol=1e-12)
    assert math.isclose(algebra.quadratic(pair, x), x @ F @ x, rel_tol=1e-12)
    np.testing.assert_allclose(algebra.quadratic(pair, X), np.diag(X.T @ F @ X), rtol=1e-12)
    assert math.isclose(algebra.trace(pair), np.trace(F), rel_tol=1e-12)
    assert math.isclose(algebra.norm(pair), np.linalg.norm(F), rel_tol=1e-12)
    np.testing.assert_allclose(algebra.Spectrum(*pair).matvec(x), F @ x, rtol=1e-12)


def test_many_at_once_are_one_by_one():
    many, rng = low_rank(2, n=5), np.random.default_rng(3)
    F, x, X = dense(many), rng.normal(size=D), rng.normal(size=(D, 3))
    np.testing.assert_allclose(algebra.quadratic(many, x), [x @ f @ x for f in F], rtol=1e-12)
    np.testing.assert_allclose(algebra.quadratic(many, X), [np.diag(X.T @ f @ X) for f in F], rtol=1e-12)
    np.testing.assert_allclose(algebra.trace(many), [np.trace(f) for f in F], rtol=1e-12)
    np.testing.assert_allclose(algebra.norm(many), [np.linalg.norm(f) for f in F], rtol=1e-12)


def test_inner_products_and_cosines():
    one, other = low_rank(4), low_rank(5, rank=3)
    F, G = dense(one), dense(other)
    assert math.isclose(algebra.inner(one, other), np.trace(F @ G), rel_tol=1e-12)
    expected = np.trace(F @ G) / np.linalg.norm(F) / np.linalg.norm(G)
    assert math.isclose(algebra.cosine(one, other), expected, rel_tol=1e-12)
    assert math.isclose(algebra.cosine(one, (7 * one[0], one[1])), 1, rel_tol=1e-12)
    assert math.isnan(algebra.cosine(one, (0 * one[0], one[1])))


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_all_pairs(block, monkeypatch):
    monkeypatch.setattr(algebra, "_BLOCK_ROWS", block)
    many, others = low_rank(6, n=9), low_rank(7, n=5, rank=2)
    F, G = dense(many), dense(others)
    np.testing.assert_allclose(algebra.inner_products(many, others), np.einsum("ide,jed->ij", F, G), rtol=1e-11)
    found = algebra.cosines(many)
    np.testing.assert_allclose(found, found.T, rtol=1e-12)
    np.testing.assert_allclose(np.diag(found), 1, rtol=1e-12)
    assert math.isclose(found[2, 7], algebra.cosine((many[0][2], many[1][2]), (many[0][7], many[1][7])), rel_tol=1e-11)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_an_angle_that_is_known(angle):
    basis = np.linalg.qr(np.random.default_rng(8).normal(size=(D, 3)))[0].T
    turned = np.stack([basis[0], math.cos(angle) * basis[1] + math.sin(angle) * basis[2]])
    found = algebra.principal_angles((np.ones(2), basis[:2]), (np.ones(2), turned))
    np.testing.assert_allclose(found, [0, angle], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_angles_and_overlap_of_random_subspaces(rank):
    one, other = low_rank(9, zeros=1), low_rank(10)
    k = rank or R - 1
    expected = np.sort(scipy.linalg.subspace_angles(one[1][:k].T, other[1][:k].T))
    np.testing.assert_allclose(algebra.principal_angles(one, other, rank), expected, rtol=1e-9)
    assert math.isclose(algebra.overlap(one, other, rank), float((np.cos(expected) ** 2).mean()), rel_tol=1e-12)
    assert math.isclose(algebra.overlap(one, one, rank), 1, rel_tol=1e-12)


def test_random_subspaces_overlap_by_rank_over_width():
    pairs = [(low_rank(2 * i, width=30), low_rank(2 * i + 1, width=30)) for i in range(300)]
    assert math.isclose(np.mean([algebra.overlap(*pair) for pair in pairs]), R / 30, rel_tol=0.05)


def test_projection():
    pair, x = low_rank(11, zeros=1), np.random.default_rng(12).normal(size=(D, 2))
    P = pair[1][:3].T @ pair[1][:3]
    np.testing.assert_allclose(algebra.project(pair, x), P @ x, rtol=1e-12)
    np.testing.assert_allclose(
        algebra.project(pair, x[:, 0], 1), np.outer(pair[1][0], pair[1][0]) @ x[:, 0], rtol=1e-12
    )


def test_eigenvectors_of_a_mean():
    M = dense(low_rank(13, n=6)).mean(0)
    S, V = algebra.eigenvectors(M, 5)
    np.testing.assert_allclose(S, np.linalg.eigvalsh(M)[::-1][:5], rtol=1e-10)
    np.testing.assert_allclose(M @ V.T, V.T * S, atol=1e-12)
    np.testing.assert_allclose(V @ V.T, np.eye(5), atol=1e-12)
    assert (np.take_along_axis(V, np.abs(V).argmax(1)[:, None], 1) > 0).all()


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_contrast_solves_the_generalised_problem(ridge):
    A, B = (dense(low_rank(seed, n=6)).mean(0) for seed in (14, 15))
    found = algebra.contrast(A, B, rank=4, ridge=ridge)
    r = ridge * np.trace(B) / D
    assert math.isclose(found.ridge, r, rel_tol=1e-12)
    expected = scipy.linalg.eigh(A, B + r * np.eye(D), eigvals_only=True)[::-1][:4]
    np.testing.assert_allclose(found.ratios, expected, rtol=1e-8)
    for ratio, v, inside, outside in zip(*found[:4], strict=True):
        np.testing.assert_allclose(A @ v, ratio * (B @ v + r * v), atol=1e-10)
        assert math.isclose(np.linalg.norm(v), 1, rel_tol=1e-12)
        assert math.isclose(inside, v @ A @ v, rel_tol=1e-10) and math.isclose(outside, v @ B @ v, rel_tol=1e-10)
        assert math.isclose(ratio, inside / (outside + r), rel_tol=1e-8)


def test_contrast_finds_what_one_group_has_alone():
    S, V = low_rank(16, n=8)
    alone = np.linalg.svd(V.reshape(-1, D)[:8])[2][-1]  # orthogonal to the first two prompts
    B = dense((S[:2], V[:2])).mean(0)
    A = B + 0.05 * np.outer(alone, alone)
    found = algebra.contrast(A, B, rank=1)
    assert abs(found.directions[0] @ alone) > 0.999 and found.outside[0] < 1e-4 < found.inside[0]


def factors_of(seed, width=D):
    return algebra.mean_factors([low_rank(seed, n=1, width=width)], width)


def pieces_of(pair, size):
    return [(pair[0][i : i + size], pair[1][i : i + size]) for i in range(0, len(pair[0]), size)]


@pytest.mark.parametrize(("n", "size", "most"), [(1, 1, None), (3, 2, None), (9, 4, 20), (9, 9, 18)])
def test_a_mean_by_its_factors(n, size, most):
    many = low_rank(21, n=n, zeros=1)
    mean = dense(many).mean(0)
    found = algebra.mean_factors(iter(pieces_of(many, size)), D, most)
    assert found.prompts == n and math.isclose(found.trace, np.trace(mean), rel_tol=1e-10)
    assert math.isclose(found.share, 1, rel_tol=1e-9)
    rank = np.linalg.matrix_rank(mean)
    S, V = algebra.eigenvectors(mean, rank)
    np.testing.assert_allclose(found.S, S, rtol=1e-8)
    np.testing.assert_allclose(found.V, V, atol=1e-6)
    np.testing.assert_allclose(dense((found.S, found.V)), mean, atol=1e-10)
    x = np.random.default_rng(0).normal(size=D)
    assert math.isclose(algebra.quadratic(found, x), x @ mean @ x, rel_tol=1e-9)


def test_a_mean_that_is_cut_says_how_much():
    """60 matrices in an own plane each, but for one direction that all share; 40 rows of 240 are kept."""
    rng, width = np.random.default_rng(0), 300
    shared = np.linalg.qr(rng.normal(size=(width, 1)))[0][:, 0]
    V = np.stack([np.linalg.qr(np.c_[shared, rng.normal(size=(width, 3))])[0].T for _ in range(60)])
    S = np.tile([1.0, 0.02, 0.02, 0.02], (60, 1))
    mean = dense((S, V)).mean(0)
    found = algebra.mean_factors([(S, V)], width, most=20)
    assert len(found.S) <= 40 and math.isclose(found.trace, 1.06, rel_tol=1e-9)
    exact = np.linalg.eigvalsh(mean)[::-1]
    assert found.share < 0.99
    lost = found.trace - found.S.sum()
    assert (exact[: len(found.S)] + 1e-12 >= found.S).all() and (exact[: len(found.S)] - lost - 1e-12 <= found.S).all()
    assert math.isclose(found.S[0], exact[0], rel_tol=1e-3) and abs(found.V[0] @ shared) > 0.9999


def test_a_mean_of_nothing_and_what_is_none():
    empty = algebra.mean_factors([], D)
    assert empty.S.shape == (0,) and empty.V.shape == (0, D) and math.isnan(empty.trace) and empty.prompts == 0
    zero = algebra.mean_factors([(np.zeros((2, R)), np.zeros((2, R, D)))], D)
    assert zero.prompts == 2 and zero.trace == 0 and len(zero.S) == 0
    for bad in ((np.ones((1, R)), np.full((1, R, D), np.nan)), low_rank(0, n=2, width=D + 1)):
        with pytest.raises(ValueError, match="not finite, or not of width 13"):
            algebra.mean_factors([bad], D)


@pytest.mark.parametrize("width", [D, 600])
def test_the_least_ridge_is_not_lost_in_rounding(width):
    """Of rotated diagonal matrices, whose ratios are known: B reacts to half of the directions, A to all."""
    turned = np.linalg.qr(np.random.default_rng(3).normal(size=(width, width)))[0]
    a, b = np.linspace(1, 2, width), np.where(np.arange(width) < width // 2, 3.0, 0.0)
    r = algebra.RIDGES[0] * b.sum() / width
    expected = np.sort(a / (b + r))[::-1][:4]
    means = [algebra.MeanFactors(x[x > 0], turned[x > 0], float(x.sum()), 1) for x in (a, b)]
    for found in (algebra.contrast(*((turned.T * x) @ turned for x in (a, b)), 4, algebra.RIDGES[0]),
                  algebra.contrast(*means, 4, algebra.RIDGES[0])):  # fmt: skip
        np.testing.assert_allclose(found.ratios, expected, rtol=1e-6)
        assert (found.outside < 1e-12).all()


@pytest.mark.parametrize(("n", "m", "ridge"), [(2, 2, 0.01), (3, 6, 0.1), (6, 1, 1.0)])
def test_a_contrast_of_factors_is_that_of_the_dense_means(n, m, ridge):
    groups = low_rank(22, n=n), low_rank(23, n=m)
    plain = algebra.contrast(*(dense(group).mean(0) for group in groups), rank=4, ridge=ridge)
    found = algebra.contrast(*(algebra.mean_factors([group], D) for group in groups), rank=4, ridge=ridge)
    for one, other in zip(plain, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


def test_a_batch_of_factors_and_a_record_will_do():
    A = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    batch = compress(A, 5)
    F = (A.mT @ A).double().numpy()
    np.testing.assert_allclose(algebra.trace(batch), np.trace(F, axis1=1, axis2=2), rtol=1e-5)
    one = algebra.Spectrum(batch.singular_values[0], batch.vectors[0])
    np.testing.assert_allclose(algebra.matvec(one, np.ones(D)), F[0] @ np.ones(D), rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: algebra.matvec(3, np.ones(D)), "int is not a low-rank matrix; expected a record"),
        (lambda: algebra.trace((np.ones(3), np.ones((4, D)))), r"S has shape \(3,\) and V \(4, 13\)"),
        (lambda: algebra.overlap(low_rank(0), low_rank(1), 5), "rank is 5; expected 1 to 4"),
        (lambda: algebra.eigenvectors(np.eye(3), 4), "rank is 4; expected 1 to 3"),
        (lambda: algebra.eigenvectors(np.full((3, 3), np.nan), 1), "a mean over no prompts is NaN"),
        (lambda: algebra.eigenvectors(np.ones((3, 2)), 1), r"expected \[D, D\]"),
        (lambda: algebra.contrast(np.eye(3), np.eye(4)), "expected equal ones"),
        (lambda: algebra.contrast(np.eye(3), np.eye(3), ridge=0.0, rank=1), "ridge 0.0; expected"),
        (lambda: algebra.contrast(np.eye(3), np.eye(3), ridge=1e-7, rank=1), "ridge 1e-07; expected .* 1e-06 to 1e.06"),
        (lambda: algebra.contrast(np.eye(3), np.eye(3), ridge=1e308, rank=1), "ridge 1e.308; expected"),
        (lambda: algebra.contrast(np.eye(3), np.zeros((3, 3)), rank=1), "nothing to contrast with"),
        (lambda: algebra.contrast(factors_of(0), factors_of(1), rank=5), "rank is 5 and ridge 0.01; expected 1 to 4"),
        (lambda: algebra.contrast(factors_of(0), factors_of(1, D + 1)), "have the widths 13 and 14"),
        (lambda: algebra.contrast(factors_of(0), algebra.mean_factors([], D), rank=1), "nothing to contrast with"),
    ],
)
def test_what_cannot_be_computed_is_said_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
