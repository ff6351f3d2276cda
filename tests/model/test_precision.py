"""What is computed in what: low precision against float64, float32 from narrow weights, and which of them is chosen.

The truth has the very same weights, widened. The tokens are the kernel's everywhere.
"""

import copy
import logging

import pytest
import torch
from devices import on, placed
from models import block, fresh, padded, prompts, tiny
from oracles import plain_scores, relative
from precision_cases import FAST, SLOW, NarrowProducts
from torch import nn

from fisher_vmap import FisherModel, fisher_full, fisher_scores
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.probe import known_of
from fisher_vmap.model import precision as precision_module
from fisher_vmap.model import widening
from fisher_vmap.model.precision import Rates, choose_precision

SEEDS = range(24)
LENGTHS = (18, 5, 40)
SLACK = 1.1  # two ways to round are never equally good on every prompt
KERNELS = ("layerwise", "whole", "loop")


@pytest.fixture
def rates(monkeypatch):
    """Makes this processor one of another kind."""

    def are(found):
        monkeypatch.setattr(precision_module, "product_rates", lambda *_: found)

    return are


@pytest.fixture(params=["whole", "by parts"])
def room(request, monkeypatch):
    """Memory that has room for a second set of weights, and memory that has not."""
    monkeypatch.setattr(widening, "has_room", lambda *_: request.param == "whole")
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_further_from_the_truth_than_a_plain_loop(family, dtype, device):
    layer = block(family, 0)
    errors: dict[str, list[float]] = {name: [] for name in (*KERNELS, "plain")}
    for seed in SEEDS:
        model, rows = tiny(family, dtype, seed), prompts(LENGTHS, seed=seed)
        truth = copy.deepcopy(model).double()
        ids, mask = padded(rows, "right")
        options = {"layers": layer, "precision": "model"}
        tokens = on(device, fisher_scores)(model, ids, mask, top_k=6, **options).token_ids
        found = {
            kernel: on(device, fisher_scores)(model, ids, mask, token_ids=tokens, kernel=kernel, **options).gradients[
                layer
            ]
            for kernel in KERNELS
        }
        found["plain"] = [plain_scores(model, row, layer, token_ids=tokens[b]).gradients for b, row in enumerate(rows)]
        for b, row in enumerate(rows):
            expected = plain_scores(truth, row, layer, token_ids=tokens[b]).gradients
            for name, gradients in found.items():
                errors[name].append(relative(gradients[b], expected))

    plain = torch.tensor(errors.pop("plain"))
    assert plain.median() > torch.finfo(dtype).eps / 10  # the comparison compares something
    for kernel, listed in errors.items():
        ours = torch.tensor(listed)
        assert ours.median() <= SLACK * plain.median(), kernel
        assert ours.square().mean().sqrt() <= SLACK * plain.square().mean().sqrt(), kernel


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.bfloat16) for family in ("llama", "gpt2", "gemma2", "granite")), ("llama", torch.float16)],
)
def test_float32_is_to_the_bit_that_of_the_same_weights_widened(family, dtype, room, device):
    model, (ids, mask) = placed((fresh(family, dtype), padded(prompts(LENGTHS), "left")), device)
    wide, layers = copy.deepcopy(model).float(), [block(family, 0), block(family, 2)]
    before = {name: (p.dtype, p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    for kernel in ("auto", "whole", "loop"):
        options = {"layers": layers, "top_k": 6, "kernel": kernel}
        ours = fisher_scores(model, ids, mask, precision="float32", **options)
        expected = fisher_scores(wide, ids, mask, **options)
        assert torch.equal(ours.token_ids, expected.token_ids) and torch.equal(ours.log_probs, expected.log_probs)
        assert all(torch.equal(ours.gradients[layer], expected.gradients[layer]) for layer in layers), kernel
    ours, expected = (
        fisher_full(m, ids, mask, layers=layers, rank=4, precision=p) for m, p in ((model, "float32"), (wide, "model"))
    )
    assert all(torch.equal(ours.factors[layer], expected.factors[layer]) for layer in layers)
    u = torch.randn(3, 2, model.config.hidden_size).to(device)
    networks = [FisherModel(m, layers=layers[0], precision=p) for m, p in ((model, "float32"), (wide, "auto"))]
    with networks[0].linearize(ids, mask) as net, networks[1].linearize(ids, mask) as other:
        assert torch.equal(net.pullback(u), other.pullback(u)) and torch.equal(net.pushforward(u), other.pushforward(u))
    with undisturbed(model, "float32"):
        assert len(known_of(model).parts.rules) == len(known_of(wide).parts.rules)
    for name, parameter in model.named_parameters():  # it is as it was, in the same memory
        dtype_then, address, values = before[name]
        assert (parameter.dtype, parameter.data_ptr()) == (dtype_then, address) and torch.equal(parameter, values)
    assert fisher_scores(model, ids, mask, layers=layers, precision="model").gradients[layers[0]].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
def test_divergences_in_float32_are_to_the_bit_those_of_the_same_weights_widened(family, room):
    from fisher_vmap import measured_kl  # which needs pydantic: a machine with a GPU may lack it

    model = fresh(family, torch.bfloat16)
    wide, steps = copy.deepcopy(model).float(), 0.1 * torch.randn(2, model.config.hidden_size)
    (ids,) = prompts((40,))
    kl = [measured_kl(m, ids, block(family, 0), steps, precision=p) for m, p in ((model, "float32"), (wide, "auto"))]
    assert torch.equal(*kl)


def test_widened_by_parts_no_more_than_a_block_is_wide_at_a_time(monkeypatch):
    monkeypatch.setattr(widening, "has_room", lambda *_: False)
    model, (ids, mask) = fresh("llama", torch.bfloat16), padded(prompts(LENGTHS), "right")
    a_block = sum(p.numel() for p in model.model.layers[0].parameters())
    seen, own = [], widening._Parts.widen

    def watched(parts, tensors):
        own(parts, tensors)
        seen.append(sum(weight.numel() for weight, _, _ in parts._wide.values()))

    monkeypatch.setattr(widening._Parts, "widen", watched)
    fisher_scores(model, ids, mask, layers=0, top_k=3, precision="float32")
    assert max(seen) == max(a_block, model.lm_head.weight.numel())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_default_without_arithmetic_for_bfloat16_is_float64s_to_a_ten_thousandth(family, rates, room):
    rates(SLOW)
    model, rows, layer = fresh(family, torch.bfloat16), prompts(LENGTHS), block(family, 1)
    found = fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=6)
    for b, row in enumerate(rows):
        expected = plain_scores(copy.deepcopy(model).double(), row, layer, token_ids=found.token_ids[b])
        A = found.log_probs[b].double().exp().sqrt()[:, None] * found.gradients[layer][b].double()
        assert relative(A.T @ A, expected.fisher) < 1e-4


def test_what_is_faster_is_chosen_and_told_once(rates, caplog):
    caplog.set_level(logging.INFO, "fisher_vmap")
    for found, name in ((SLOW, "float32"), (FAST, "model"), (Rates((80.0, 80.0), (95.0, 95.0)), "model")):
        rates(found)
        caplog.clear()
        model = fresh("llama", torch.bfloat16)
        opened = FisherModel(model, layers=1)
        opened.scores(torch.tensor([[3, 4, 5]]))
        fisher_scores(model, torch.tensor([[3, 4, 5]]), layers=1)
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("precision")]
        assert line.startswith(f"precision: {name}, because products in float32 run at ") and "in bfloat16 at" in line
        assert opened.precision == name and opened.precision_why in line
        assert (model in widening._COPIES) == (name == "float32")
    assert choose_precision(tiny("llama", torch.float32), "auto").name == "model"


