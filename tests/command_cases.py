"""A tiny model folder, data files, and the command run on them: in this process, or as the real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from models import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fisher_vmap.run.__main__ import main

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
VOCABULARY = 263  # 256 bytes, the special tokens, and two ids that no text gives
LAYER = "model.layers.1"
SHARDS = 13  # of what `write_shards` writes, with these settings
SETTINGS = {"hook_layer_name": "0,2", "shard_size": 3, "batch_size": 2}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "wizards", "mix", "tea")


def tiny_tokenizer(template=TEMPLATE):
    """One token a byte, so that any text is a prompt and its length is plain to see."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({**{c: i + 5 for i, c in enumerate(alphabet)}}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = template
    return tokenizer


def save_model(folder, model=None, tokenizer=True):
    """A model folder as `save_pretrained` writes it: by default a tiny llama with a chat template."""
    model = tiny("llama", torch.float32, vocab_size=VOCABULARY) if model is None else model
    model.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def texts(count, longest=40):
    """Prompts of very different lengths, 1 to about `longest` characters."""
    return [
        " ".join(WORDS[(5 * n + 3 * i) % len(WORDS)] for i in range(9))[: 1 + (17 * n) % longest] for n in range(count)
    ]


def write_prompts(path, prompts, **columns):
    """JSON lines with the prompts in a column "prompt"."""
    rows = [
        {"prompt": prompt, **{key: values[i] for key, values in columns.items()}} for i, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_shards(path):
    """Prompts for `SHARDS` shards, the last of them not full and one prompt of it empty."""
    return write_prompts(path, [*texts(3 * SHARDS - 2), ""])


def arguments(model, data, out, **settings):
    """The command line of a run; float32 on the CPU unless told otherwise."""
    values = {
        "model_path": model, "dataset_name": data, "output_dir": out, "hook_layer_name": LAYER, "dtype": "float32",
        "device": "cpu", "top_k_tokens": 6, "num_singular_values": 4, "shard_size": 4, "num_prompts": "all", **settings,
    }  # fmt: skip
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def run_here(*args, **settings):
    """The command in this process; returns its exit code."""
    return main(arguments(*args, **settings))


def environment():
    """Of the real command: one thread, and no hub to ask."""
    package = str(Path(__file__).parents[1])
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


def real_command(argv, module="fisher_vmap.run", **options):
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        capture_output=True, text=True, env=environment(), timeout=300, check=False, **options,
    )  # fmt: skip


def start_command(argv, module="fisher_vmap.run", **options):
    """The command as a user starts it, not waited for."""
    return subprocess.Popen([sys.executable, "-m", module, *map(str, argv)], env=environment(), **options)


def numbers_of(out):
    """The bytes of everything in a results folder that holds numbers or text."""
    kinds = (".safetensors", ".parquet", ".npz")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix in kinds}


def entries_of(out):
    """The entries beside the shards of an unfinished run: name -> which file it is, and when it was written."""
    found = {}
    for path in (out / "shards").glob("shard-*.json"):
        found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


# Runs with several targets: what they add to the command line. `write_answers` is their data.
TARGET_RUNS = {
    "samples": {"targets": 3, "samples": 2},
    "written": {"targets": 3, "estimator": "full"},
    "completion": {"targets": "completion", "estimator": "sampled", "score_samples": 16},
    "all": {"targets": "all", "hook_layer_name": "0,2"},
}


def write_answers(path, count=6):
    """Prompts with completions of different lengths; the last is empty, and so skipped."""
    prompts = [*texts(count - 1), ""]
    return write_prompts(path, prompts, completion=[f"answer number {i}"[: 4 + 2 * i] for i in range(count)])


def run_targets(folder, kind, **more):
    """A folder of one of `TARGET_RUNS`, made by the command on a tiny model; returns its path."""
    model, data = save_model(folder / "model"), write_answers(folder / "answers.jsonl")
    assert run_here(model, data, folder / kind, **TARGET_RUNS[kind], **more) == 0
    return folder / kind
