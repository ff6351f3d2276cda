"""Forwards wrapped by autocast, accelerate and torch.compile: the scores are those of the model without the wrapper."""

import functools
import threading
from types import MethodType

import numpy as np
import pytest
import torch
from models import block, fresh, padded, prompts, tiny
from oracles import plain_scores, relative
from torch import nn

from fisher_vmap import FisherModel, fisher_full, fisher_scores, measured_kl
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import precision
from fisher_vmap.model.patches import NAME, innermost, nothing_compiled, own_forwards

LENGTHS = (9, 4, 7)


def autocast(function=None, dtype=torch.bfloat16):
    """As a decorator, or a context: a new one each time, since one that is entered twice does not switch off again."""
    context = torch.autocast("cpu", dtype=dtype)
    return context if function is None else context(function)


def agrees(model, layers, names=None, oracle=None, budget=1e-5):
    """The scores are those of plain autograd through a model that nobody wrapped, and the fast form was trusted."""
    rows = prompts(LENGTHS)
    found = fisher_scores(model, *padded(rows, "left"), layers=layers, top_k=3)
    assert list(found.gradients) == (names or layers)
    for layer, gradients in found.gradients.items():
        for b, row in enumerate(rows):
            expected = plain_scores(oracle or tiny("llama", torch.float32), row, layer, token_ids=found.token_ids[b])
            assert relative(gradients[b], expected.gradients) < budget
    return found


def state(model):
    """Of every module: its attributes and what is registered in it, as objects."""
    return {
        name: [{key: id(value) for key, value in held.items() if key != NAME} for held in (vars(part), part._modules)]
        for name, part in model.named_modules(remove_duplicate=False)
    }


# Autocast


def by_accelerate(model, kind="bf16"):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return accelerate.Accelerator(mixed_precision=kind, cpu=True).prepare_model(model)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def by_accelerate_twice(model):
    return by_accelerate(by_accelerate(model))


def as_a_decorator(model):
    model.forward = autocast(model.forward)
    return model


def as_a_method(model):
    model.forward = MethodType(autocast(type(model).forward), model)
    return model


def on_parts(model):
    model.model.forward = autocast(model.model.forward)
    model.model.layers[2].forward = autocast(model.model.layers[2].forward, torch.float16)
    model.model.layers[3].mlp.forward = autocast(model.model.layers[3].mlp.forward)
    return model


def under_a_hook_of_accelerate(model):
    import accelerate.hooks as hooks

    layer = model.model.layers[1]
    layer.forward = autocast(layer.forward)
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    return model


def over_a_hook_of_accelerate(model):
    import accelerate.hooks as hooks

    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu"))
    return as_a_decorator(model)


BY_ACCELERATE = pytest.mark.needs("accelerate")
AUTOCASTS = [
    pytest.param(by_accelerate, marks=BY_ACCELERATE),
    pytest.param(by_accelerate_twice, marks=BY_ACCELERATE),
    as_a_decorator,
    as_a_method,
    on_parts,
    pytest.param(under_a_hook_of_accelerate, marks=BY_ACCELERATE),
    pytest.param(over_a_hook_of_accelerate, marks=BY_ACCELERATE),
]


@pytest.mark.parametrize("wrap", AUTOCASTS)
def test_scores_are_those_without_autocast_and_the_wrapper_stays(wrap):
    model, layers = wrap(fresh("llama", torch.float32)), [block("llama", 1), block("llama", 2)]
    before = state(model)
    agrees(model, layers)
    found = fisher_full(model, *padded(prompts(LENGTHS), "left"), layers=1, rank=2)
    expected = fisher_full(fresh("llama", torch.float32), *padded(prompts(LENGTHS), "left"), layers=1, rank=2)
    assert relative(found.factors[layers[0]], expected.factors[layers[0]]) < 1e-4
    assert state(model) == before
    assert {choice.form for choice in known_of(model).forms.values()} == {"packed"}
    hidden = []
    handle = model.model.layers[3].mlp.register_forward_hook(lambda _m, _a, out: hidden.append(out.dtype))
    model(torch.tensor([[1, 2, 3]]))
    handle.remove()
    assert hidden != [torch.float32] or wrap is under_a_hook_of_accelerate  # for the user it autocasts as before


