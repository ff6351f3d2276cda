"""Every class of transformers' causal-LM mapping, built tiny and random from its config, without a download.

The mapping says which classes there are, and each default config which sizes a model has: they are made small by what
they are called, in the config and in every config inside it. What that cannot know stands in `OVERRIDES`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, BLOCKS = 101, 64, 4
ORDINARY = 80  # tokens from here on stand for images and the like where a model has such tokens
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 3, "decoder_start_token_id": 1}

# What a size is called, and what it becomes; the first pattern that fits counts. A list is cut to the layers kept.
SIZES: list[tuple[str, int]] = [
    (r".*vocab_size.*|.*_vocab", VOCABULARY),
    (r"(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)|num_layers_per_stack", BLOCKS),
    (r".*(shared|moe).*intermediate.*|expert_ffn_hidden_size", 24),
    (r".*intermediate_size.*|.*ffn_dim|ffn_hidden_size|feed_forward_size|n_inner|dff|dim_ff|d_ff|d_inner", 88),
    (r"hidden_size_per_layer_input|laurel_rank|.*lora_rank|hc_lowrank|gated_norm_rank|adapter_rank", 8),
    (r"hidden_size.*|backbone_hidden_size|n_embd|d_model|embedding_dim|emb_dim|lru_width|word_embed_proj_dim", WIDTH),
    (r"adapter_.*(_dim|_size)", WIDTH),
    (r"attention_hidden_size|embedding_size|(input|output)_embedding_size", WIDTH),
    (r".*(num_key_value_heads|num_kv_heads|num_query_groups)|num_global_key_value_heads", 2),
    (r".*nope_head_dim", 12),
    (r".*rope_head_dim|rotary_dim", 4),
    (r".*(qk_head_dim|v_head_dim|head_dim|dim_head|d_head|attention_head_size|kv_channels|d_kv|head_size)", 16),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"index_n_heads", 16),  # few heads tie at zero, and ties among keys break as they like
    (r"(num_|n_|.*_)?(attention_)?(n_)?heads?", 4),
    (r".*(experts|experts_num|expert_num|zero_expert_num|moe_num_experts)", 6),
    (r"(num_)?experts_per_tok(en)?|moe_k|moe_topk|num_experts_per_token|top_k_experts", 2),
    (r"n_group|num_expert_group|topk_group", 1),
    (r".*max_position_embeddings.*|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r".*sliding_window(_size)?|attention_window_size|local_attention.*|attention_chunk_size|keep_window_size", 4),
    (r"index_topk", 4),
    (r".*(state_size|d_state)", 8),
    (r".*(dt_rank|time_step_rank)", 4),
    (r".*chunk_size", 4),
]  # fmt: skip


def kinds() -> list[str]:
    """The model types of the mapping, as it is installed."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind: str, seed: int = 0) -> nn.Module:
    """The causal LM of a model type, tiny, its weights drawn at random, in evaluation mode and float32."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    torch.manual_seed(seed)
    config = config_of(kind)
    if not isinstance(config, model_class.config_class):  # the causal LM is a part of what the config describes
        parts = (part for part in vars(config).values() if isinstance(part, model_class.config_class))
        config = next(parts, config)
    return spread_out(draw(model_class(config).eval(), seed))


def config_of(kind: str) -> Any:
    config_class = CONFIG_MAPPING[kind]
    overrides = OVERRIDES.get(kind, {})
    full = config_class(**overrides.get("first", {})).to_dict()
    return config_class.from_dict(_merged(reduced(full), overrides.get("then", {})))


def _merged(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            base[name] = _merged(base[name], value)
        else:
            base[name] = value
    return base


def reduced(config: Mapping[str, Any], latent: bool = False) -> dict[str, Any]:
    """The same config as a dict with every size made small, and as few layers as show every kind of layer.

    Args:
        config: the config as a dict.
        latent: whether keys and values come from a latent vector, as many heads of them as queries have.
    """
    latent = latent or bool(config.get("kv_lora_rank"))
    depth = next((v for k, v in config.items() if _depth(k) and isinstance(v, int) and v > 0), None)
    kept = _layers_kept(config, depth)
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name == "per_layer_config":
            value = {kept.index(int(i)): reduced(own, latent) for i, own in value.items() if int(i) in kept}
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            value = reduced(value, latent)
        elif isinstance(value, list) and depth is not None and len(value) == depth and kept:
            value = [_reduce(name, value[i]) for i in kept]
        elif _depth(name) and isinstance(value, int) and value > 0 and not isinstance(value, bool):
            value = len(kept) or min(value, BLOCKS)
        else:
            value = _reduce(name, value)
        small[name] = value
    if "is_decoder" in small:
        small["is_decoder"] = True
    if latent and "num_key_value_heads" in small:
        small["num_key_value_heads"] = 4
    _keep_relations(config, small)
    return small


def _keep_relations(config: Mapping[str, Any], small: dict[str, Any]) -> None:
    """What was a sum or a copy of other sizes stays one."""
    nope, rope = config.get("qk_nope_head_dim"), config.get("qk_rope_head_dim")
    for name in ("head_dim", "qk_head_dim"):
        if rope and config.get(name) == rope:
            small[name] = small["qk_rope_head_dim"]
        elif rope and nope and config.get(name) == nope + rope:
            small[name] = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]


def _depth(name: str) -> bool:
    return re.fullmatch(SIZES[1][0], name) is not None


def _layers_kept(config: Mapping[str, Any], depth: int | None) -> list[int]:
    """Numbers of layers of the full model: the first of each kind, filled up with the earliest others."""
    lists = [v for v in config.values() if isinstance(v, list) and depth is not None and len(v) == depth]
    if not lists:
        return []
    first: dict[str, int] = {}
    for i in range(len(lists[0])):
        first.setdefault(str([v[i] for v in lists if not isinstance(v[i], float)]), i)
    kept = sorted(first.values())[: 2 * BLOCKS]
    kept += [i for i in range(len(lists[0])) if i not in kept][: max(0, BLOCKS - len(kept))]
    return sorted(kept)


def _reduce(name: str, value: Any) -> Any:
    if name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
        if name in SPECIAL:
            return SPECIAL[name]
        return ORDINARY + sum(name.encode()) % (VOCABULARY - ORDINARY)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return value if size is None else min(size, value)


def spread_out(model: nn.Module) -> nn.Module:
    """Scale the unembedding until the logits of a prompt spread by about 2, whatever scales and caps follow it."""
    unembedding = model.get_output_embeddings()
    for _ in range(3 if unembedding is not None else 0):
        try:
            with torch.no_grad():
                spread = model(input_ids=prompts((11,))[0][None], use_cache=False).logits.std(-1).mean()
        except (RuntimeError, ValueError, TypeError):  # what takes no plain tokens is told apart later
            return model
        if 1 < spread < 4:
            return model
        with torch.no_grad():
            unembedding.weight.mul_(2 / spread)
    return model


def draw(model: nn.Module, seed: int, logits_std: float = 2.0) -> nn.Module:
    """Draw every weight anew, large enough that no part of the model is without effect on its output."""
    generator = torch.Generator().manual_seed(seed)
    unembedding = model.get_output_embeddings()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    seen = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if unembedding is not None and parameter is getattr(unembedding, "weight", None):
                parameter.copy_(noise * logits_std / math.sqrt(parameter.shape[1]))
            elif id(parameter) in embeddings:
                parameter.copy_(noise)
            elif re.search(r"A_log|dt_|_decay|[if]gate_preact|a_param|recurrent|lambda|\.D$|time_", name):
                parameter.add_(0.1 * noise)  # rates of decay: what they start from is what they can be
            elif parameter.dim() < 2:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise / math.sqrt(fan_in(model, name, parameter)))
    return model


def fan_in(model: nn.Module, name: str, parameter: torch.Tensor) -> int:
    """How many inputs an output of this matrix sums over."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if type(owner).__name__ == "Conv1D":
        return parameter.shape[0]
    return parameter[0].numel() if isinstance(owner, nn.modules.conv._ConvNd) else parameter.shape[1]


