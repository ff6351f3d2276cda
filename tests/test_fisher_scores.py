"""`fisher_scores` against plain autograd, one prompt at a time, unpadded, in float64."""

import gc
import weakref
from typing import Any

import pytest
import torch
from devices import on
from models import BLOCKS, VOCABULARY, block, fresh, padded, prompts, tiny
from oracles import fisher_matrix, plain_scores, position_scores, relative
from torch import Tensor, nn
from toys import ToyLM

from fisher_vmap import fisher_scores
from fisher_vmap.linearize.probe import known_of

KERNELS = ("auto", "layerwise", "whole", "loop")
LENGTHS = (7, 1, 12, 3)  # the shortest and the longest are neither first nor last
# gpt2, gpt_neox and opt are float64 throughout; the others compute their norms in float32 even then.
TOLERANCE = {"gpt2": 1e-12, "gpt_neox": 1e-12, "opt": 1e-12, "llama": 1e-6, "mistral": 1e-6, "gemma2": 1e-6}


def assert_agrees(scores, model, rows, layer, tolerance, **choices) -> None:
    """Every prompt of the batch, with the same tokens in the same order, against the oracle."""
    for b, row in enumerate(rows):
        own = {key: value[b] for key, value in choices.items()}
        expected = plain_scores(model, row, layer, **({"top_k": scores.token_ids.shape[1]} | own))
        assert torch.equal(scores.token_ids[b], expected.token_ids)
        torch.testing.assert_close(scores.log_probs[b], expected.log_probs, atol=tolerance, rtol=0)
        assert relative(scores.gradients[layer][b], expected.gradients) < tolerance


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("number", [0, 2, BLOCKS - 1])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_form_agrees_with_plain_autograd(family, kernel, number, side, device):
    model, rows, layer = tiny(family), prompts(LENGTHS), block(family, number)
    scores = on(device, fisher_scores)(model, *padded(rows, side, extra=2), layers=layer, top_k=5, kernel=kernel)
    assert scores.gradients[layer].dtype == scores.log_probs.dtype == torch.float64
    assert_agrees(scores, model, rows, layer, TOLERANCE[family])


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "mistral", "gemma2"])
def test_parallel_blocks_learned_positions_windows_and_soft_caps(family, device):
    model, rows, layer = tiny(family), prompts(LENGTHS), block(family, 1)
    scores = on(device, fisher_scores)(model, *padded(rows, "left"), layers=layer, top_k=5)
    assert_agrees(scores, model, rows, layer, TOLERANCE[family])


def test_float32_fisher_matrices_are_within_1e_4_of_float64_autograd(device):
    rows, layer = prompts(LENGTHS, seed=3), block("llama", 0)
    scores = on(device, fisher_scores)(tiny("llama", torch.float32), *padded(rows, "right"), layers=layer, top_k=10)
    assert scores.gradients[layer].dtype == torch.float32
    for b, row in enumerate(rows):
        expected = plain_scores(tiny("llama"), row, layer, token_ids=scores.token_ids[b])
        factor = scores.factor()[b].double()
        assert relative(factor.T @ factor, expected.fisher) < 1e-4


@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_prompt_does_not_depend_on_its_neighbours(family, kernel, device):
    model, layer = tiny(family, torch.float32), block(family, 1)
    rows = prompts((7, 2, 15, 9, 1))
    together = on(device, fisher_scores)(model, *padded(rows, "right"), layers=layer, top_k=5, kernel=kernel)
    order = [3, 0, 4, 2, 1]
    permuted = on(device, fisher_scores)(
        model, *padded([rows[b] for b in order], "left"), layers=layer, top_k=5, kernel=kernel
    )
    for b, row in enumerate(rows):
        alone = on(device, fisher_scores)(model, row[None], layers=layer, top_k=5, kernel=kernel)
        for other, at in ((together, b), (permuted, order.index(b))):
            assert torch.equal(other.token_ids[at], alone.token_ids[0])
            torch.testing.assert_close(other.log_probs[at], alone.log_probs[0], atol=1e-5, rtol=0)
            assert relative(other.gradients[layer][at], alone.gradients[layer][0]) < 5e-6


