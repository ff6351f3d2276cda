"""Whole blocks pulled back by hand, against plain autograd in float64 of each prompt alone."""

import copy
from dataclasses import replace

import pytest
import torch
from devices import on_cpu, placed
from models import block, fresh, padded, prompts, tiny
from oracles import in_float64, plain_scores, relative

from fisher_vmap.fisher import fisher_scores
from fisher_vmap.kernels import autograd, compose, decoder_block
from fisher_vmap.kernels.parts import Seen
from fisher_vmap.linearize import block as block_module
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import layout
from fisher_vmap.model.recording import BlockCall

LENGTHS = (5, 1, 9, 14)
OPEN_WINDOW = {"sliding_window": None}
COMPOSED = (
    "llama", "qwen3", "olmo2", "phi3", "gemma2", "gemma3", "gpt_oss", "gpt2", "gpt_neox", "phi", "cohere", "granite",
    "glm", "mixtral", "qwen3_moe", "granitemoe", "mistral",
)  # fmt: skip


def eager_experts(model):
    """A mixture whose experts run one after another, which torch can do in every format."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def worst(model, exact, layers, rows, **choices) -> float:
    device = next(model.parameters()).device
    ids, mask = placed(padded(rows, "left", extra=2), device)
    scores = on_cpu(fisher_scores(model, ids, mask, layers=layers, **choices))
    return max(
        relative(scores.gradients[layer][b], plain_scores(exact, row, layer, token_ids=scores.token_ids[b]).gradients)
        for layer in scores.gradients
        for b, row in enumerate(rows)
    )


def rules_of(model) -> int:
    return len(known_of(model).parts.rules)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("mistral", OPEN_WINDOW)])
def test_every_block_and_every_hook(family, changes, device):
    model, exact = placed(tiny(family, torch.float32, **changes), device), tiny(family, **changes)
    assert worst(model, exact, "all", prompts(LENGTHS), top_k=4) < 5e-6
    assert rules_of(model) == 4
    for layer in (0, 2):  # alone: what arrives at a hooked block is not touched by what goes further down
        assert worst(model, exact, [layer], prompts(LENGTHS), top_k=4) < 5e-6


@pytest.mark.parametrize("alone_from", [1, None])
@pytest.mark.parametrize("family", COMPOSED)
def test_blocks_of_every_make_are_put_together_from_parts(monkeypatch, family, alone_from):
    """In float64 throughout, to the last digits: no part is left to autograd, and none is a little off."""
    monkeypatch.setattr(layout, "ALONE_FROM", {} if alone_from is None else {"cpu": alone_from})
    with in_float64():
        model = eager_experts(fresh(family))
        assert worst(model, model, "all", prompts(LENGTHS), top_k=4) < 1e-10
        rules = known_of(model).parts.rules
    assert len(rules) == 4
    assert all(not rule.by_autograd() for rule in rules.values())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox", "granite", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_formats_find_the_same_parts(family, dtype):
    """What is equal to the bit, or up to rounding, is so in every format; the results are within its noise.

    Mixtures are left out: in bfloat16 a token may get other experts.
    """
    model, exact = eager_experts(fresh(family, dtype)), eager_experts(fresh(family, dtype).float())
    assert worst(model, exact, [0], prompts(LENGTHS), top_k=2) < (2e-5 if dtype == torch.float32 else 0.1)
    rules = known_of(model).parts.rules
    assert len(rules) == 4
    assert all(not rule.by_autograd() for rule in rules.values())


def test_a_part_without_a_rule_is_left_to_autograd_alone(device):
    """HunYuan norms its queries after their rotation: its MLPs go by rule, and the reason is told."""
    model, exact = placed(fresh("hunyuan", torch.float32), device), fresh("hunyuan")
    assert worst(model, exact, [0, 2], prompts(LENGTHS), top_k=4) < 5e-6
    why = {"self_attn": "how its queries are made was not found"}
    assert [rule.by_autograd() for rule in known_of(model).parts.rules.values()] == [why] * 4
    told = known_of(model).ran(block("hunyuan", 0), "auto")
    assert told is not None
    assert told["rules"].endswith("; in 2 of them self_attn by autograd: how its queries are made was not found")


def test_projections_with_equal_weights_are_told_apart():
    model = fresh("qwen3", torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.v_proj.weight)
            layer.self_attn.q_proj.weight[: len(layer.self_attn.k_proj.weight)] = layer.self_attn.k_proj.weight
    assert worst(model, copy.deepcopy(model).double(), [0], prompts(LENGTHS), top_k=4) < 5e-6
    assert [rule.by_autograd() for rule in known_of(model).parts.rules.values()] == [{}] * 4


def swapped_columns(rule):
    return replace(rule, v=rule.q)  # the columns of the queries where those of the values belong


@pytest.mark.parametrize("fault", [swapped_columns])
def test_a_part_whose_pullback_is_not_its_own_is_left_to_autograd(monkeypatch, fault):
    found = compose.find_attention
    monkeypatch.setattr(compose, "find_attention", lambda *inputs: fault(found(*inputs)))
    model, exact = fresh("gpt2", torch.float32), fresh("gpt2")
    assert worst(model, exact, [0], prompts(LENGTHS), top_k=3) < 5e-6
    for rule in known_of(model).parts.rules.values():
        assert "away from autograd's" in rule.by_autograd()["attn"]


@pytest.mark.parametrize("room", [0, 10**9])
def test_the_same_whether_forwards_are_kept_or_run_again(monkeypatch, room, device):
    monkeypatch.setitem(decoder_block.KEPT_BYTES, device.type, room)
    monkeypatch.setattr(decoder_block, "KEPT_SHARE_OF_GPU", 1 / 8 if room else 0)
    assert worst(placed(tiny("llama", torch.float32), device), tiny("llama"), [0, 2], prompts(LENGTHS), top_k=4) < 5e-6


def test_nothing_is_kept_where_it_would_serve_less_than_half_of_the_blocks(monkeypatch):
    """Hooked at block 0, blocks 1 and 2 are pulled back by rule, and run once more if nothing of them was kept."""
    again, sizes = [], []
    seen_again, size_of = block_module.seen_again, Seen.bytes
    monkeypatch.setattr(block_module, "seen_again", lambda *inputs: again.append(1) or seen_again(*inputs))
    monkeypatch.setattr(Seen, "bytes", lambda self: sizes.append(size_of(self)) or sizes[-1])
    model, batch = tiny("llama", torch.float32), padded(prompts(LENGTHS), "right")
    fisher_scores(model, *batch, layers=0, top_k=10)
    for of_one, runs in ((2, 0), (1, 1), (0.9, 2), (0, 2)):
        monkeypatch.setitem(decoder_block.KEPT_BYTES, "cpu", int(of_one * sizes[0]))
        again.clear()
        fisher_scores(model, *batch, layers=0, top_k=10)
        assert len(again) == runs


@pytest.mark.parametrize("lengths", [LENGTHS, (7, 7, 7), (12, 13, 2, 14, 13, 3), (9,)])
@pytest.mark.parametrize("alone_from", [1, 13, None])
def test_prompts_attend_alone_or_in_groups(monkeypatch, lengths, alone_from, device):
    """`None` is a GPU's choice. A group is padded, and its prompts need not be neighbours."""
    monkeypatch.setattr(layout, "ALONE_FROM", {} if alone_from is None else {device.type: alone_from})
    model, exact = placed(tiny("llama", torch.float32), device), tiny("llama")
    assert worst(model, exact, [0, 2], prompts(lengths), top_k=4) < 5e-6
    assert rules_of(model) == 4


