"""The elementwise work of the pullbacks, against their formulas by `einsum`."""

import pytest
import torch
from oracles import relative

from fisher_vmap.kernels.autograd import Scratch, norm_pullback, softmax_pullback
from fisher_vmap.kernels.modules import NormRows


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_is_pulled_back_by_its_formula(centred, K=3, N=7, D=20):
    generator = torch.Generator().manual_seed(0)
    g, total = (torch.randn(N, K, D, generator=generator, dtype=torch.float64) for _ in range(2))
    scale, along, back, r = (torch.randn(N, 1, D, generator=generator, dtype=torch.float64) for _ in range(4))
    mean, r = torch.randn(D, generator=generator, dtype=torch.float64), r[..., :1]
    expected = g * scale - back * torch.einsum("nkd,nd->nk", g, along[:, 0])[..., None]
    if centred:
        expected = expected - r * torch.einsum("nkd,d->nk", g, mean)[..., None]
    shared = NormRows(scale, along, back, mean if centred else None, r)
    scratch = Scratch()
    assert relative(norm_pullback(g, *shared, scratch, "dx"), expected) < 1e-14
    added = total.clone()
    shared.add_pull(added, g, scratch)
    assert relative(added, total + expected) < 1e-14


def test_a_softmax_is_pulled_back_by_its_jacobian():
    generator = torch.Generator().manual_seed(1)
    dP = torch.randn(2, 3, 6, 4, 11, generator=generator, dtype=torch.float64)
    P = torch.rand(2, 3, 6, 1, 11, generator=generator, dtype=torch.float64).softmax(-1)
    jacobian = torch.diag_embed(P) - P[..., :, None] * P[..., None, :]
    expected = torch.einsum("bhtkij,bhtkj->bhtki", jacobian.expand(-1, -1, -1, 4, -1, -1), dP)
    assert relative(softmax_pullback(dP.clone(), P), expected) < 1e-14
