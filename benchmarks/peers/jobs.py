"""The three jobs that the peers are compared on, and how near two results are.

`top-k`: SmolLM2-135M, chat prompts, the leading eigenpairs of the matrix of the 10 likeliest tokens.
`whole`: a small random Llama, the dense matrix of its whole vocabulary.
`leading`: SmolLM2-135M, the leading eigenpairs of the matrix of its whole vocabulary of 49,152.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers.about import PEERS
from benchmarks.workloads import Batch, Workload, chat, padded, random_model, smollm2
from fisher_vmap import load_model

RANK = 10
CONVERGED = {"oversampling": 38, "passes": 3}
# Rows that take a prompt after the other: their memory is that of the longest prompt.
ONE_AT_A_TIME = {("top-k", "curvlinops"), ("whole", "curvlinops"), ("whole", "nngeometry"), ("leading", "curvlinops")}


class Job(NamedTuple):
    """What is computed, on what, and by whom: calls by the name of their row, and the peer that a row is of."""

    name: str
    workload: Workload
    batch: Batch
    layer: str
    rows: dict[str, str]

    def call(self, row: str) -> Callable[[], Tensor]:
        """A function of no arguments that computes the row's matrices, as factors or dense: see `dense`."""
        module = PEERS[self.rows[row]].load()
        arguments: tuple[Any, ...] = (self.workload.model, *self.batch, self.layer)
        function: Callable[[], Any]
        if self.name == "top-k":
            function = partial(module.top_k, *arguments, RANK)
        elif self.name == "whole":
            function = partial(module.whole, *arguments)
        else:
            options = CONVERGED if row == "ours, converged" else {}
            function = partial(module.leading_whole, *arguments, RANK, **options)

        def run() -> Any:
            self.workload.model.set_attn_implementation("sdpa")  # what it is loaded with, and some peers change
            return function()

        return run

    def on(self, batch: Batch) -> "Job":
        """The same on other prompts."""
        return self._replace(batch=batch)

    def warm(self, row: str) -> None:
        """Call a row on a few tokens: what is made once is then made."""
        self.on(Batch(self.batch.input_ids[:1, :8], self.batch.attention_mask[:1, :8])).call(row)()

    def longest(self) -> Batch:
        """The longest prompt alone."""
        n, b = max((n, b) for b, n in enumerate(self.batch.lengths))
        return Batch(self.batch.input_ids[b : b + 1, :n], self.batch.attention_mask[b : b + 1, :n])


def real_model(folder: Path | None = None) -> Workload:
    """SmolLM2-135M in float32: from its package, or from a folder that it was saved in."""
    if folder is None:
        return smollm2("float32", "cpu")
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    return Workload("SmolLM2-135M", loaded.model, loaded.tokenizer, loaded.precision)


def top_k_job(workload: Workload, prompts: int = 3) -> Job:
    """SmolLM2's matrix of the likeliest tokens at layer 15."""
    batch = chat(workload, prompts=prompts)
    return Job("top-k", workload, batch, workload.layer(15), {name: name for name in PEERS})


def whole_job(vocabulary: int = 2048, width: int = 128, blocks: int = 4, prompts: int = 3) -> Job:
    """A small Llama's matrix of its whole vocabulary, at its second block."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        initializer_range=0.06,  # distributions far from uniform
    )
    workload = Workload(
        f"random Llama, {blocks} layers of {width}, V = {vocabulary:,}", random_model(config, "float32", "cpu"), None
    )
    ids = torch.arange(vocabulary).tolist()
    batch = padded([ids[5 * i : 8 * i + 20] for i in range(prompts)], torch.device("cpu"))
    return Job("whole", workload, batch, workload.layer(1), {name: name for name in PEERS})


def leading_job(workload: Workload, prompts: int = 1) -> Job:
    """SmolLM2's matrix of the whole vocabulary: by its leading eigenpairs, since V backward passes take an hour."""
    rows = {"ours": "ours", "ours, converged": "ours", "curvlinops": "curvlinops"}
    return Job("leading", workload, chat(workload, prompts=prompts), workload.layer(15), rows)


def dense(result: Any) -> Tensor:
    """[B, D, D] float64: a dense result as it is, eigenpairs (values [B, R], vectors [B, R, D]) multiplied out."""
    if isinstance(result, Tensor):
        return result.detach().double()
    values_BR, vectors_BRD = (part.detach().double() for part in result)
    return vectors_BRD.mT @ (values_BR[:, :, None] * vectors_BRD)


def distance(found: Any, expected: Any) -> float:
    """|F - F'| / |F'| in the Frobenius norm, of the worst prompt."""
    F, other = dense(found), dense(expected)
    return float(((F - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)).max())
