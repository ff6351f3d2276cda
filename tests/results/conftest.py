import pytest


@pytest.fixture(scope="module", autouse=True)
def power_stays_on(no_power_cuts):
    """Of all tests of this folder."""