def test_a_prompt_that_is_not_finite_leaves_its_neighbours_alone(device):
    model, layer, rows = fresh("llama"), block("llama", 1), prompts((5, 8, 3), vocabulary=90)
    on(device, fisher_scores)(model, *padded(rows, "right"), layers=layer)
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = torch.nan
    spoilt = torch.cat([rows[1], torch.tensor([95])])
    scores = on(device, fisher_scores)(model, *padded([rows[0], spoilt, rows[2]], "right"), layers=layer, top_k=5)
    assert scores.gradients[layer][1].isnan().all()
    for b in (0, 2):
        expected = plain_scores(model, rows[b], layer, token_ids=scores.token_ids[b])
        assert relative(scores.gradients[layer][b], expected.gradients) < 1e-6


@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_scores_of_the_whole_vocabulary_average_to_zero(kernel, device):
    model, layer = tiny("gpt2"), block("gpt2", 1)
    ids, mask = padded(prompts(LENGTHS), "right")
    scores = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=VOCABULARY, kernel=kernel)
    p_BV = scores.log_probs.exp()
    torch.testing.assert_close(p_BV.sum(1), torch.ones_like(p_BV[:, 0]))
    average_BD = torch.einsum("bv,bvd->bd", p_BV, scores.gradients[layer])
    assert average_BD.abs().max() < 1e-12
    assert scores.gradients[layer].abs().max() > 0.1  # zero is not what every score is


