"""Models in the wrappers of other libraries: the scores are those of the model inside, under either's names."""

import copy

import pytest
import torch
from command_cases import tiny_tokenizer
from models import VOCABULARY, padded, prompts
from oracles import plain_scores, relative
from source_cases import base
from torch import nn

from fisher_vmap import FisherModel, fisher_scores
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model.wrappers import names_inside, tokenizer_of, unwrapped

LAYERS = ["model.layers.0", "model.layers.2"]


def compare(wrapped, oracle, layers=LAYERS, names=None, budget=2e-4):
    """Scores through the wrapper against plain autograd on an ordinary model."""
    rows = prompts((5, 9, 3), vocabulary=VOCABULARY)
    ids, mask = padded(rows, "left")
    scores = fisher_scores(wrapped, ids, mask, layers=layers, top_k=3)
    assert list(scores.gradients) == (names or layers)
    for layer in scores.gradients:
        for b, row in enumerate(rows):
            plain = plain_scores(oracle, row, layer, token_ids=scores.token_ids[b])
            assert relative(scores.gradients[layer][b], plain.gradients) < budget


# PEFT


def lora(seed=0, **options):
    import peft

    torch.manual_seed(seed)
    targets = options.pop("targets", ["q_proj", "up_proj"])
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(base(), config)


def by_hand(model, *names):
    """The base with the products of the adapters of these names added, whatever peft does."""
    merged, layers = base(), dict(model.get_base_model().named_modules())
    for name, layer in layers.items():
        if hasattr(layer, "lora_A"):
            for adapter in [name for name in names if name in layer.lora_A]:
                product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
                merged.get_submodule(name).weight.data += product.detach()
    return merged


@pytest.mark.needs("peft")
def test_a_peft_model_is_its_base_with_the_active_adapter():
    model = lora()
    compare(model, by_hand(model, "default"))
    assert {choice.form for choice in known_of(model.get_base_model()).forms.values()} == {"packed"}


@pytest.mark.needs("peft")
def test_the_adapter_that_is_active_now_counts():
    import peft

    model = lora()
    torch.manual_seed(5)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    compare(model, by_hand(model, "default"))
    model.set_adapter("other")
    compare(model, by_hand(model, "other"))
    with model.disable_adapter():
        compare(model, base())
    model.base_model.set_adapter(["default", "other"])
    compare(model, by_hand(model, "default", "other"))
    merged = by_hand(model, "other")
    model.set_adapter("other")
    model.merge_adapter()
    compare(model, merged)


@pytest.mark.needs("peft")
def test_an_adapter_on_the_unembedding_and_a_trained_copy_of_it():
    model = lora(targets=["q_proj", "lm_head"])
    compare(model, by_hand(model, "default"))
    model = lora(modules_to_save=["lm_head"])
    oracle = by_hand(model, "default")
    trained = model.get_base_model().lm_head.modules_to_save["default"].weight
    trained.data *= 1.5
    oracle.lm_head.weight.data = trained.detach().clone()
    compare(model, oracle)


@pytest.mark.needs("peft")
def test_dropout_of_an_adapter_is_off_and_its_mode_is_left_alone():
    model = lora(lora_dropout=0.5).train()
    compare(model, by_hand(model, "default"))
    assert all(module.training for module in model.modules())


@pytest.mark.needs("peft")
def test_layers_may_have_the_names_of_the_peft_model():
    model = lora()
    compare(
        model, by_hand(model, "default"), ["base_model.model.model.layers.2", 0], ["model.layers.2", "model.layers.0"]
    )
    assert FisherModel(model, layers="base_model.model.model.layers.1").layers == ["model.layers.1"]


@pytest.mark.needs("peft", "torchao")
def test_an_adapter_on_quantised_weights():
    """QLoRA, in small: the adapter stays beside layers that have no backward of their own."""
    import peft
    import torchao.quantization as torchao

    torch.manual_seed(0)
    model, oracle = base(), base()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda m, n: n.endswith("up_proj"))
    for layer, plain in zip(model.model.layers, oracle.model.layers, strict=True):
        plain.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.dequantize().detach()
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    for layer, plain in zip(adapted.get_base_model().model.layers, oracle.model.layers, strict=True):
        q = layer.self_attn.q_proj
        product = q.lora_B["default"].weight @ q.lora_A["default"].weight * q.scaling["default"]
        plain.self_attn.q_proj.weight.data += product.detach()
    compare(adapted, oracle)


