"""The peers that the benchmarks compare with compute the same matrices, on a model small enough for all of them."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.peers.about import PEERS
from benchmarks.peers.jobs import Job, distance, whole_job

PACKAGES = {"curvlinops": "curvlinops", "nngeometry": "nngeometry"}
OTHERS = [name for name in PEERS if name != "ours"]
CASES = [(kind, name) for kind in ("whole", "top-k") for name in OTHERS] + [("leading", "curvlinops")]


def needs(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.needs(PACKAGES[name])] if name in PACKAGES else []


@pytest.fixture(scope="module")
def job() -> Job:
    return whole_job(vocabulary=64, width=32, blocks=3, prompts=3)


@pytest.mark.parametrize(("kind", "name"), [pytest.param(*case, marks=needs(case[1])) for case in CASES])
def test_a_peer_computes_the_same_matrices(job, kind, name):
    row = {"ours": "ours, converged"} if kind == "leading" else {"ours": "ours"}
    asked = job._replace(name=kind, rows={row["ours"]: "ours", name: name})
    assert distance(asked.call(name)(), asked.call(row["ours"])()) <= 1e-4


def test_the_distance_tells_a_neighbouring_prompts_matrix(job):
    F_BDD = job.call("ours")()
    assert distance(F_BDD.roll(1, 0), F_BDD) > 0.1
    S_BD, V_BDD = torch.linalg.eigh(F_BDD)
    assert distance((S_BD, V_BDD.mT), F_BDD) < 1e-5


@pytest.mark.parametrize("name", list(PEERS))
def test_the_lines_of_a_user_are_counted_between_the_markers(name):
    text = (Path(__file__).parents[2] / "benchmarks" / "peers" / f"{PEERS[name].module}.py").read_text()
    code = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for kind in ("top-k", "whole"):
        assert 3 <= PEERS[name].lines(kind) < len(code)