@pytest.mark.parametrize("kernel", KERNELS)
def test_tokens_of_the_callers_choice_keep_their_order(kernel, device):
    model, rows, layer = tiny("gpt2"), prompts(LENGTHS), block("gpt2", 1)
    token_ids = torch.stack(prompts((4,) * len(rows), seed=5))
    scores = on(device, fisher_scores)(
        model, *padded(rows, "left"), layers=layer, top_k=9, token_ids=token_ids, kernel=kernel
    )
    assert torch.equal(scores.token_ids, token_ids)
    assert_agrees(scores, model, rows, layer, 1e-12, token_ids=token_ids)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_the_bias_is_added_where_the_positions_say(kernel, side, device):
    model, rows, layer = tiny("gpt2"), prompts((7, 4, 9)), block("gpt2", 1)
    ids, mask = padded(rows, side, extra=1)
    last = [torch.arange(len(row)) == len(row) - 1 for row in rows]
    scores = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=4, positions="last", kernel=kernel)
    assert_agrees(scores, model, rows, layer, 1e-12, where_T=last)

    some = [torch.arange(len(row)) % 3 == 1 for row in rows]
    where = torch.ones_like(ids, dtype=torch.bool)  # what it says of the padding must not matter
    where[mask == 1] = torch.cat(some)
    scores = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=4, positions=where, kernel=kernel)
    assert_agrees(scores, model, rows, layer, 1e-12, where_T=some)
    energy = scores.position_energy[layer]
    assert (energy[where & (mask == 1)] > 0).all() and (energy[~where | (mask == 0)] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_position_energy_is_that_of_a_bias_at_each_position_alone(kernel, side, device):
    model, rows, layer = tiny("gpt2"), prompts(LENGTHS), block("gpt2", 1)
    ids, mask = padded(rows, side, extra=2)
    scores = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=4, kernel=kernel)
    expected = torch.zeros(ids.shape, dtype=torch.float64)
    for b, row in enumerate(rows):
        grads_KTD = position_scores(model, row, layer, scores.token_ids[b])
        expected[b, mask[b] == 1] = torch.einsum("k,ktd->t", scores.log_probs[b].exp(), grads_KTD**2)
    torch.testing.assert_close(scores.position_energy[layer], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_residual_norm_is_the_median_over_the_prompts_own_tokens(kernel, device):
    model, rows, layer = tiny("gpt2"), prompts(LENGTHS), block("gpt2", 1)
    scores = on(device, fisher_scores)(model, *padded(rows, "left", extra=1), layers=layer, kernel=kernel)
    for b, row in enumerate(rows):
        with torch.no_grad():
            hidden = model(input_ids=row[None], output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(scores.residual_norm[layer][b], hidden.norm(dim=1).quantile(0.5))


@pytest.mark.parametrize("kernel", ["layerwise", "whole", "loop"])
def test_several_layers_at_once_are_the_single_runs(kernel, device):
    model, (ids, mask) = tiny("gpt2"), padded(prompts(LENGTHS), "left")
    names = [block("gpt2", n) for n in (2, 0, 3)]
    together = on(device, fisher_scores)(model, ids, mask, layers=names, top_k=4, kernel=kernel)
    assert list(together.gradients) == list(together.position_energy) == list(together.residual_norm) == names
    for name in names:
        alone = on(device, fisher_scores)(model, ids, mask, layers=name, top_k=4, kernel=kernel)
        assert relative(together.gradients[name], alone.gradients[name]) < 1e-13
        assert relative(together.position_energy[name], alone.position_energy[name]) < 1e-13


def test_layers_by_number_and_all_of_them():
    model, (ids, mask) = tiny("gpt2"), padded(prompts((4, 6)), "right")
    everything = fisher_scores(model, ids, mask, layers="all", top_k=3)
    assert list(everything.gradients) == [block("gpt2", n) for n in range(BLOCKS)]
    some = fisher_scores(model, ids, mask, layers=[1, "-1"], top_k=3)
    assert list(some.gradients) == [block("gpt2", 1), block("gpt2", -1)]
    assert torch.equal(some.gradients[block("gpt2", 1)], everything.gradients[block("gpt2", 1)])


@pytest.mark.parametrize("kernel", ["layerwise", "whole"])
def test_the_number_of_cotangents_at_a_time_does_not_matter(kernel, device):
    model, (ids, mask), layer = tiny("gpt2"), padded(prompts(LENGTHS), "right"), block("gpt2", 1)
    expected = on(device, fisher_scores)(model, ids, mask, layers=layer, top_k=5, kernel=kernel)
    for chunk_size in (1, 2, 3, 4, 5, 6):
        scores = on(device, fisher_scores)(
            model, ids, mask, layers=layer, top_k=5, kernel=kernel, chunk_size=chunk_size
        )
        assert relative(scores.gradients[layer], expected.gradients[layer]) < 1e-13
        assert relative(scores.position_energy[layer], expected.position_energy[layer]) < 1e-13


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("llama", "model.layers.1.mlp"),
        ("llama", "model.layers.3.self_attn"),  # returns a tuple
        ("llama", "model.embed_tokens"),
        ("llama", "model.norm"),
        ("llama", "lm_head"),
        ("gpt2", "transformer.h.2.ln_2"),
        ("gpt2", "transformer.wte"),
        ("gpt2", "transformer.ln_f"),
    ],
)
@pytest.mark.parametrize("kernel", ["auto", "loop"])
def test_modules_that_are_not_blocks(family, layer, kernel, device):
    model, rows = tiny(family), prompts(LENGTHS)
    scores = on(device, fisher_scores)(model, *padded(rows, "left"), layers=layer, top_k=4, kernel=kernel)
    assert_agrees(scores, model, rows, layer, TOLERANCE[family])


def test_a_block_and_a_module_inside_one_in_a_single_call():
    model, rows, names = tiny("gpt2"), prompts(LENGTHS), ["transformer.h.2.mlp", "transformer.h.1"]
    scores = fisher_scores(model, *padded(rows, "right"), layers=names, top_k=4)
    assert list(scores.gradients) == names
    for name in names:
        assert_agrees(scores, model, rows, name, 1e-12)