@pytest.mark.parametrize("alone_from", [1, None])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_stretches_of_any_size(monkeypatch, rows, alone_from, device):
    monkeypatch.setattr(layout, "ALONE_FROM", {} if alone_from is None else {device.type: alone_from})
    monkeypatch.setitem(autograd.ELEMENTS_IN_CACHE, device.type, 1)
    monkeypatch.setattr(autograd, "LEAST_ROWS", rows)
    assert worst(placed(tiny("llama", torch.float32), device), tiny("llama"), [0], prompts(LENGTHS), top_k=3) < 5e-6


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7])
def test_chunks_of_cotangents(chunk_size, device):
    model = placed(tiny("llama", torch.float32), device)
    assert worst(model, tiny("llama"), [0], prompts(LENGTHS), top_k=5, chunk_size=chunk_size) < 5e-6


def test_stretches_end_where_they_may_and_leave_nothing_out(monkeypatch):
    monkeypatch.setitem(autograd.ELEMENTS_IN_CACHE, "cpu", 20 * 8)
    monkeypatch.setattr(autograd, "LEAST_ROWS", 3)
    cpu = torch.device("cpu")
    assert list(autograd.stretches([3, 4, 10, 11], 4, 8, cpu)) == [(0, 4), (4, 10), (10, 11)]
    assert list(autograd.stretches([9], 4, 8, cpu)) == [(0, 9)]
    assert list(autograd.stretches(range(1, 12), 4, 8, cpu)) == [(0, 5), (5, 10), (10, 11)]


