"""The matrix products that a run cannot avoid, counted by hand where layers are joined, slide or are routed."""

import pytest
import torch
import transformers
from models import tiny
from torch import nn

from fisher_vmap.model.layers import decoder_blocks
from fisher_vmap.run.plan_model import Work, attended, unavoidable

K, HOOK, LENGTHS = 5, 1, [6, 10]
SIZES = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def counted(model, kind, lengths=LENGTHS):
    products = unavoidable(model, list(decoder_blocks(model).values()), lengths, [HOOK], Work(shared=K))
    return sum(product.shape.flops for product in products if product.kind == kind)


def built(config):
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def by_hand(everywhere, at_the_end, lengths=LENGTHS):
    """Forward and pullback of four blocks hooked at HOOK.

    Args:
        everywhere: weights that a token uses in the last block at every position: keys and values.
        at_the_end: the others.
        lengths: of the prompts.
    """
    M, B = sum(lengths), len(lengths)
    block, top = (everywhere + at_the_end) * M, everywhere * M + at_the_end * B
    return 2 * (3 * block + top), 2 * K * ((3 - HOOK - 1) * block + top)


JOINED = {
    "gpt2": lambda: tiny("gpt2", torch.float32),
    "gpt_neox": lambda: tiny("gpt_neox", torch.float32),
    "llama": lambda: tiny("llama", torch.float32),
    "phi3": lambda: built(transformers.Phi3Config(**SIZES)),
    "olmo2": lambda: built(transformers.Olmo2Config(**SIZES)),
    "qwen3": lambda: built(transformers.Qwen3Config(**SIZES, head_dim=16)),
}


@pytest.mark.parametrize("family", JOINED)
def test_of_the_last_block_keys_and_values_alone_count_at_every_position(family):
    """One layer for queries, keys and values costs what three cost, and so does a joined gate."""
    model = JOINED[family]()
    config, blocks = model.config, list(decoder_blocks(model).values())
    assert len(blocks) == 4
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    weights = sum(weight.numel() for weight in blocks[0].parameters() if weight.dim() == 2)
    keys = 2 * groups * width * config.hidden_size
    forward, pulled = by_hand(keys, weights - keys)
    assert counted(model, "forward, linear layers") == forward
    assert counted(model, "pullback, linear layers") == pulled


@pytest.mark.parametrize("kind", ["granitemoe", "mixtral", "qwen3_moe"])
def test_a_token_counts_for_the_experts_that_it_is_routed_to(kind):
    config = {
        "granitemoe": lambda: transformers.GraniteMoeConfig(**SIZES, num_local_experts=7, num_experts_per_tok=3),
        "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=7, num_experts_per_tok=3),
        "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
            **SIZES, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=24, head_dim=8
        ),
    }[kind]()
    model = built(config)
    D, I, E, H, G = 32, 24, 8, 4, 2
    forward, pulled = by_hand(2 * G * E * D, 2 * H * E * D + 7 * D + 3 * (3 * D * I))  # with the router's
    assert counted(model, "forward, linear layers") == forward
    assert counted(model, "pullback, linear layers") == pulled


class ExpertBlock(nn.Module):
    """A mixture as a list of experts, and an expert that every token uses."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(5))
        self.shared_experts = nn.Linear(8, 6, bias=False)


def test_experts_in_a_list_take_the_routed_tokens_among_them():
    model = nn.Module()
    model.config = transformers.PretrainedConfig(num_experts_per_tok=2)
    model.get_output_embeddings = lambda: nn.Linear(8, 11, bias=False)
    products = unavoidable(model, [ExpertBlock(), ExpertBlock()], [1, 2], [0], Work(shared=2))
    rows = [product.shape.rows for product in products if product.kind == "pullback, linear layers"]
    assert rows == [3, 3, 2, 2, 2, 6]  # two vectors at three positions, for two experts of five


@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 40])
def test_a_window_leaves_as_many_pairs_as_queries_see(tokens, window):
    pairs = sum(min(i + 1, window or tokens) for i in range(tokens))
    queries, keys = attended(tokens, window, last_query=False)
    assert 0 <= pairs - queries * keys < keys
    assert attended(tokens, window, last_query=True) == (1, min(tokens, window or tokens))


def test_a_block_that_slides_counts_fewer_pairs():
    types = ["sliding_attention", "full_attention"] * 2
    sizes = SIZES | {"head_dim": 16, "sliding_window": 4}
    sliding = built(transformers.Gemma3TextConfig(**sizes, layer_types=types))
    full = built(transformers.Gemma3TextConfig(**sizes, layer_types=["full_attention"] * 4))
    H, E, T, window = 4, 16, 12, 4
    pairs, few, last = T // 2 * T, (T * window - 6) // window * window, T  # the top block is a full one
    forward, pulled = "forward, attention", "pullback, attention"
    assert counted(full, forward, [T]) == 4 * H * E * (3 * pairs + last)
    assert counted(sliding, forward, [T]) == 4 * H * E * (pairs + 2 * few + last)
    assert counted(sliding, pulled, [T]) == 8 * K * H * E * (few + last)
    assert counted(sliding, forward, [4]) == counted(full, forward, [4])  # within the window