def test_layers_of_different_forms_speak_of_the_same_tokens():
    """In bfloat16 the forms round differently, and ranks 9 and 10 may change places between them."""
    model, names = tiny("llama", torch.bfloat16), ["model.layers.1", "model.layers.2.mlp"]
    for seed in range(13):
        rows = prompts((7, 19, 3, 30), seed=seed)
        scores = fisher_scores(model, *padded(rows, "right"), layers=names, top_k=10)
        for b, row in enumerate(rows):
            for name in names:
                expected = plain_scores(model, row, name, token_ids=scores.token_ids[b]).gradients
                for found, exact in zip(scores.gradients[name][b], expected, strict=True):
                    assert relative(found, exact) < 0.3  # another token's score is more than 0.8 away


def state(model: nn.Module) -> dict[str, object]:
    """All that a call must leave as it was."""
    modules = dict(model.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": [name for name, parameter in model.named_parameters() if parameter.grad is not None],
        "hooks": {
            name: (*module._forward_hooks, "pre", *module._forward_pre_hooks, "back", *module._backward_hooks)
            for name, module in modules.items()
        },
        "attention": {
            name: module.config._attn_implementation
            for name, module in modules.items()
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation")
        },
        "forwards": [name for name, module in modules.items() if "forward" in vars(module)],
        "weights": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state(model)
    for name, weight in before.pop("weights").items():
        assert torch.equal(weight, after["weights"][name])
    del after["weights"]
    assert after == before


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_model_is_left_as_it_was(family, kernel):
    model, rows, layer = fresh(family), prompts((4, 6)), block(family, 1)
    model.train()
    model.get_submodule(block(family, 2)).eval()
    model.get_output_embeddings().requires_grad_(False)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    model.get_submodule(block(family, 3)).register_forward_hook(lambda *_: None)
    before = state(model)
    assert torch.is_grad_enabled()
    scores = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=3, kernel=kernel)
    assert torch.is_grad_enabled()
    assert not scores.gradients[layer].requires_grad and not scores.log_probs.requires_grad
    assert_unchanged(model, before)
    assert_agrees(scores, model.eval(), rows, layer, 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_model_is_left_as_it_was_after_an_error(kernel):
    model, layer = fresh("llama"), block("llama", 0)
    ids, mask = padded(prompts((4, 6)), "right")
    for warm in (False, True):  # the error strikes in the probe, then in the computation itself
        if warm:
            fisher_scores(model, ids, mask, layers=layer, kernel=kernel)
        model.train()
        calls = iter(range(100))

        def fail(*_: object, calls=calls) -> None:
            if next(calls) >= 1:
                raise KeyError("planted")

        handle = model.get_submodule(block("llama", 2)).register_forward_hook(fail)
        before = state(model)
        with pytest.raises(ValueError, match=r"the hook test_the_model_is_left.*fail on "):
            fisher_scores(model, ids, mask, layers=layer, kernel=kernel)
            fisher_scores(model, ids, mask, layers=layer, kernel=kernel)
        assert torch.is_grad_enabled()
        assert_unchanged(model, before)
        handle.remove()
    assert_agrees(fisher_scores(model, ids, mask, layers=layer), model.eval(), prompts((4, 6)), layer, 1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_the_users_own_hooks_are_respected(kernel, at):
    model, rows, layer = fresh("gpt2"), prompts(LENGTHS), block("gpt2", 1)
    ids, mask = padded(rows, "left")
    plain = fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel=kernel)
    steering = torch.linspace(-2, 2, 36, dtype=torch.float64)
    module = model.get_submodule(block("gpt2", at))

    def steer(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return torch.tanh(output + steering)

    def shift(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + 0.5 * steering, *args[1:])

    with module.register_forward_hook(steer), module.register_forward_pre_hook(shift):
        scores = fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel=kernel)
        assert_agrees(scores, model, rows, layer, 1e-12)
    assert not torch.equal(scores.log_probs, plain.log_probs)
    assert_agrees(fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel=kernel), model, rows, layer, 1e-12)


