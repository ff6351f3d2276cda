"""Mixtures of experts: pulled back against plain autograd, and told from what is none."""

import copy
from functools import cache

import pytest
import torch
import transformers
from devices import placed
from fused_cases import draw
from models import draw as draw_weights
from oracles import relative
from part_cases import InFloat64, by_autograd, pulled
from torch import Tensor, nn

from fisher_vmap.kernels.experts import mixture_of

D, N, K, E = 36, 9, 4, 6
_SIZES = {
    "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 11,
    "intermediate_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_QWEN = {**_SIZES, "num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 22, "decoder_sparse_step": 1}
_GROUPED = {
    **_SIZES, "n_routed_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 22, "n_group": 3,
    "topk_group": 2, "first_k_dense_replace": 0, "n_shared_experts": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_LOCAL = {**_SIZES, "num_local_experts": E, "num_experts_per_tok": 2}

# Config class, its arguments, the mixture's name.
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeConfig", {**_QWEN, "norm_topk_prob": True}, "model.layers.0.mlp"),
    "mixtral": ("MixtralConfig", _LOCAL, "model.layers.0.mlp"),
    "granitemoe": ("GraniteMoeConfig", _LOCAL, "model.layers.0.block_sparse_moe"),
    "olmoe": ("OlmoeConfig", {**_SIZES, "num_experts": E, "num_experts_per_tok": 3}, "model.layers.0.mlp"),
    "gpt_oss": ("GptOssConfig", {**_LOCAL, "head_dim": 18}, "model.layers.0.mlp"),
    "qwen2_moe": ("Qwen2MoeConfig", {**_QWEN, "shared_expert_intermediate_size": 20}, "model.layers.0.mlp"),
    "granitemoeshared": (
        "GraniteMoeSharedConfig", {**_LOCAL, "shared_intermediate_size": 20}, "model.layers.0.block_sparse_moe",
    ),
    "deepseek_v3": ("DeepseekV3Config", {**_GROUPED, **_LATENT}, "model.layers.0.mlp"),
    "glm4_moe": ("Glm4MoeConfig", {**_GROUPED, "head_dim": 18}, "model.layers.0.mlp"),
    "minimax_m2": ("MiniMaxM2Config", {**_LOCAL, "head_dim": 18}, "model.layers.0.mlp"),  # its router has an argument
    "afmoe": (
        "AfmoeConfig", {**_QWEN, "num_dense_layers": 0, "num_shared_experts": 1, "head_dim": 18}, "model.layers.0.mlp",
    ),
    "aria": ("AriaTextConfig", {**_SIZES, "moe_num_experts": E, "moe_topk": 2}, "model.layers.0.mlp"),
}  # fmt: skip


@cache
def mixture(family: str) -> nn.Module:
    """The mixture of a tiny model, in float64, shared by all tests: one that changes it takes a copy."""
    config_class, arguments, name = FAMILIES[family]
    config = getattr(transformers, config_class)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return draw_weights(model, 0).double().get_submodule(name)


