"""The memory that --plan foretells for a batch, beside what a batch takes in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command_cases import VOCABULARY, save_model
from models import draw

from fisher_vmap.data.batching import model_widths, most_tokens
from fisher_vmap.kernels import attention, autograd, decoder_block
from fisher_vmap.linearize import block
from fisher_vmap.linearize.blockwise import pull_memory
from fisher_vmap.model import layout
from fisher_vmap.run.plan_model import batch_memory, skeleton_of
from fisher_vmap.run.settings import Settings

ROOT = Path(__file__).parents[2]
KEPT = 2**27  # bytes of forward results, where the CPU is given a GPU's constants
MEASURE = """
import gc, json, sys
import torch, transformers
from benchmarks.peak_memory import added_at_peak
from fisher_vmap import FisherModel
from fisher_vmap.kernels import attention, autograd, decoder_block
from fisher_vmap.linearize import block
from fisher_vmap.model import layout

folder, kept, job = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
if job.get("like_gpu"):
    block.ROWS_AT_A_TIME.pop("cpu"), autograd.ELEMENTS_IN_CACHE.pop("cpu"), layout.ALONE_FROM.pop("cpu")
    attention.BLOCK_ELEMENTS["cpu"], decoder_block.KEPT_BYTES["cpu"] = attention.BLOCK_ELEMENTS["cuda"], kept
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job.get("dtype", "float32")))
opened = FisherModel(model, layers=job["layers"], top_k=job["K"], audit="off", precision="model")
for lengths in ([4, 2], [30, 30], job["lengths"]):
    batch = [[(7 * i + b) % 90 + 1 for i in range(n)] for b, n in enumerate(lengths)]
    gc.collect()
    added = added_at_peak(lambda: opened.numbers(batch, 10), torch.device("cpu"))
assert opened.forms[opened.layers[0]]["form"] == "packed"
print(added)
"""
# The C library maps each tensor for itself and unmaps it when it is freed: the process holds what its tensors take.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
JOBS = {
    "short prompts": {"K": 10, "layers": 0, "lengths": [32] * 64},
    "one long prompt": {"K": 10, "layers": 0, "lengths": [2048]},
    "many cotangents": {"K": 100, "layers": 0, "lengths": [128] * 8},
    "a late layer": {"K": 20, "layers": 5, "lengths": [256] * 8},
    "the last block alone": {"K": 20, "layers": 6, "lengths": [256] * 8},
    "two layers": {"K": 10, "layers": [1, 4], "lengths": [64] * 32},
    "short as on a GPU": {"K": 10, "layers": 0, "lengths": [32] * 64, "like_gpu": True},
    "long as on a GPU": {"K": 10, "layers": 0, "lengths": [1024], "like_gpu": True},
    "bfloat16": {"K": 10, "layers": 0, "lengths": [64] * 16, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama large enough for a batch to show in a process's memory."""
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return save_model(tmp_path_factory.mktemp("model"), draw(model, 0))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be measured on Linux alone")
@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_batch_takes_what_is_foretold(folder, name, monkeypatch):
    job = JOBS[name]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(KEPT), json.dumps(job)],
        capture_output=True, text=True, timeout=300, check=False, cwd=ROOT, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if job.get("like_gpu"):
        monkeypatch.delitem(block.ROWS_AT_A_TIME, "cpu")
        monkeypatch.delitem(autograd.ELEMENTS_IN_CACHE, "cpu")
        monkeypatch.delitem(layout.ALONE_FROM, "cpu")
        monkeypatch.setitem(attention.BLOCK_ELEMENTS, "cpu", attention.BLOCK_ELEMENTS["cuda"])
        monkeypatch.setitem(decoder_block.KEPT_BYTES, "cpu", KEPT)
    layers, dtype = job["layers"], job.get("dtype", "float32")
    hooked = ",".join(map(str, layers)) if isinstance(layers, list) else layers
    settings = Settings(model_path=str(folder), dataset_name="none", hook_layer_name=hooked, dtype=dtype)
    itemsize = getattr(torch, dtype).itemsize
    told = batch_memory(skeleton_of(settings), job["lengths"], job["K"], itemsize, torch.device("cpu"))
    print(f"{name}: measured {int(done.stdout) / 2**20:.0f} MiB, foretold {told.total / 2**20:.0f} MiB")
    assert 0.8 < told.total / int(done.stdout) < 1.25, (told, int(done.stdout))


def test_the_most_tokens_are_those_that_fit():
    model = draw(transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    )), 0)  # fmt: skip
    widths, device, limit = model_widths(model, {"model.layers.1": 64}), torch.device("cuda"), 2**30
    assert (widths.above, widths.mlp, widths.queries, widths.layers) == (2, 128, 64, 1)
    most = most_tokens(limit, widths, 10, 4, device)

    def peak(tokens):
        each = ([tokens], [32] * (tokens // 32))
        return max(sum(pull_memory(widths, lengths, 10, 4, device).values()) for lengths in each)

    assert most > 256 and peak(most) <= limit < peak(most + most // 32)
    assert most_tokens(limit // 4, widths, 10, 4, device) < most > most_tokens(limit, widths, 40, 4, device)
    assert model_widths(model, {"model.embed_tokens": 64, "model.layers.3.mlp": 64}).above == 4
    model.get_output_embeddings = lambda: None  # not every model says where its unembedding is
    assert model_widths(model, {"model.layers.1": 64}) == widths
