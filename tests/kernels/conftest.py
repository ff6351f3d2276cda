"""Fixtures of the kernels' tests."""

import pytest

from fisher_vmap.kernels import attention as attention_module


@pytest.fixture(params=[1, 2**9, 2**20], ids=["blocks of 16", "blocks of few", "one block"])
def block_elements(request, monkeypatch, device):
    """Queries in one block: 16 (the least), some, all of them."""
    monkeypatch.setitem(attention_module.BLOCK_ELEMENTS, device.type, request.param)