def case(family: str, device: torch.device, rows: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    return placed((mixture(family), draw(1, rows, D), draw(rows, K, D, seed=1)), device)


def numbers_in(module: nn.Module, x: Tensor) -> Tensor:
    """Each token's experts."""
    part = mixture_of(module)
    with torch.no_grad():
        return part.router.call(module, x[0])[1]


@pytest.mark.parametrize("ends", [[], [4, 5]])
@pytest.mark.parametrize("family", FAMILIES)
def test_pullbacks_from_the_forward(family, ends, device):
    module, x, G = case(family, device)
    part = mixture_of(module)
    with InFloat64():  # most routers compute in float32
        found, expected = pulled(part, module, x, G, ends), by_autograd(module, x, G)
    assert relative(found, expected) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_the_derivative_of_the_routing_weights_counts(family, device, monkeypatch):
    module, x, G = case(family, device)
    part = mixture_of(module)
    expected = by_autograd(module, x, G)
    assert relative(pulled(part, module, x, G, []), expected) < 1e-6
    rows = type(part)._router_rows
    monkeypatch.setattr(type(part), "_router_rows", lambda *args: torch.zeros_like(rows(*args)))
    assert relative(pulled(part, module, x, G, []), expected) > 1e-2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_with_no_token_with_one_and_with_all(family, device):
    module, x, G = case(family, device)
    counts = numbers_in(module, x[:, :2]).flatten().bincount(minlength=E)
    assert {0, 1} <= set(counts.tolist())
    part = mixture_of(module)
    with InFloat64():
        assert relative(pulled(part, module, x[:, :2], G[:2], []), by_autograd(module, x[:, :2], G[:2])) < 1e-12
        same = x[:, :1] + 1e-3 * x  # all tokens nearly alike
        chosen = numbers_in(module, same).sort(-1).values
        assert (chosen == chosen[0]).all()
        assert relative(pulled(part, module, same, G, [1]), by_autograd(module, same, G)) < 1e-12


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe"])
def test_bfloat16_is_no_further_from_the_truth_than_autograd(family, device):
    module, x, G = case(family, device)
    module, x, G = copy.deepcopy(module).bfloat16(), x.bfloat16(), G.bfloat16()
    wide = copy.deepcopy(module).double()
    same = (numbers_in(module, x) == numbers_in(wide, x.double())).all(-1)  # tokens that rounding sends elsewhere
    assert same.float().mean() > 0.5
    truth = by_autograd(wide, x.double(), G.double())[same]
    own, plain = pulled(mixture_of(module), module, x, G, [4])[same], by_autograd(module, x, G)[same]
    assert own.dtype == torch.bfloat16
    assert relative(own, truth) < 1.2 * relative(plain, truth) < 0.05


def test_a_mixture_keeps_its_experts_implementation():
    module = mixture("qwen3_moe")
    before = module.experts.config._experts_implementation
    assert mixture_of(module) is not None
    assert module.experts.config._experts_implementation == before


def changed(family: str, change) -> nn.Module:
    """A mixture whose forward does more."""
    module = copy.deepcopy(mixture(family))
    own = type(module)
    module.__class__ = type("Changed", (own,), {"forward": lambda self, x: change(self, x, own.forward)})
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda self, x, forward: forward(self, 2 * x),
        lambda self, x, forward: 2 * forward(self, x),
        lambda self, x, forward: forward(self, x) + x,
        lambda self, x, forward: forward(self, x) + forward(self, x),
    ],
)
def test_what_does_more_is_refused(change):
    assert mixture_of(mixture("qwen3_moe")) is not None
    assert mixture_of(changed("qwen3_moe", lambda self, x, forward: forward(self, x))) is not None
    assert mixture_of(changed("qwen3_moe", change)) is None


def test_a_scale_that_the_module_holds_is_followed(device):
    module = changed("qwen3_moe", lambda self, x, forward: self.scale * forward(self, x))
    module.scale = 1.5
    _, x, G = case("qwen3_moe", device)
    module = placed(module, device)
    part = mixture_of(module)
    assert part.scale == 1.5
    with InFloat64():
        assert relative(pulled(part, module, x, G, []), by_autograd(module, x, G)) < 1e-12


def test_a_router_that_looks_at_other_tokens_is_refused():
    module = copy.deepcopy(mixture("qwen3_moe"))
    own = type(module.gate)
    module.gate.__class__ = type("Mean", (own,), {"forward": lambda self, x: own.forward(self, x - x.mean(0))})
    assert mixture_of(module) is None


def test_noise_in_training_is_refused():
    module = copy.deepcopy(mixture("mixtral"))
    module.jitter_noise = 0.1
    assert mixture_of(module) is not None
    assert mixture_of(module.train()) is None


@pytest.mark.parametrize("where", ["", "gate", "experts"])
def test_hooks_and_replaced_forwards_are_refused(where):
    module = copy.deepcopy(mixture("qwen3_moe"))
    inner = module.get_submodule(where)
    handle = inner.register_forward_hook(lambda *_: None)
    assert mixture_of(module) is None
    handle.remove()
    assert mixture_of(module) is not None
    inner.forward = inner.forward
    assert mixture_of(module) is None


def test_an_mlp_is_no_mixture():
    assert mixture_of(mixture("deepseek_v3").shared_experts) is None
