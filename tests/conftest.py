"""What tests of several folders share. Nothing heavy is imported before a fixture is used."""

import io
import logging
import os
from importlib.util import find_spec

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for one another


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests marked on_device put models and tensors: pytest -m on_device --device cuda",
    )


def pytest_configure(config):
    device = config.getoption("--device")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device is {device}, which torch cannot use ({reason}); try cpu or cuda") from error


@pytest.fixture(scope="session")
def device(request):
    """Where a test puts its model and what goes in; what it is compared with, in float64, stays on the CPU."""
    return torch.device(request.config.getoption("--device"))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items):
    """What takes `device` is marked `on_device`. What needs packages of the optional extras is marked `extra`, and
    skipped where one is not installed."""
    for item in items:
        if "device" in item.fixturenames:
            item.add_marker(pytest.mark.on_device)
        packages = [package for mark in item.iter_markers("needs") for package in mark.args]
        missing = [package for package in packages if find_spec(package) is None]
        if packages:
            item.add_marker(pytest.mark.extra)
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"{', '.join(missing)} not installed"))


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word."""
    from models import word_tokenizer

    return word_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder: a tiny llama with a tokenizer and a chat template."""
    from command_cases import save_model

    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def no_power_cuts():
    """Flushing to the disk matters only to a power cut, and most of these tests' time would go there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def clock():
    from progress_cases import Clock

    return Clock()


@pytest.fixture
def shown(monkeypatch, caplog, clock):
    """Makes a display on a stream of memory the one that commands use."""
    from fisher_vmap import progress

    caplog.set_level(logging.INFO, "fisher_vmap")

    def make(*, terminal, stream=None):
        display = progress.Display(stream or io.StringIO(), terminal=terminal, clock=clock, ticking=False)
        monkeypatch.setattr(progress, "_display", display)
        return display

    return make