def test_a_wrapped_model_is_probed_once(monkeypatch):
    model, looked = by_accelerate(fresh("llama", torch.float32)), []
    own = torch.nn.Linear.forward

    def count(module, x):
        looked.append(1)
        return own(module, x)

    agrees(model, [block("llama", 1)])
    known = known_of(model)
    user = lambda module, *args, **kwargs: type(module).forward(module, *args, **kwargs)  # noqa: E731
    other = fresh("llama", torch.float32)
    other.forward = MethodType(user, other)
    other.forward = autocast(other.forward)
    agrees(other, [block("llama", 1)])
    monkeypatch.setattr(torch.nn.Linear, "forward", count)
    seen = known_of(other)
    agrees(model, [block("llama", 1)])
    agrees(other, [block("llama", 1)])
    assert known_of(model) is known and known_of(other) is seen


def test_opened_models_and_measured_divergences():
    plain, wrapped = fresh("llama", torch.float32), by_accelerate(fresh("llama", torch.float32))
    steps = 0.01 * torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
    row = prompts(LENGTHS)[0]
    torch.testing.assert_close(measured_kl(wrapped, row, 1, steps), measured_kl(plain, row, 1, steps))
    numbers = [
        FisherModel(m, layers=1, top_k=3).numbers([row.tolist()], 2)[0].layers["model.layers.1"]
        for m in (plain, wrapped)
    ]
    np.testing.assert_allclose(numbers[0].S, numbers[1].S, rtol=1e-6)


