"""The memory that --plan foretells for a batch, beside what a batch takes in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command_cases import VOCABULARY, save_model
from models import draw

from fisher_vmap.run.plan_model import batch_memory, skeleton_of
from fisher_vmap.run.settings import Settings

MEASURE = """
import ctypes, gc, sys
import torch, transformers
from fisher_vmap import FisherModel

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
opened = FisherModel(model, layers=int(sys.argv[2]), top_k=10)
opened.numbers([[1, 2, 3, 4], [5, 6]], 10)
assert opened.forms[opened.layers[0]]["form"] == "packed"
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = status("VmRSS")
batch = [[(7 * i + b) % 90 + 1 for i in range(int(sys.argv[4]))] for b in range(int(sys.argv[3]))]
opened.numbers(batch, 10)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A llama large enough for a batch to show in a process's memory."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return save_model(tmp_path_factory.mktemp("model"), draw(model, 0))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be measured on Linux alone")
@pytest.mark.parametrize(
    ("layer", "prompts", "tokens"), [(1, 8, 128), pytest.param(1, 1, 2048, marks=pytest.mark.slow)]
)
def test_a_batch_takes_what_is_foretold(folder, layer, prompts, tokens):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, (folder, layer, prompts, tokens))],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = Settings(model_path=str(folder), dataset_name="none", hook_layer_name=layer, dtype="float32")
    told = batch_memory(skeleton_of(settings), [tokens] * prompts, 10, 4, torch.device("cpu"))
    assert 0.7 < told.total / int(done.stdout) < 1.35, (told, int(done.stdout))