def look_back(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def bend(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    return torch.tanh(output)


def halve_logits(_module: nn.Module, _args: object, output: Any) -> Any:
    output.logits = output.logits * 0.5
    return output


def patch_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda x: torch.tanh(own(x))


def scale_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def replace_head(model: nn.Module) -> None:
    model.lm_head.weight = nn.Parameter(tiny("llama", seed=1).lm_head.weight.detach().clone())


# What a user may do to a model before the first call, or between two.
CHANGES = {
    "a hook that mixes positions": lambda m: m.model.layers[2].mlp.register_forward_hook(look_back),
    "a hook inside an MLP": lambda m: m.model.layers[2].mlp.gate_proj.register_forward_hook(bend),
    "a hook on an MLP": lambda m: m.model.layers[2].mlp.register_forward_hook(bend),
    "a hook on a norm": lambda m: m.model.layers[2].input_layernorm.register_forward_hook(bend),
    "a hook on the last block": lambda m: m.model.layers[3].register_forward_hook(bend),
    "a hook on the last block that mixes positions": lambda m: m.model.layers[3].register_forward_hook(look_back),
    "a hook on the last queries": lambda m: m.model.layers[3].self_attn.q_proj.register_forward_hook(look_back),
    "a hook on the last norm": lambda m: m.model.layers[3].post_attention_layernorm.register_forward_hook(look_back),
    "a hook on the final norm": lambda m: m.model.norm.register_forward_hook(bend),
    "a hook on the head": lambda m: m.lm_head.register_forward_hook(bend),
    "a hook on what enters the head": lambda m: m.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,)),
    "a hook on the model": lambda m: m.register_forward_hook(halve_logits),
    "a forward of its own": lambda m: patch_forward(m.model.layers[2].mlp),
    "weights scaled in place": scale_weights,
    "weights loaded": lambda m: m.load_state_dict(tiny("llama", seed=1).state_dict()),
    "another head": replace_head,
    "another final norm": lambda m: setattr(m.model, "norm", tiny("llama", seed=1).model.norm),
    "another block": lambda m: m.model.layers.__setitem__(3, tiny("llama", seed=1).model.layers[3]),
}


