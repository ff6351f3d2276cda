"""Which modules can be hooked: found by what a model does on plain tokens, whatever its parts are called."""

import re
from typing import Any

import pytest
import torch
from models import BLOCKS, VOCABULARY, WIDTH, fresh, padded, prompts, tiny
from oracles import plain_scores, relative
from torch import Tensor, nn
from toys import ToyBlock, ToyLM
from toys.stacks import Grouped, InSequence, SomeUncalled, TowerAside, TowerOverPatches, TwoStacks
from toys.streams import (
    Keyword,
    LooksAhead,
    Named,
    PositionsFirst,
    SecondPlace,
    StreamsFirst,
    StreamsInside,
    WithoutCache,
)

from fisher_vmap import FisherModel, fisher_scores
from fisher_vmap.model.layers import Place, decoder_blocks, layers_of, place_of, resolve_layers

LENGTHS = (6, 2, 9)


def assert_right(model: nn.Module, layers: Any, kernel: str = "auto", tolerance: float = 1e-10) -> dict[str, str]:
    """Every layer against the oracle; the form of each."""
    opened = FisherModel(model, layers=layers, top_k=4, kernel=kernel)
    rows = prompts(LENGTHS)
    for side in ("left", "right"):
        scores = opened.scores(*padded(rows, side))
        for layer in opened.layers:
            for b, row in enumerate(rows):
                expected = plain_scores(model, row, layer, token_ids=scores.token_ids[b])
                assert relative(scores.gradients[layer][b], expected.gradients) < tolerance
    return {layer: form["form"] for layer, form in opened.forms.items()}


# Which list of modules holds the decoder's blocks.


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (TowerAside, [f"blocks.{i}" for i in range(4)]),
        (TowerOverPatches, [f"blocks.{i}" for i in range(4)]),
        (TwoStacks, [f"blocks.{i}" for i in range(4)]),
        (Grouped, [f"groups.0.{i}" for i in range(4)]),
        (SomeUncalled, ["blocks.0", "blocks.2"]),
        (InSequence, [f"stack.{i}" for i in range(4)]),
    ],
)
def test_the_largest_list_that_plain_tokens_pass_through(kind, names):
    model = kind()
    assert list(decoder_blocks(model)) == names
    forms = assert_right(model, "all")
    assert list(forms) == names and set(forms.values()) <= {"layerwise", "whole"}


def test_a_module_of_another_stack():
    assert assert_right(TwoStacks(), ["lower.0", "lower.1.down"]) == {"lower.0": "whole", "lower.1.down": "whole"}


def test_numbers_count_the_entries_of_the_list_called_or_not():
    model = SomeUncalled()
    assert resolve_layers(model, [2, "-4"]) == ["blocks.2", "blocks.0"]
    with pytest.raises(ValueError, match=r"blocks\.1 \(ToyBlock\) is never called"):
        resolve_layers(model, 1)


def test_one_block_that_stands_in_several_places():
    block = ToyBlock()
    model = ToyLM([block, ToyBlock(), block])
    assert resolve_layers(model, "all") == ["blocks.0", "blocks.1"]
    assert_right(model, ["blocks.0", "blocks.1"])
    assert_right(model, "blocks.2")  # a bias at every call of it, as a hook there would be


def test_modules_that_change_are_looked_at_anew():
    model = ToyLM()
    assert len(decoder_blocks(model)) == 4
    model.blocks.append(ToyBlock().double())
    assert len(decoder_blocks(model)) == 5
    assert_right(model, [0, -1])


# How blocks pass the residual stream on.


@pytest.mark.parametrize("kind", [Keyword, SecondPlace])
def test_a_residual_stream_that_is_neither_first_nor_called_hidden_states(kind):
    assert set(assert_right(kind(), "all").values()) == {"layerwise"}


