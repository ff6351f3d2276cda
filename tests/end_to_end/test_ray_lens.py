"""A fit of the Jacobian lens on Ray leaves what one process does."""

import importlib
import json

import pytest
import torch
from command_cases import environment, real_command, save_model
from models import tiny

from fisher_vmap.lens.jacobian_lens import JacobianLens

pytestmark = pytest.mark.needs("ray")
ray_nodes = importlib.import_module("ray_nodes")


def test_two_workers_leave_what_one_process_does(tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    folder = save_model(tmp_path / "model", tiny("gpt2", torch.float32, vocab_size=263))
    texts = [f"text number {i}, and so on, and so on" for i in range(7)]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = f"--model_path {folder} --dataset_name {data} --num_prompts all --dtype float32 --device cpu --skip_first 4"
    words = [*words.split(), "--max_length", "24", "--shard_size", "2", "--output_dir"]
    one = real_command([*words, tmp_path / "one"], "fisher_vmap.lens")
    assert one.returncode == 0, one.stderr
    with ray_nodes.ray_folder(monkeypatch):
        ray = real_command([*words, tmp_path / "ray", "--engine", "ray", "--ray_workers", "2"], "fisher_vmap.lens")
    assert ray.returncode == 0, ray.stderr
    one, ray = (JacobianLens.load(tmp_path / name) for name in ("one", "ray"))
    assert one.n_prompts == ray.n_prompts == 7 and torch.equal(one.metric, ray.metric)
    assert all(torch.equal(one.of(layer), ray.of(layer)) for layer in one.layers)