_SHARING = {
    "intermediate_size": 88, "num_hidden_layers": 6, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}  # fmt: skip
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
_INDEXER = {
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_ALL_SHARED = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}  # fmt: skip
_TWO_HYBRIDS = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "hybrid_layer_ids": [1, 3],
    "attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // 4,
}  # fmt: skip
# What the default config leaves out or what its sizes must satisfy: `first` goes into the default config, `then` into
# the reduced one.
OVERRIDES: dict[str, dict[str, Any]] = {
    # defaults that are None, or that their own class refuses
    "deepseek_v2": {"first": {"num_experts_per_tok": 2}},
    "dots1": {"first": {"n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2}, "then": _WINDOWS},
    "hunyuan_v1_dense": {"first": {"head_dim": 16}},
    "hunyuan_v1_moe": {"first": {"head_dim": 16}},
    "ministral": {"first": {"head_dim": 16}, "then": _WINDOWS},
    "blenderbot": {"then": {"max_position_embeddings": 256}},
    "dbrx": {"then": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}},
    "cohere_compass_text": {
        "first": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "then": {"rope_parameters": {"full_attention": {"mrope_section": [4, 2, 2]}}},
    },
    "qwen4_exp_text": {"then": _INDEXER},
    "qwen4_exp": {"then": {"text_config": _INDEXER}},
    "nemotron": {"first": {"num_key_value_heads": 2}},
    "lfm2_moe": {
        "first": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4}
    },
    # heads times their width is the width of the state-space part
    "mamba2": {"then": {"num_heads": 8}},
    "falcon_h1": {"then": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}},
    "zamba2": {"then": {"n_mamba_heads": 8, "mamba_headdim": 16, **_TWO_HYBRIDS}},
    "zamba": {"then": _TWO_HYBRIDS},
    # a default of one kind of layer where the class has two
    "bamba": {"then": {"attn_layer_indices": [1, 3]}},
    "jamba": {"then": {"attn_layer_period": 2, "attn_layer_offset": 1}},
    "granitemoehybrid": {"then": {"layer_types": ["linear_attention", "full_attention"] * 2}},
    "laguna": {"then": _WINDOWS},
    "mellum": {"then": _WINDOWS},
    "smollm3": {"then": _WINDOWS},
    "qwen2": {"then": {**_WINDOWS, "use_sliding_window": True}},
    "qwen3": {"then": {**_WINDOWS, "use_sliding_window": True}},
    "lfm2": {"then": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4, "full_attn_idxs": None}},
    # blocks of keys of which only some are attended to
    "minimax_m3_vl_text": {
        "then": {
            "index_block_size": 2,
            "index_topk_blocks": 2,
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        },
    },
    # a part that it computes in bfloat16 by default
    "xlstm": {"then": {"autocast_kernel_dtype": "float32"}},
    # factors of the width
    "reformer": {
        "then": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [24, 40], "attn_layers": ["local", "lsh"] * 2}
    },
    # the language whose adapters are used
    "xmod": {"then": {"default_language": "en_XX"}},
    # layers that share keys and values with lower ones of their type, fewer than the default's number of them
    "gemma3n_text": {"then": {**_SHARING, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0]}},
    "gemma4_text": {"then": _SHARING},
    "gemma4_unified_text": {"then": _SHARING},
    "gemma4_unified_assistant": {"first": {"text_config": _ALL_SHARED}},
    "xlm": {"first": {"causal": True}},
    "xlnet": {"first": {"attn_type": "uni"}},
    "gemma4_assistant": {"first": {"text_config": _ALL_SHARED}},
}


def prompts(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    """Random ordinary tokens, one tensor a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, ORDINARY, (length,), generator=generator) for length in lengths]
