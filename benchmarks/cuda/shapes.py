"""The models by their configurations, and the rows: those that matter most come first, since time may run out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda.session import free
from benchmarks.workloads import Batch, Workload, last_of, padded, random_workload


class Row(NamedTuple):
    """One job: a model, a batch, and what is asked of it.

    Attributes:
        model: a name of `CONFIGURATIONS`.
        prompts, tokens: the batch. With `unequal` its prompts have 0.7 to 1.2 times that many tokens, as chats have.
        top_k: K.
        place: the hooked block, as a share of all blocks; the next to last at most.
        positions: where the bias is added, "all" or "last".
        estimator: "topk", or "full" for the whole vocabulary.
        plain: "scores": the plain loop is timed as well, which takes as many backward passes as prompts times K;
            "whole": the plain pipeline too, with its dense SVD of each F, which a GPU takes seconds for.
    """

    model: str
    prompts: int
    tokens: int
    top_k: int = 10
    place: float = 0.5
    positions: str = "all"
    estimator: str = "topk"
    plain: str = ""
    unequal: bool = False

    @property
    def name(self) -> str:
        """The row in a few words."""
        asked = f"K={self.top_k}" if self.estimator == "topk" else f"full, rank {self.top_k}"
        return f"{self.model} {self.prompts}x{self.tokens} {asked} at {self.place:g} {self.positions}"

    def hook(self, blocks: int) -> int:
        """The number of the hooked block."""
        return min(int(self.place * blocks), blocks - 2)

    def batch(self, workload: Workload) -> Batch:
        """Random tokens of the row's lengths."""
        drawn = torch.Generator().manual_seed(self.prompts * self.tokens)
        lengths = [self.tokens] * self.prompts
        if self.unequal:
            spread = torch.linspace(0.7, 1.2, self.prompts)[torch.randperm(self.prompts, generator=drawn)]
            lengths = (spread * self.tokens).round().int().tolist()
        vocabulary = workload.model.config.vocab_size
        rows = [torch.randint(vocabulary, (n,), generator=drawn).tolist() for n in lengths]
        return padded(rows, workload.model.device)

    def where(self, batch: Batch) -> Tensor | None:
        """[B, T]: where the loops add their bias; None: everywhere."""
        return None if self.positions == "all" else last_of(batch)


_SMALL = {
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1009,
    "max_position_embeddings": 512,
}
# transformers' class of the configuration, its arguments, and the dtype of the weights.
CONFIGURATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2-1.5b": (
        "Qwen2Config",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    "llama-3.2-3b": (
        "LlamaConfig",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    "llama-3-8b": (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
        "bfloat16",
    ),
    "small-qwen2": ("Qwen2Config", {"hidden_size": 96, "tie_word_embeddings": True} | _SMALL, "float32"),
    "small-llama": ("LlamaConfig", {"hidden_size": 64, "tie_word_embeddings": False} | _SMALL, "bfloat16"),
}

_QWEN, _3B, _8B = "qwen2-1.5b", "llama-3.2-3b", "llama-3-8b"
ROWS = (
    Row(_QWEN, 8, 64, plain="whole", unequal=True),
    Row(_QWEN, 64, 512),
    Row(_3B, 8, 64, plain="scores", unequal=True),
    Row(_3B, 64, 512),
    Row(_8B, 8, 64, plain="scores", unequal=True),
    Row(_8B, 64, 512),
    Row(_QWEN, 1, 8192),
    Row(_QWEN, 8, 64, estimator="full", unequal=True),
    Row(_QWEN, 8, 64, positions="last", unequal=True),
    Row(_QWEN, 8, 64, place=0.125, plain="scores", unequal=True),
    Row(_QWEN, 8, 64, place=1.0, plain="scores", unequal=True),
    Row(_QWEN, 8, 64, top_k=32, plain="scores", unequal=True),
    Row(_QWEN, 64, 64, unequal=True),
    Row(_QWEN, 8, 512),
    Row(_QWEN, 64, 512, top_k=32),
    Row(_QWEN, 64, 512, estimator="full"),
    Row(_QWEN, 64, 512, positions="last"),
    Row(_QWEN, 64, 512, place=0.125),
    Row(_QWEN, 64, 512, place=1.0),
    Row(_3B, 8, 64, estimator="full", unequal=True),
    Row(_3B, 8, 64, top_k=32, unequal=True),
    Row(_3B, 1, 8192),
    Row(_8B, 8, 64, estimator="full", unequal=True),
    Row(_8B, 8, 64, top_k=32, unequal=True),
    Row(_8B, 1, 8192),
)
SMALL_ROWS = (
    Row("small-qwen2", 3, 12, top_k=4, plain="whole", unequal=True),
    Row("small-qwen2", 4, 24, top_k=4),
    Row("small-llama", 3, 12, top_k=4),
    Row("small-qwen2", 1, 96, top_k=4, place=0.0),
    Row("small-qwen2", 3, 12, top_k=4, estimator="full"),
    Row("small-qwen2", 3, 12, top_k=7, positions="last", unequal=True),
)


class Models:
    """The models, one at a time: another one is made after the last is freed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name, self._workload = "", None

    def __getitem__(self, name: str) -> Workload:
        """The model of a name of `CONFIGURATIONS`, with random weights."""
        if self._workload is None or self._name != name:
            import transformers

            self.clear()
            kind, arguments, dtype = CONFIGURATIONS[name]
            config = getattr(transformers, kind)(**arguments)
            self._workload = random_workload(name, config, dtype, str(self._device), "auto")
            self._name = name
        return self._workload

    def clear(self) -> None:
        """Free the model."""
        self._name, self._workload = "", None
        free(self._device)
