"""`python -m benchmarks.cuda`: its small form computes all that the large one does, and says what it lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_the_small_form_runs_every_part(tmp_path):
    file = tmp_path / "out" / "cuda.json"
    done = run("-m", "benchmarks.cuda", "--device", "cpu", "--small", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in file.parent.iterdir()] == ["cuda.json"]  # nothing temporary is left
    found = json.loads(file.read_text())
    assert found["errors"] == found["left_out"] == []
    assert list(found["part_seconds"]) == ["tests", "claims", "profiles", "small SVD"]
    assert found["machine"]["torch"] == torch.__version__

    assert found["tests"]["finished"] and found["tests"]["failures"] == []
    outcomes = found["tests"]["files"].values()
    assert len(outcomes) == 2 and all(set(outcome) == {"passed"} for outcome in outcomes)

    rows = found["rows"]
    assert {row["positions"] for row in rows} == {"all", "last"}
    assert {row["estimator"] for row in rows} == {"topk", "full"}
    assert {row["dtype"] for row in rows} >= {"torch.float32"}
    for row in rows:
        assert row["ratios"] and row["agreement"]
        assert all(0 < ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in row["ratios"].values())
        assert all(min(seconds) > 0 for seconds in row["seconds"].values())
        assert row["planned_bytes"]["total"] > 0 and row["bytes"]["ours"] >= 0
        if row["estimator"] == "topk":
            assert {"careful / ours", "ours / scores"} <= row["ratios"].keys()
            assert row["agreement"]["prompts"] >= 1
    assert {"plain / ours", "plain scores / scores", "scores / floor"} <= rows[0]["ratios"].keys()

    assert len(found["profiles"]) == 3
    for profile in found["profiles"]:
        assert 0 <= profile["idle_share"] < 1 and 0 < len(profile["top"]) <= 20
        seconds = [kernel["seconds"] for kernel in profile["top"]]
        assert seconds == sorted(seconds, reverse=True)

    assert [sizes["top_k"] for sizes in found["small_svd"]] == [4, 12, 20]
    for sizes in found["small_svd"]:
        assert sizes["seconds"].keys() == sizes["errors"].keys() and len(sizes["errors"]) == 4
        assert max(sizes["errors"]["compress"].values()) < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("arguments", [["--small"], ["--device", "cpu"]])
def test_what_cannot_run_is_said_in_one_line(arguments):
    done = run("-m", "benchmarks.cuda", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("--device is")]
    assert "expected" in line and "--small" in line


def test_it_needs_neither_datasets_nor_pydantic():
    done = run(
        "-c",
        "import sys\n"
        "sys.modules['datasets'] = sys.modules['pydantic'] = None\n"
        "import benchmarks.cuda.__main__\n"
        "from fisher_vmap import FisherModel, fisher_full\n",
    )
    assert done.returncode == 0, done.stderr


def test_a_part_that_fails_and_one_without_time_end_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.cuda.session import Session

    file = tmp_path / "cuda.json"
    session = Session(torch.device("cpu"), True, 60, file)

    def fails(session: Session) -> None:
        session.add("rows", {"name": "first"}, "first: measured")
        session.attempt("second", lambda: 1 / 0)
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def late(session: Session) -> None:
        if session.left() <= 0:
            session.leave_out("third")

    session.run("one", 0.5, fails)
    session.run("two", 0.0, late)
    found = json.loads(file.read_text())
    assert found["rows"] == [{"name": "first"}]
    assert found["errors"] == [
        {"part": "one", "what": "second", "error": "ZeroDivisionError: division by zero"},
        {
            "part": "one",
            "what": "the whole part",
            "error": "out of memory: CUDA out of memory. Tried to allocate 2 GiB",
        },
    ]
    assert found["left_out"] == [{"part": "two", "what": "third"}]
    assert "second: FAILED, ZeroDivisionError" in capsys.readouterr().out