@pytest.mark.parametrize(
    ("kind", "place"),
    [(StreamsFirst, Place(1, 2, 4)), (StreamsInside, Place(0, 1, 4)), (PositionsFirst, Place(1, 0, 3))],
)
def test_outputs_of_other_shapes(kind, place):
    """The oracle adds one vector to everything the module returns."""
    model = kind()
    assert layers_of(model).places["blocks.1"] == place
    for kernel in ("auto", "loop"):
        forms = assert_right(model, ["blocks.0", "blocks.3"], kernel)
        assert set(forms.values()) == {"whole" if kernel == "auto" else "loop"}
    scores = fisher_scores(model, *padded(prompts(LENGTHS), "left"), layers="blocks.1", top_k=4)
    assert scores.residual_norm["blocks.1"].shape == (3,) and scores.position_energy["blocks.1"].shape == (3, 9)


@pytest.mark.parametrize("kind", [StreamsFirst, StreamsInside, PositionsFirst])
def test_the_linearised_network_of_outputs_of_other_shapes(kind):
    """u . J v is v . J^T u, whatever the shape."""
    model, (ids, mask) = kind(), padded(prompts(LENGTHS), "right")
    generator = torch.Generator().manual_seed(3)
    with FisherModel(model, layers="blocks.1", top_k=3).linearize(ids, mask) as network:
        u = torch.randn(3, 2, network.output.shape[-1], generator=generator, dtype=torch.float64)
        v = torch.randn(3, 2, WIDTH, generator=generator, dtype=torch.float64)
        pushed, pulled = network.pushforward(v), network.pullback(u)
    torch.testing.assert_close(
        torch.einsum("bix,bjx->bij", u, pushed), torch.einsum("bid,bjd->bij", pulled, v), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("lengths", [(3, 3, 3), (4, 2, 3), (3, 1, 3), (3,), (3, 2)], ids=str)
def test_several_streams_and_as_many_prompts_or_tokens(lengths):
    """A batch of three prompts, or of three tokens, must not be taken for the three streams."""
    for kind in (StreamsFirst, StreamsInside):
        model, rows = kind(), prompts(lengths)
        scores = fisher_scores(model, *padded(rows, "left"), layers="blocks.1", top_k=4)
        for b, row in enumerate(rows):
            expected = plain_scores(model, row, "blocks.1", token_ids=scores.token_ids[b])
            assert relative(scores.gradients["blocks.1"][b], expected.gradients) < 1e-10


def test_a_place_that_is_not_clear_is_none():
    assert place_of(torch.Size((5, 7, 16)), 5, 7) == Place(0, 1, 3)
    assert place_of(torch.Size((5, 5, 7, 16)), 5, 7) is None
    assert place_of(torch.Size((35, 16)), 5, 7) is None
    assert place_of(torch.Size((5, 6, 7, 7)), 5, 7) is None
    assert place_of(torch.Size((5, 7)), 5, 7) is None
    assert place_of(torch.Size((5, 14, 16)), 5, 7) is None


def test_blocks_that_return_named_tuples():
    class NamedLM(ToyLM):
        def walk(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)[0]
            return x

    assert set(assert_right(NamedLM([Named() for _ in range(3)]), "all").values()) == {"layerwise"}


def test_a_forward_that_knows_no_cache():
    model, rows = WithoutCache(), prompts(LENGTHS)
    scores = fisher_scores(model, *padded(rows, "left"), layers=1, top_k=4)
    for b, row in enumerate(rows):
        expected = plain_scores(ToyLM(), row, "blocks.1", token_ids=scores.token_ids[b])
        assert relative(scores.gradients["blocks.1"][b], expected.gradients) < 1e-10


# Names, numbers and refusals.


@pytest.mark.parametrize(
    "layers",
    [
        "model.embed_tokens",
        "model.layers.3.mlp",
        "model.layers.0.self_attn",
        "model.layers.1.mlp.down_proj",
        "model.norm",
    ],
)
def test_any_module_with_a_row_for_each_token(layers):
    assert assert_right(tiny("llama"), layers, tolerance=1e-6) == {layers: "whole"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_everything_that_is_listed_can_be_hooked(family):
    model, rows = tiny(family), prompts((5, 2))
    stack = next(iter(decoder_blocks(model))).rpartition(".")[0]
    names = [n for n in layers_of(model).places if not n.startswith(stack) or n.startswith(f"{stack}.2")]
    assert len(names) > 10
    scores = fisher_scores(model, *padded(rows, "left"), layers=names, top_k=2)
    for name in names:
        for b, row in enumerate(rows):
            expected = plain_scores(model, row, name, token_ids=scores.token_ids[b])
            assert relative(scores.gradients[name][b], expected.gradients) < 1e-6, name


def test_numbers_names_lists_and_all():
    model = tiny("llama")
    names = [f"model.layers.{i}" for i in range(BLOCKS)]
    assert resolve_layers(model, "all") == names
    assert resolve_layers(model, -1) == resolve_layers(model, "3") == [names[3]]
    assert resolve_layers(model, ["model.embed_tokens", 0, "-2"]) == ["model.embed_tokens", names[0], names[2]]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("model.layers.9", "no module named 'model.layers.9'; the nearest is 'model.layers.[0-3]'"),
        ("model.layer.3.mlp", r"the nearest is 'model\.layers\.3\.mlp'"),
        ("model.layers", r"model\.layers \(ModuleList\) is never called"),
        ("model", r"model \(LlamaModel\) returns BaseModelOutputWithPast"),
        (
            "model.rotary_emb",
            r"model\.rotary_emb \(LlamaRotaryEmbedding\) returns \(1, 7, 6\) for 5 prompts",
        ),
    ],
)
def test_what_can_be_hooked_is_listed(wanted, said):
    with pytest.raises(ValueError, match=said) as caught:
        resolve_layers(tiny("llama"), wanted)
    message = str(caught.value)
    listed = re.search(r"what can be hooked: (.*) \(N from 0 to 3\)", message)
    assert listed is not None and "\n" not in message
    for name in (
        "model.embed_tokens",
        "model.norm",
        "model.layers.N",
        "model.layers.N.mlp",
        "model.layers.N.self_attn",
    ):
        assert name in listed[1].split(", ")
    assert listed[1].startswith("model.layers.N, ") and listed[1].endswith("lm_head")