def test_scratch_is_used_again_and_grows():
    memory, like = autograd.Scratch(), torch.zeros(1)
    first = memory("a", (2, 3), like)
    assert memory("a", (3, 2), like).data_ptr() == first.data_ptr()
    assert memory("b", (2, 3), like).data_ptr() != first.data_ptr()
    assert memory("a", (4, 5), like).shape == (4, 5)
    assert memory("a", (2,), like.double()).dtype == torch.float64


def hooked(model) -> None:
    model.get_submodule(block("llama", 1) + ".mlp").register_forward_hook(lambda _m, _a, output: 1.1 * output)


def hooked_below(model) -> None:
    target = model.get_submodule(block("llama", 1))
    target.register_forward_pre_hook(lambda _m, args: (0.9 * args[0], *args[1:]))


def hooked_above(model) -> None:
    model.get_submodule(block("llama", 1)).register_forward_hook(lambda _m, _a, output: 1.1 * output)


def scaled_residual(model) -> None:
    target = model.get_submodule(block("llama", 1))
    own = type(target).forward
    target.__class__ = type("Other", (type(target),), {"forward": lambda self, x, **kw: own(self, 0.9 * x, **kw)})


def other_norm(model) -> None:
    target = model.get_submodule(block("llama", 1))
    norm = target.post_attention_layernorm
    norm.__class__ = type("Other", (type(norm),), {"forward": lambda self, x: 1.5 * super(type(self), self).forward(x)})


def swapped_norms(model) -> None:
    """The block uses its norms the other way round from the order in which it holds them."""
    target = model.get_submodule(block("llama", 1))
    first, second = target.input_layernorm, target.post_attention_layernorm
    del target.input_layernorm, target.post_attention_layernorm
    target.post_attention_layernorm, target.input_layernorm = second, first


@pytest.mark.parametrize(
    ("change", "rules"),
    [(hooked, 3), (hooked_below, 3), (hooked_above, 3), (scaled_residual, 3), (other_norm, 3), (swapped_norms, 4)],
)
def test_a_block_that_does_something_else_is_left_to_autograd(change, rules):
    """How norms are used is found by values; the order in which a block holds them does not matter."""
    model, exact = fresh("llama", torch.float32), fresh("llama")
    change(model), change(exact)
    assert worst(model, exact, [0], prompts(LENGTHS), top_k=3) < 5e-6
    assert rules_of(model) == rules


def test_a_hook_added_later_is_seen():
    model, exact = fresh("llama", torch.float32), fresh("llama")
    worst(model, exact, [0], prompts(LENGTHS), top_k=3)
    hooked(model), hooked(exact)
    assert worst(model, exact, [0], prompts(LENGTHS), top_k=3) < 5e-6


def test_the_blocks_are_as_before_afterwards():
    model = fresh("llama", torch.float32)
    fisher_scores(model, torch.arange(12).view(2, 6), layers=0, top_k=2)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_wrong_rule_is_seen_next_to_a_large_stream():
    """A factor on the residual step, in bfloat16, where the stream is so large that the step hardly shows in it."""
    model = fresh("granite", torch.bfloat16, residual_multiplier=0.9)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)
    for layer in model.model.layers:
        layer.residual_multiplier = torch.tensor(0.9)  # not among the block's numbers
    fisher_scores(model, torch.arange(12).view(2, 6), layers=0, top_k=2)
    assert rules_of(model) == 0


def test_bfloat16_blocks_follow_their_rules_to_the_bit(device):
    model = placed(tiny("llama", torch.bfloat16), device)
    fisher_scores(model, torch.arange(12, device=device).view(2, 6), layers=0, top_k=2)
    assert rules_of(model) == 4


def test_what_a_block_computed_must_be_what_went_on(monkeypatch):
    model, exact = fresh("llama", torch.float32), fresh("llama")
    monkeypatch.setitem(decoder_block.KEPT_BYTES, "cpu", 0)
    worst(model, exact, [0], prompts(LENGTHS), top_k=3, kernel="layerwise")
    own = BlockCall.replay
    monkeypatch.setattr(BlockCall, "replay", lambda self, hidden: 1.01 * own(self, hidden))
    with pytest.raises(ValueError, match=r"broke off: what model\.layers"):
        fisher_scores(model, *padded(prompts(LENGTHS), "left"), layers=[0], top_k=3, kernel="layerwise")


def test_an_error_on_the_way_leaves_no_module_changed(monkeypatch):
    model = fresh("llama", torch.float32)
    fisher_scores(model, torch.arange(12).view(2, 6), layers=[0], top_k=2)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fisher_vmap.linearize.linear_map.sum_positions", fail)
    with pytest.raises(KeyboardInterrupt) as held:
        fisher_scores(model, torch.arange(12).view(2, 6), layers=[0], top_k=2)
    assert not any("forward" in vars(module) for module in model.modules())
    assert held.value is not None  # and its traceback, whose frames are alive