def test_a_slower_format_that_was_asked_for_is_told(rates, caplog):
    rates(SLOW)
    caplog.set_level(logging.INFO, "fisher_vmap")
    for name in ("model", "mixed"):
        assert choose_precision(fresh("llama", torch.bfloat16), name).name == name
    assert caplog.text.count("float32 is faster, and no less exact") == 2


def test_what_cannot_be_widened_stays_as_it_is_and_says_why(rates, caplog):
    rates(SLOW)
    caplog.set_level(logging.INFO, "fisher_vmap")
    model, probe = fresh("llama", torch.bfloat16), nn.Linear(36, 36, dtype=torch.bfloat16)
    handle = model.model.layers[1].register_forward_hook(lambda _m, _a, out: out + 0.01 * probe(out))
    found = fisher_scores(model, torch.tensor([[3, 4, 5]]), layers=0)
    handle.remove()
    assert found.gradients["model.layers.0"].isfinite().all()
    assert "precision: model, because this model does not run in float32 (RuntimeError" in caplog.text
    with pytest.raises(ValueError, match="precision is 'half'; expected 'auto', 'model', 'mixed' or 'float32'"):
        fisher_scores(model, torch.tensor([[3, 4, 5]]), layers=0, precision="half")
    packed = fresh("llama", torch.bfloat16)
    packed.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(58, 36, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is quantised; use precision model, or load the model "):
        choose_precision(packed, "float32")
    assert choose_precision(packed, "auto").name == "model"
    with pytest.raises(ValueError, match="the weights are float64; use precision model"):
        fisher_scores(tiny("llama"), torch.tensor([[3, 4, 5]]), layers=0, precision="float32")


def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(torch.tensor([[3, 4, 5]])).logits.float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _exchange(model):
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


CHANGES = {
    "a step of an optimiser": _step,
    "one number by .data": lambda model: model.model.embed_tokens.weight.data[5].__setitem__(3, 2.0),
    "a row in place": lambda model: model.lm_head.weight.detach()[7].mul_(1.5),
    "another parameter": _exchange,
    "load_state_dict": lambda m: m.load_state_dict({n: 1.25 * p for n, p in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_between_calls_are_seen(change, room):
    model, (ids, mask) = (
        fresh("llama", torch.bfloat16),
        padded([torch.tensor([3, 5, 4]), torch.tensor([5, 9])], "right"),
    )
    before = fisher_scores(model, ids, mask, layers=0, precision="float32").gradients["model.layers.0"]
    CHANGES[change](model)
    after = fisher_scores(model, ids, mask, layers=0, precision="float32").gradients["model.layers.0"]
    expected = fisher_scores(copy.deepcopy(model).float(), ids, mask, layers=0).gradients["model.layers.0"]
    assert torch.equal(after, expected) and not torch.equal(after, before)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_multiplies_in_a_format_that_the_processor_has_not(family, rates, room):
    """Opening, proving, every form, full, both products, measured divergences."""
    from fisher_vmap import measured_kl

    rates(SLOW)
    model, (ids, mask) = fresh(family, torch.bfloat16), padded(prompts((9, 4)), "right")
    with NarrowProducts() as seen:
        for kernel in ("auto", "whole", "loop"):
            opened = FisherModel(model, layers=[0, 2], kernel=kernel, include_rest=True, trace_samples=2)
            opened.estimate(ids, mask)
        with FisherModel(model, layers=0, estimator="full").linearize(ids, mask) as net:
            net.pushforward(torch.randn(2, 3, 36))
        fisher_full(model, ids, mask, layers=0, rank=3)
        measured_kl(model, ids[0], 0, 0.1 * torch.randn(2, 36))
    assert seen.all > 100 and not seen.narrow