def masked_lm() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, intermediate_size=58
    )
    return BertForMaskedLM(config).eval()


def bidirectional_bert() -> nn.Module:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=6, intermediate_size=58
    )
    return BertLMHeadModel(config).eval()


def encoder_decoder() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, num_layers=2, num_heads=6, d_kv=6, d_ff=58)
    return T5ForConditionalGeneration(config).eval()


def without_head() -> nn.Module:
    return fresh("llama").model


def frozen_and_looking_ahead() -> nn.Module:
    model = ToyLM([ToyBlock(), LooksAhead(), ToyBlock()])
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (masked_lm, "BertForMaskedLM sees later tokens"),
        (bidirectional_bert, "BertLMHeadModel sees later tokens"),
        (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder"),
        (without_head, r"LlamaModel returns no logits .*AutoModelForCausalLM"),
        (frozen_and_looking_ahead, "ToyLM sees later tokens"),
    ],
)
def test_what_is_no_causal_lm_is_refused_in_one_line(build, said):
    model = build()
    for refuse in (
        lambda: fisher_scores(model, torch.arange(6)[None], layers=0),
        lambda: FisherModel(model, layers="all"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            refuse()
        assert "\n" not in str(caught.value) and "expected" in str(caught.value)


def test_what_a_model_without_input_embeddings_sees_ahead_is_told_by_its_logits():
    assert not hasattr(ToyLM(), "get_input_embeddings")
    model = ToyLM([ToyBlock(), LooksAhead(), ToyBlock()])
    with torch.no_grad():
        model.blocks[1].norm1.weight.mul_(2)
    with pytest.raises(ValueError, match="sees later tokens"):
        resolve_layers(model, 0)


def test_looking_leaves_the_model_as_it_was():
    model = fresh("llama").train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    layers_of(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
