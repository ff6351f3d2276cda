"""Fixtures of the tests of weights and where they come from."""

import pytest
from source_cases import base, save


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), base())
