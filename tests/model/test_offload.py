"""A model on two devices, as `device_map` spreads it: in every form, wherever the blocks, the norm and the head stand.

There is no second device here, so one is made up (`away.py`): tensors on it refuse to meet others, as on a GPU. It
cannot be taken back, which is why this runs in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("accelerate")
HERE = Path(__file__).parent


def run(families):
    done = subprocess.run(
        [sys.executable, HERE / "two_devices.py", families], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, [*HERE.parents[:2], HERE]))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_every_form_on_two_devices():
    lines = run("llama")
    assert len(lines) == 4 + 4  # wherever things stand, and in one of these cases in every form
    # The hooks of accelerate stand aside: blocks that are there keep their fused pullbacks.
    assert sum("packed fused 16" in line for line in lines) == 4 + 1


@pytest.mark.slow
def test_other_families_on_two_devices():
    assert len(run("gpt2,gemma2,opt,cohere")) == 4 * 8
