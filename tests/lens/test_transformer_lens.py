"""A lens goes to transformer-lens 4.3 and comes back: both write and read the same file.

It needs transformer-lens, in an environment of its own: see benchmarks/peers/jacobian_lens.py.
"""

import pytest
import torch

from fisher_vmap.lens.jacobian_lens import JacobianLens

analysis = pytest.importorskip("transformer_lens.tools.analysis", reason="needs transformer-lens")

METADATA = {"model": "owner/name", "skip_first": 16, "max_length": 128, "corpus": None, "layers": ["a", "b"]}


@pytest.fixture
def jacobians():
    generator = torch.Generator().manual_seed(0)
    return {layer: torch.randn(6, 6, generator=generator) for layer in (0, 3, 11)}


def same(ours, theirs):
    assert ours.layers == theirs.source_layers == [0, 3, 11]
    assert ours.d_model == theirs.d_model == 6
    assert ours.n_prompts == theirs.n_prompts == 7
    assert ours.metadata == theirs.metadata
    for layer in ours.layers:
        assert ours.of(layer).dtype == theirs.jacobians[layer].dtype == torch.float32
        assert torch.equal(ours.of(layer), theirs.jacobians[layer])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ours_loads_in_theirs(jacobians, tmp_path, dtype):
    lens = JacobianLens(jacobians, 7, metadata=METADATA)
    lens.save(tmp_path / "lens.pt", dtype=dtype)
    theirs = analysis.JacobianLens.load(str(tmp_path / "lens.pt"))
    same(JacobianLens.load(tmp_path / "lens.pt"), theirs)
    assert theirs.metadata == METADATA
    for layer, J in jacobians.items():
        assert torch.equal(theirs.jacobians[layer], J.to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("metadata", [METADATA, None])
def test_theirs_loads_in_ours(jacobians, tmp_path, dtype, metadata):
    theirs = analysis.JacobianLens(jacobians, n_prompts=7, d_model=6, metadata=metadata)
    theirs.save(str(tmp_path / "lens.pt"), dtype=dtype)
    ours = JacobianLens.load(tmp_path / "lens.pt")
    same(ours, analysis.JacobianLens.load(str(tmp_path / "lens.pt")))
    assert ours.metadata == (metadata or {}) and ours.metric is None and ours.standard_errors == {}


def test_what_was_saved_by_ours_is_saved_by_theirs_to_the_same_lens(jacobians, tmp_path):
    JacobianLens(jacobians, 7, metadata=METADATA).save(tmp_path / "a.pt", dtype=torch.float32)
    analysis.JacobianLens.load(str(tmp_path / "a.pt")).save(str(tmp_path / "b.pt"), dtype=torch.float32)
    back = JacobianLens.load(tmp_path / "b.pt")
    assert (back.n_prompts, back.metadata) == (7, METADATA)
    assert all(torch.equal(back.of(layer), J) for layer, J in jacobians.items())
