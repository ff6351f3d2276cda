"""Models in the forms that users bring, made from one tiny llama, and the comparison with plain autograd."""

import copy
from pathlib import Path

import numpy as np
import torch
from command_cases import LAYER, VOCABULARY, run_here, save_model, texts, tiny_tokenizer, write_prompts
from models import tiny
from oracles import plain_scores, relative

from fisher_vmap import open_results

PROMPTS = texts(5)
SIZES = {  # of a size that quantisation formats take: rows of 32 at least
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4,
}  # fmt: skip
# Where the llama's parts may stand: half of them in memory.
PLACES = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2"], "cpu")
PLACES |= dict.fromkeys(["model.layers.1", "model.layers.3", "model.norm", "lm_head"], "disk")


def base(dtype=torch.float32):
    """The llama that all sources are made of."""
    return copy.deepcopy(tiny("llama", dtype, **SIZES))


def run(model, tmp_path, code=0, **settings):
    """The command on a model path; returns the results folder."""
    data = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    out = settings.pop("out", tmp_path / "out")
    assert run_here(model, data, out, **settings) == code
    return out


def agrees(out, oracle, budget, layer=LAYER):
    """Every stored matrix is that of plain autograd on the oracle's weights, tokens given."""
    results = open_results(out)
    tokenizer = tiny_tokenizer()
    worst = 0.0
    assert len(results) == len(PROMPTS)
    for record in results:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": record.text}], tokenize=False,
                                             add_generation_prompt=True)  # fmt: skip
        ids = torch.tensor(tokenizer(chat, add_special_tokens=False)["input_ids"])
        plain = plain_scores(oracle, ids, layer, top_k=6)
        assert record.status == "ok"
        left = plain.fisher @ torch.tensor(record.V.T).double()
        worst = max(worst, relative(left, torch.tensor(record.V.T * record.S)))
        np.testing.assert_allclose(record.log_probs, plain.log_probs, atol=budget)
    assert worst < budget, worst


def with_tokenizer(folder: Path) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save(folder, model):
    return save_model(folder, model)


def stored(out):
    return [(record.S, record.V) for record in open_results(out)]
