"""The benchmarks' shapes of today's models, each small: they are built whole, and the package agrees with the loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import sweep, todays_shapes
from benchmarks.agreement import assert_float32_agreement, assert_same_log_probs
from benchmarks.baselines import bare_forward, careful_loop, padded_left
from benchmarks.package_job import package_loop
from benchmarks.todays_shapes import SHAPES, todays_shape, unequal
from benchmarks.workloads import last_of, middle

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=SHAPES)
def workload(request):
    return todays_shape(request.param, device="cpu", precision="float32", small=True)


def test_a_model_has_the_buffers_and_norms_that_its_class_makes(workload):
    """What is random is its matrices alone."""
    config = workload.model.config
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    buffers = dict(made.named_buffers())
    assert buffers.keys() == dict(workload.model.named_buffers()).keys()
    for name, buffer in workload.model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-2, atol=1e-2)  # some are rounded to bfloat16
    for name, parameter in workload.model.named_parameters():
        if parameter.dim() < 2:
            assert torch.equal(parameter, made.get_parameter(name)), name
        else:
            assert parameter.std().item() == pytest.approx(config.initializer_range, rel=0.1), name


@pytest.mark.parametrize("positions", ["all", "last"])
def test_the_package_agrees_with_the_loop_and_the_bare_forward(workload, positions):
    batch, layer = unequal(workload, 4, 5, 21), workload.layer(middle(workload.blocks))
    where = last_of(batch) if positions == "last" else None
    found = package_loop(workload.model, batch, layer, 5, positions=positions)
    assert_float32_agreement(found, careful_loop(workload.model, *batch, layer, 5, where=where))
    logits = bare_forward(workload.model, *padded_left(*batch))
    assert_same_log_probs(logits, found)
    with pytest.raises(AssertionError, match="log p differs"):
        assert_same_log_probs(logits.roll(1, 0), found)  # another prompt's


def test_the_published_sizes_stand_and_the_prompts_are_unequal(workload):
    batch = unequal(workload)
    assert (min(batch.lengths), max(batch.lengths), len(set(batch.lengths))) == (44, 76, 8)
    for shape in SHAPES.values():
        config = getattr(transformers, shape.kind)(**shape.arguments)
        assert {name: getattr(config, name) for name in shape.arguments if name != "rope_parameters"} == {
            name: value for name, value in shape.arguments.items() if name != "rope_parameters"
        }


def test_a_sweep_times_the_ways_that_are_asked_for(workload):
    cell = sweep.Cell("centre", prompts=2, tokens=6, top_k=3, layer=1)
    costs = sweep.Costs(workload.blocks)
    record = sweep.measure(workload, cell, costs, ["package", "careful"], rounds=1, most=60, left=600)
    assert record["seconds"].keys() == {"package", "careful"} and not record["skipped"]
    assert record["distance"] < 1e-3


def test_all_blocks_are_those_of_the_published_model(monkeypatch, capsys):
    monkeypatch.setattr(todays_shapes, "random_workload", lambda title, config, *_: (title, config.num_hidden_layers))
    assert todays_shape("qwen3-0.6b", all_blocks=True) == ("Qwen3-0.6B, 28 blocks", 28)
    assert todays_shape("qwen3-0.6b")[1] == 4
    monkeypatch.setattr(sys, "argv", ["sweep", "--model", "smollm2", "--all-blocks"])
    with pytest.raises(SystemExit, match="2"):
        sweep.main()
    assert "smollm2 has all of its blocks" in capsys.readouterr().err


def test_the_command_writes_its_rows(tmp_path):
    file = tmp_path / "out" / "todays.json"
    options = ["--small", "--shapes", "gemma3-270m", "--rounds", "1", "--precision", "float32", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.todays", "--device", "cpu", *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__
    (shape,) = found["shapes"].values()
    assert list(shape["rows"]) == ["early", "middle", "late", "positions"]
    assert [len(row["ratios"]) for row in shape["rows"].values()] == [2, 2, 2, 4]
    assert sum("bare forward" in line for line in done.stdout.splitlines()) == 3
    for row in list(shape["rows"].values())[:3]:
        assert row["loops"]["agreement"]["ours"] < 1e-3 and row["floor"]["flops"] > 0
    assert set(shape["rows"]["positions"]["agreement"]) == {"all", "last", "block 2", "block 3"}