def test_precision_is_chosen_without_autocast(monkeypatch):
    seen = []
    real = precision._rates

    def rates(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*args)

    monkeypatch.setattr(precision, "_rates", rates)
    precision.product_rates.cache_clear()
    model = as_a_decorator(fresh("llama", torch.bfloat16))
    inside = []
    model.lm_head.register_forward_pre_hook(lambda _m, _a: inside.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(precision, "GAIN", 0.0)
    with autocast():
        precision.choose_precision(model, "auto")
    assert seen and inside and not any(seen + inside)


def test_a_wrapper_of_the_users_own_is_left_on_with_what_it_does():
    model = fresh("llama", torch.float32)
    own = model.forward

    @functools.wraps(own)
    def scaled(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    for wrapped in (scaled, autocast(scaled), torch.compile(scaled, backend=never)):
        model.forward = wrapped
        with own_forwards(model):
            assert vars(model)["forward"] is scaled
        assert vars(model)["forward"] is wrapped
        assert innermost(model, wrapped) is scaled
    over = functools.wraps(autocast(own))(lambda *a, **k: autocast(own)(*a, **k))
    assert innermost(model, over) is over  # a function of one's own, whatever attributes it has copied


# torch.compile


def never(_graph, _inputs):
    """A compiler that must not be called."""
    raise AssertionError("something was compiled")


def by_call(model):
    model.compile(backend=never)
    return model


def by_forward(model):
    model.forward = torch.compile(model.forward, backend=never)
    return model


def a_block(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend=never)
    return model


def all_blocks_and_an_mlp(model):
    for i, layer in enumerate(model.model.layers):
        layer.mlp = torch.compile(layer.mlp, backend=never)
        model.model.layers[i] = torch.compile(layer, backend=never)
    return model


def a_block_by_call(model):
    model.model.layers[1].compile(backend=never)
    return model


def the_inner_model(model):
    model.model = torch.compile(model.model, backend=never)
    return model


def compiled_autocast(model):
    model.forward = autocast(torch.compile(model.forward, backend=never))
    return by_accelerate(by_call(model))


COMPILED = [by_call, by_forward, a_block, all_blocks_and_an_mlp, a_block_by_call, the_inner_model]


@pytest.mark.parametrize("wrap", [*COMPILED, compiled_autocast])
def test_what_is_compiled_runs_as_it_was_before(wrap):
    model, layers = wrap(fresh("llama", torch.float32)), [block("llama", 1), block("llama", 2) + ".mlp"]
    whole = torch.compile(model, backend=never)
    before = state(model)
    agrees(model, layers)
    agrees(whole, [1, -1], [block("llama", 1), block("llama", 3)])
    opened = FisherModel(model, layers="all", top_k=3)
    assert opened.layers == [block("llama", i) for i in range(4)]
    opened.scores(*padded(prompts(LENGTHS), "left"))
    assert {chosen["form"] for chosen in opened.forms.values()} == {"packed"}
    assert state(model) == before


def in_the_class(model):
    """Compiled functions that are no forward of an object: they run as they are written."""
    kind = type(model.model.layers[0].mlp)
    compiled = type("CompiledMLP", (kind,), {"forward": torch.compile(kind.forward, backend=never)})
    for layer in model.model.layers:
        layer.mlp.__class__ = compiled
    return model


def test_a_class_whose_forward_is_compiled():
    agrees(in_the_class(fresh("llama", torch.float32)), [block("llama", 1), block("llama", 2)])


def test_threads_leave_the_compiler_as_it_was():
    compiled, seen = [], threading.Barrier(2, timeout=60)

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda x: x + 1, backend=backend)

    def work(first):
        with nothing_compiled():
            seen.wait()
            function(torch.ones(2))
            if first:
                seen.wait()
        if not first:
            seen.wait()

    threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not compiled
    function(torch.ones(2))
    assert len(compiled) == 1


@pytest.mark.parametrize("outer", [False, True])
def test_names_of_compiled_parts(outer):
    model = all_blocks_and_an_mlp(fresh("llama", torch.float32))
    names = ["model.layers.1._orig_mod", "model.layers.2._orig_mod.mlp._orig_mod.down_proj", "model.layers.0.mlp"]
    if outer:
        model = torch.compile(model, backend=never)
        names = [f"_orig_mod.{name}" for name in names]
    plain = ["model.layers.1", "model.layers.2.mlp.down_proj", "model.layers.0.mlp"]
    agrees(model, names, plain)
    agrees(model, plain, plain)


def test_hooks_on_a_compiled_part_are_part_of_the_model():
    model, oracle, order = fresh("llama", torch.float32), fresh("llama", torch.float32), []

    def note(name, number):
        return lambda _m, _a, out=None: order.append(name) if out is None else order.append(name) or out * number

    inner = model.model.layers[2]
    inner.register_forward_hook(note("inner", 1.5))
    inner.register_forward_pre_hook(note("inner before", 0))
    model.model.layers[2] = torch.compile(inner, backend=never)
    model.model.layers[2].register_forward_hook(note("outer", 0.8))
    model.model.layers[2].register_forward_pre_hook(note("outer before", 0))
    oracle.model.layers[2].register_forward_hook(lambda _m, _a, out: out * 1.5 * 0.8)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (inner, model.model.layers[2])]
    agrees(model, [block("llama", 1), block("llama", 0)], oracle=oracle)
    assert order[:4] == ["outer before", "inner before", "inner", "outer"]
    assert before == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in (inner, model.model.layers[2])]


def test_an_error_inside_leaves_everything_in_place():
    model = compiled_autocast(all_blocks_and_an_mlp(fresh("llama", torch.float32)))
    before = state(model)
    with pytest.raises(KeyError), own_forwards(model):
        assert "forward" not in vars(model) and type(model.model.layers[1]) is type(tiny("llama").model.layers[1])
        raise KeyError
    assert state(model) == before
    assert isinstance(model, nn.Module)
