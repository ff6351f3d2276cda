"""Tiny random causal LMs of awkward sizes, and the batches that go with them.

Their weights are drawn large, so that the next-token distributions are far from uniform and every part of a model
bears on its scores: errors of order one in any part show.
"""

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, WIDTH, BLOCKS = 101, 36, 4
WORDS = [f"w{i}" for i in range(99)]  # of a tokenizer of one token a word

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 58, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 6, "n_positions": 128, "n_inner": 58,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_NEOX = {key: value for key, value in _LLAMA_LIKE.items() if key not in ("num_key_value_heads", "head_dim")}
_OPT = {
    **{key: value for key, value in _NEOX.items() if key != "intermediate_size"},
    "ffn_dim": 58, "word_embed_proj_dim": WIDTH,
}  # fmt: skip
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}

# Config class, its arguments, the name of a block with {} for its number. gpt2, gpt_neox and opt compute all of it in
# their own dtype; the others compute their norms in float32 whatever the dtype.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", _GPT2, "transformer.h.{}"),
    "gpt_neox": ("GPTNeoXConfig", _NEOX, "gpt_neox.layers.{}"),
    "opt": ("OPTConfig", _OPT, "model.decoder.layers.{}"),
    "llama": ("LlamaConfig", _LLAMA_LIKE, "model.layers.{}"),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": 4}, "model.layers.{}"),
    "gemma2": ("Gemma2Config", {**_LLAMA_LIKE, "sliding_window": 4}, "model.layers.{}"),
    "granite": (
        "GraniteConfig",
        {**_LLAMA_LIKE, "logits_scaling": 0.25, "residual_multiplier": 0.7},
        "model.layers.{}",
    ),
    "cohere": ("CohereConfig", {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}, "model.layers.{}"),
    "phi": (
        "PhiConfig",
        {**{k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}, "partial_rotary_factor": 2 / 3},
        "model.layers.{}",
    ),
}
# More of them, for tests of what blocks have in common.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3": ("Qwen3Config", _LLAMA_LIKE, "model.layers.{}"),
    "olmo2": ("Olmo2Config", {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}, "model.layers.{}"),
    "phi3": ("Phi3Config", {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"}, "model.layers.{}"),
    "gemma3": (
        "Gemma3TextConfig",
        {**_LLAMA_LIKE, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "model.layers.{}",
    ),
    "gpt_oss": ("GptOssConfig", {**_LLAMA_LIKE, **_EXPERTS, "sliding_window": 4}, "model.layers.{}"),
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, **_EXPERTS, "sliding_window": None}, "model.layers.{}"),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_LLAMA_LIKE, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20},
        "model.layers.{}",
    ),
    "granitemoe": ("GraniteMoeConfig", {**_LLAMA_LIKE, **_EXPERTS, "residual_multiplier": 0.7}, "model.layers.{}"),
    "glm": ("GlmConfig", {**_LLAMA_LIKE, "partial_rotary_factor": 2 / 3}, "model.layers.{}"),
    "hunyuan": ("HunYuanDenseV1Config", _LLAMA_LIKE, "model.layers.{}"),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "state_size": 5},
        "backbone.layers.{}",
    ),
}


@cache
def tiny(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """A model in evaluation mode, shared by all tests: one that changes it takes a `fresh` one."""
    config_class, arguments, _ = (FAMILIES | MORE_FAMILIES)[family]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return draw(model, seed, logits_std=2.0 / getattr(config, "logit_scale", 1.0)).to(dtype)


def fresh(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> nn.Module:
    """The same model as an object of its own."""
    return copy.deepcopy(tiny(family, dtype, seed, **changes))


def block(family: str, number: int) -> str:
    """The name of a block of the family; negative numbers count from the top."""
    return (FAMILIES | MORE_FAMILIES)[family][2].format(number % BLOCKS)


def draw(model: nn.Module, seed: int, logits_std: float = 2.0) -> nn.Module:
    """Draw every weight anew: matrices of unit gain, norms about 1, biases about 0.3, logits of the given spread."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = model.get_output_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(
                    0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
                )  # a weight of one row is a norm's
            elif unembedding is not None and parameter is unembedding.weight:
                parameter.copy_(noise * logits_std / math.sqrt(parameter.shape[1]))
            elif "emb" in name or name.endswith(("wte.weight", "wpe.weight")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
    return model


def prompts(lengths: Sequence[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[Tensor]:
    """Random token ids, one tensor a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def padded(rows: Sequence[Tensor], side: str, extra: int = 0) -> tuple[Tensor, Tensor]:
    """One batch of unequal prompts and its mask; the padding is of arbitrary tokens, since it must not matter."""
    width = max(len(row) for row in rows) + extra
    ids = torch.randint(0, VOCABULARY, (len(rows), width), generator=torch.Generator().manual_seed(99))
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[b, where], mask[b, where] = row, 1
    return ids, mask


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word, w0 to w98."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    core = Tokenizer(WordLevel({word: i for i, word in enumerate(["<unk>", "<s>", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")
