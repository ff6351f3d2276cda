"""Models of today by their published configurations, with random weights and few blocks; and a small one of each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.workloads import Batch, Workload, padded, random_workload

BLOCKS = 4  # of the deep models, so that two cores have time for them
SHORTEST, LONGEST = 44, 76  # tokens of the prompts, as of the package's chat prompts


class Shape(NamedTuple):
    """A model to make.

    Attributes:
        title: what its numbers are called.
        kind: transformers' class of its configuration.
        arguments: the published sizes; what is not here has the class's default.
        depth: how the configuration calls the number of blocks.
        small: the sizes that make it small enough for a test.
        blocks: how many blocks are made; None: all that the model has.
    """

    title: str
    kind: str
    arguments: Mapping[str, Any]
    small: Mapping[str, Any]
    depth: str = "num_hidden_layers"
    blocks: int | None = BLOCKS


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 521,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.1,
}
_GEMMA_TYPES = (["sliding_attention"] * 5 + ["full_attention"]) * 3

SHAPES: dict[str, Shape] = {
    "qwen3-0.6b": Shape(
        "Qwen3-0.6B",
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
        },
        _SMALL | {"head_dim": 32},
    ),
    "gemma3-270m": Shape(
        "Gemma 3 270M",
        "Gemma3TextConfig",
        {
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 262_144,
            "max_position_embeddings": 32_768,
            "query_pre_attn_scalar": 256,
            "sliding_window": 512,
            "layer_types": _GEMMA_TYPES,
            "tie_word_embeddings": True,
        },
        _SMALL
        | {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "num_key_value_heads": 1,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        blocks=None,
    ),
    "olmo2-1b": Shape(
        "OLMo 2 1B",
        "Olmo2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 100_352,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        _SMALL | {"num_key_value_heads": 4},
    ),
    "phi3-mini": Shape(
        "Phi-3 mini",
        "Phi3Config",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32_064,
            "max_position_embeddings": 4096,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
        },
        _SMALL | {"num_key_value_heads": 4, "original_max_position_embeddings": 256, "sliding_window": 64},
    ),
    "pythia-410m": Shape(
        "Pythia 410M",
        "GPTNeoXConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "vocab_size": 50_304,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"},
    ),
    "gpt2": Shape(
        "GPT-2",
        "GPT2Config",
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257, "n_positions": 1024},
        {"n_embd": 64, "n_head": 4, "vocab_size": 521, "n_positions": 256}
        | {"eos_token_id": None, "bos_token_id": None, "initializer_range": 0.1},
        depth="n_layer",
    ),
    "granite3-moe-1b": Shape(
        "Granite 3 MoE 1B-A400M",
        "GraniteMoeConfig",
        {
            "hidden_size": 1024,
            "intermediate_size": 512,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "vocab_size": 49_155,
            "max_position_embeddings": 4096,
            "num_local_experts": 32,
            "num_experts_per_tok": 8,
            "attention_multiplier": 1 / 64,
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "tie_word_embeddings": True,
        },
        _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_multiplier": 1 / 16},
    ),
}


def todays_shape(
    name: str, dtype: str = "bfloat16", device: str = "auto", precision: str = "auto", *, small: bool = False,
    all_blocks: bool = False,
) -> Workload:  # fmt: skip
    """A random model of a name of `SHAPES`; with `small`, of the same kind and of a test's size; or with all blocks."""
    import transformers

    shape = SHAPES[name]
    few = BLOCKS if small else None if all_blocks else shape.blocks
    blocks = few or shape.arguments[shape.depth]
    sizes = shape.arguments | (shape.small if small else {}) | {shape.depth: blocks}
    config = getattr(transformers, shape.kind)(**sizes)
    title = f"{shape.title}, {'small, ' if small else ''}{blocks} blocks"
    return random_workload(title, config, dtype, device, precision)


def unequal(workload: Workload, prompts: int = 8, shortest: int = SHORTEST, longest: int = LONGEST) -> Batch:
    """Prompts of random tokens, their lengths evenly spread, in random order."""
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, prompts).round().int()[torch.randperm(prompts, generator=drawn)]
    vocabulary = workload.model.config.vocab_size
    rows = [torch.randint(vocabulary, (n,), generator=drawn).tolist() for n in lengths.tolist()]
    return padded(rows, workload.model.device)