@pytest.mark.needs("peft")
@pytest.mark.parametrize("kind", ["prompt", "prefix", "alora"])
def test_adapters_that_are_not_in_the_modules_are_refused_in_one_line(kind):
    import peft

    common = {"task_type": "CAUSAL_LM"}
    config, words = {
        "prompt": (peft.PromptTuningConfig(num_virtual_tokens=2, **common), "virtual tokens"),
        "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=2, **common), "virtual tokens"),
        "alora": (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], **common), "activated LoRA"),
    }[kind]
    model = peft.get_peft_model(base(), config)
    with pytest.raises(ValueError, match=words):
        fisher_scores(model, torch.arange(5)[None], layers=0)
    with pytest.raises(ValueError, match=words):
        FisherModel(model, layers=0)


# nnsight and TransformerLens: in small, by the attributes that they document, and real where they are installed


def stand_in(package, name, bases=(object,), **members):
    kind = type(name, bases, members)
    kind.__module__ = f"{package}.modeling"
    return kind


def test_nnsights_language_model_in_small():
    model, tokenizer = base(), tiny_tokenizer()
    kind = stand_in("nnsight", "LanguageModel")
    wrapped = kind()
    wrapped.__dict__.update(_module=model, tokenizer=tokenizer)
    compare(wrapped, base())
    assert FisherModel(wrapped, layers=1).tokenizer is tokenizer and unwrapped(wrapped) is model


def test_a_transformer_bridge_in_small():
    model = base()

    class Bridge(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__["original_model"] = model
            self.blocks = nn.ModuleList(model.model.layers)
            self.tokenizer = "its tokenizer"

    Bridge.__module__ = "transformer_lens.model_bridge"
    bridge = Bridge()
    assert unwrapped(bridge) is model and tokenizer_of(bridge) == "its tokenizer"
    compare(bridge, base(), ["blocks.2", "model.layers.0"], ["model.layers.2", "model.layers.0"])
    assert names_inside(bridge, model, "all") == "all" and names_inside(bridge, model, 3) == 3


@pytest.mark.needs("peft")
def test_wrappers_of_wrappers_and_of_torch():
    oracle = by_hand(lora(), "default")
    compare(nn.DataParallel(lora()), oracle)
    assert isinstance(unwrapped(torch.compile(lora(), backend="eager")), type(base()))


def test_what_is_no_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="a str; expected a causal LM"):
        fisher_scores("gpt2", torch.arange(5)[None], layers=0)
    hooked = stand_in("transformer_lens", "HookedTransformer", (nn.Module,))()
    with pytest.raises(ValueError, match=r"HookedTransformer.*TransformerBridge"):
        fisher_scores(hooked, torch.arange(5)[None], layers=0)
    with torch.device("meta"):
        empty = type(base())(base().config)
    with pytest.raises(ValueError, match=r"not loaded.*dispatch=True"):
        fisher_scores(empty, torch.arange(5)[None], layers=0)


@pytest.mark.needs("nnsight")
def test_nnsight_itself():
    import nnsight

    wrapped = nnsight.LanguageModel(base(), tokenizer=tiny_tokenizer())
    compare(wrapped, base())
    assert FisherModel(wrapped, layers=1).tokenizer is wrapped.tokenizer
    with wrapped.trace("hello"):
        after = wrapped.model.layers[1].output.save()
    assert after is not None  # it works as before


@pytest.mark.needs("transformer_lens")
def test_the_transformer_bridge_itself():
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=copy.deepcopy(base()), tokenizer=tiny_tokenizer(), dtype=torch.float32
    )
    compare(bridge, base(), ["blocks.2", "blocks.0"], ["model.layers.2", "model.layers.0"])
    logits = bridge(torch.arange(6)[None])
    torch.testing.assert_close(logits, base()(torch.arange(6)[None]).logits, rtol=1e-4, atol=1e-4)