@pytest.mark.parametrize("when", ["before the first call", "between two calls"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_user_changes(change, when):
    model, rows, layer = fresh("llama"), prompts(LENGTHS), block("llama", 0)
    ids, mask = padded(rows, "right")
    if when == "between two calls":
        fisher_scores(model, ids, mask, layers=layer, top_k=4)
    CHANGES[change](model)
    before = state(model)
    scores = fisher_scores(model, ids, mask, layers=layer, top_k=4)
    assert_unchanged(model, before)
    assert_agrees(scores, model, rows, layer, 1e-6)


@pytest.mark.parametrize("when", ["before the first call", "between two calls"])
def test_a_hook_on_the_last_column_is_not_taken_for_one_on_the_last_token(when):
    """`output[:, -1]` is the last token to a user who pads on the left: right, or refused, but never wrong."""
    model, rows, layer = fresh("llama"), prompts(LENGTHS), block("llama", 0)
    ids, mask = padded(rows, "left")
    if when == "between two calls":
        fisher_scores(model, ids, mask, layers=layer, top_k=4)

    def steer_last(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], output[:, -1:] + torch.linspace(-3, 3, 36)], 1)

    model.model.layers[2].register_forward_hook(steer_last)
    try:
        scores = fisher_scores(model, ids, mask, layers=layer, top_k=4)
    except ValueError as refusal:
        assert "disagrees with plain autograd" in str(refusal)
    else:
        assert_agrees(scores, model, rows, layer, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_weights_may_change_between_calls(family):
    """Norms of the kind 1 + w, and embeddings that are the head as well, too."""
    model, rows, layer = fresh(family, tie_word_embeddings=True), prompts(LENGTHS), block(family, 1)
    ids, mask = padded(rows, "right")
    fisher_scores(model, ids, mask, layers=layer, top_k=4)
    scale_weights(model)
    scores = fisher_scores(model, ids, mask, layers=layer, top_k=4)
    assert_agrees(scores, model, rows, layer, TOLERANCE[family])


def test_the_dtype_may_change_between_calls():
    model, rows, layer = fresh("llama", torch.bfloat16), prompts(LENGTHS), block("llama", 1)
    ids, mask = padded(rows, "right")
    fisher_scores(model, ids, mask, layers=layer, top_k=4)
    model.double()
    scores = fisher_scores(model, ids, mask, layers=layer, top_k=4)
    assert scores.gradients[layer].dtype == torch.float64
    assert_agrees(scores, model, rows, layer, 1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_remembered_of_a_model_goes_with_it(family):
    model = fresh(family)
    fisher_scores(model, torch.tensor([[1, 2, 3]]), layers=[0, 2])
    assert known_of(model)
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("kernel", ["auto", "whole", "loop"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_inside_the_users_own_context(context, kernel):
    model, rows, layer = fresh("gpt2"), prompts((4, 6)), block("gpt2", 1)
    for _ in ("with the probe", "without it"):
        with context():
            scores = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=3, kernel=kernel)
        assert_agrees(scores, model, rows, layer, 1e-12)


@pytest.mark.parametrize("kernel", ["auto", "whole", "loop"])
def test_tokens_made_in_inference_mode(kernel):
    model, rows, layer = fresh("gpt2"), prompts((4, 6)), block("gpt2", 1)
    with torch.inference_mode():
        ids, mask = padded(rows, "right")
    scores = fisher_scores(model, ids, mask, layers=layer, top_k=3, kernel=kernel)
    assert_agrees(scores, model, rows, layer, 1e-12)


def test_a_batch_of_int32_tokens_and_a_mask_of_any_dtype():
    model, rows, layer = tiny("gpt2"), prompts((4, 6)), block("gpt2", 1)
    ids, mask = padded(rows, "left")
    expected = fisher_scores(model, ids, mask, layers=layer, top_k=3)
    for ids_dtype, mask_dtype in ((torch.int32, torch.bool), (torch.int64, torch.float32)):
        scores = fisher_scores(model, ids.to(ids_dtype), mask.to(mask_dtype), layers=layer, top_k=3)
        assert torch.equal(scores.gradients[layer], expected.gradients[layer])


IDS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "transformer.h.l"}, r"no module named 'transformer.h.l'; the nearest is 'transformer.h.\d'"),
        ({"layers": "model.layers.1"}, r"4 layers are transformer\.h\.0 to transformer\.h\.3"),
        ({"layers": 4}, "layer 4 was asked for; this model has layers 0 to 3"),
        ({"layers": -5}, "layer -5 was asked for"),
        ({"layers": []}, "no layer was given"),
        ({"layers": [1, "transformer.h.1"]}, "given twice"),
        ({"layers": "transformer"}, "expected a tensor"),
        ({"layers": "transformer.h"}, "never called|expected a tensor"),
        ({"top_k": VOCABULARY + 1}, f"top_k is {VOCABULARY + 1}; expected 1 to {VOCABULARY}"),
        ({"top_k": 0}, f"top_k is 0; expected 1 to {VOCABULARY}"),
        ({"kernel": "fast"}, "kernel is 'fast'"),
        ({"kernel": "layerwise", "layers": "transformer.wte"}, "layerwise cannot be trusted with transformer.wte"),
        ({"positions": "first"}, "positions is 'first'"),
        ({"positions": torch.ones(2, 5)}, r"positions has shape \(2, 5\)"),
        ({"positions": torch.zeros(2, 6)}, "selects no real token"),
        ({"token_ids": torch.zeros(3, 2, dtype=torch.int64)}, r"token_ids has shape \(3, 2\); expected \[2, K\]"),
        ({"token_ids": torch.zeros(2, dtype=torch.int64)}, r"token_ids has shape \(2,\)"),
        ({"token_ids": torch.full((2, 1), VOCABULARY)}, "token_ids"),
        ({"token_ids": torch.full((2, 1), -1)}, "token_ids"),
        ({"token_ids": torch.ones(2, 1)}, "token_ids"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(6,\)"),
        ({"input_ids": IDS.float()}, r"dtype torch.float32; expected \[B, T\] int64"),
        ({"input_ids": IDS[:0]}, "not empty"),
        ({"input_ids": IDS + VOCABULARY}, "input_ids"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask has shape \(2, 5\)"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "prompt 1 of the batch has no real token"),
        ({"attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 1, 1, 1]])}, "gap"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        fisher_scores(tiny("gpt2"), **{"input_ids": IDS, "layers": 1, **arguments})
    assert "\n" not in str(caught.value)


def test_factor_names_its_layers():
    scores = fisher_scores(tiny("gpt2"), IDS, layers=[0, 1], top_k=3)
    with pytest.raises(ValueError, match=r"transformer\.h\.0"):
        scores.factor()
    with pytest.raises(ValueError, match="'nowhere' has no scores"):
        scores.factor("nowhere")
    for b in range(2):
        factor = scores.factor(block("gpt2", 0))[b]
        expected = fisher_matrix(scores.log_probs[b], scores.gradients[block("gpt2", 0)][b])
        torch.testing.assert_close(factor.T @ factor, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_outside_transformers(kernel):
    model, rows = ToyLM(), prompts(LENGTHS)
    scores = fisher_scores(model, *padded(rows, "left"), layers="blocks.1", top_k=4, kernel=kernel)
    assert_agrees(scores, model, rows, "blocks.1", 1e-12)


def test_a_single_token_alone_and_every_prompt_of_one_length():
    model, layer = tiny("llama"), block("llama", 1)
    for rows in (prompts((1,)), prompts((1, 1, 1)), prompts((5, 5, 5))):
        assert_agrees(fisher_scores(model, torch.stack(rows), layers=layer, top_k=3), model, rows, layer, 1e-6)


@pytest.mark.parametrize("lengths", [(36,), (30, 6), (3, 1, 2), (6,), (58,), (40, 18), (2, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_numbers_of_tokens_that_equal_a_width_of_the_model(family, lengths, device):
    """No dimension of 36 (residual stream), 6 (heads and their width), 58 (MLP) or 2 (key heads) may be taken for T."""
    model, rows, layer = tiny(family), prompts(lengths), block(family, 0)
    scores = on(device, fisher_scores)(model, *padded(rows, "left"), layers=layer, top_k=3)
    assert_agrees(scores, model, rows, layer, TOLERANCE[family])


@pytest.mark.parametrize("first_lengths", [(4, 20, 7), (4, 7)])
def test_rotary_scaling_that_depends_on_length_looks_at_each_prompt_alone(first_lengths):
    """Some rotary embeddings take other frequencies where a batch is longer than the model was trained on."""
    short, layer = tiny("llama"), block("llama", 1)
    changes = {
        "max_position_embeddings": 8,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }
    model = type(short)(type(short.config)(**(short.config.to_dict() | changes))).double().eval()
    model.load_state_dict(short.state_dict())
    for lengths in (first_lengths, (4, 20, 7)):
        rows = prompts(lengths)
        scores = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4)
        assert_agrees(scores, model, rows, layer, 1e-6)


def test_long_batches_are_pulled_back_in_chunks_of_cotangents(monkeypatch):
    from fisher_vmap.linearize import block

    assert block.cotangents_at_a_time(10, 819, torch.device("cpu")) is None
    assert block.cotangents_at_a_time(10, 2048, torch.device("cpu")) == 4
    assert block.cotangents_at_a_time(3, 10**6, torch.device("cpu")) == 1
    model, rows = tiny("llama"), prompts(LENGTHS)
    whole = fisher_scores(model, *padded(rows, "right"), layers=0, top_k=7)
    monkeypatch.setitem(block.ROWS_AT_A_TIME, "cpu", 40)
    chunked = fisher_scores(model, *padded(rows, "right"), layers=0, top_k=7)
    name = next(iter(whole.gradients))
    torch.testing.assert_close(chunked.gradients[name], whole.gradients[name], rtol=1e-9, atol=1e-9)
