"""Many prompts need the memory of few: the whole pipeline, its computation replaced by numbers out of a hat."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_cases import arguments, environment

from fisher_vmap import open_results

pytest.importorskip("resource", reason="needs the operating system's account of memory")

RUN = """
import resource, sys
import numpy as np
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.data.batching import PromptNumbers
from fisher_vmap.run.__main__ import main
from fisher_vmap.results.record import LayerResult

K, R, D = 6, 4, 36
rng = np.random.default_rng(0)
V = np.linalg.qr(rng.normal(size=(D, R)))[0].T
Q = np.linalg.qr(rng.normal(size=(K, R)))[0]

def numbers(self, prompts_ids, rank):
    found = []
    for ids in prompts_ids:
        S = np.sort(rng.random(R))[::-1]
        layer = LayerResult(S, V, Q, rng.random(), rng.random(len(ids)), S.sum())
        found.append(PromptNumbers(rng.permutation(263)[:K], np.log(np.full(K, 0.1)), {"model.layers.1": layer}, None))
    return found

FisherModel.numbers = numbers
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


def peak(model, folder: Path, count: int) -> int:
    """Peak resident memory of a run over `count` prompts, in the units of the system.

    Without the npz, which `auto` leaves out of runs this large: a zip file's table of contents is a kilobyte a prompt.
    """
    data = folder / f"{count}.jsonl"
    with data.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"prompt": f"Prompt {i} " + "x" * (i % 50)}) + "\n")
    argv = arguments(model, data, folder / str(count), shard_size=32, export_npz="false", batch_size=64)
    done = subprocess.run(
        [sys.executable, "-c", RUN, *argv], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(open_results(folder / str(count))) == count
    return int(done.stdout)


@pytest.mark.parametrize("few", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ten_times_the_prompts_in_the_same_memory(model, tmp_path, few):
    small, large = peak(model, tmp_path, few), peak(model, tmp_path, 10 * few)
    print(f"{few} prompts: {small}; {10 * few}: {large}")
    assert large < 1.15 * small
