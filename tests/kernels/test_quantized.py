"""Quantised weights: scores of the unpacked weights, or one line that says why not.

The oracle is plain autograd on an ordinary model whose matrices are the quantised ones, unpacked by hand. What rounds
within its own kernel (bitsandbytes computes in bfloat16 on some processors) is as near to it as that rounding allows.
"""

import copy
import gc
import weakref

import pytest
import torch
from models import VOCABULARY, padded, prompts
from oracles import plain_scores, relative
from quantized_cases import unpacked_by_bitsandbytes
from source_cases import base
from torch import nn

from fisher_vmap import FisherModel, fisher_scores
from fisher_vmap.kernels.quantized import CannotDifferentiate, has_matrix, quantized_linears, quantized_pullbacks
from fisher_vmap.linearize.probe import known_of

LAYERS = ["model.layers.0", "model.layers.3"]
LENGTHS = (5, 9, 3)


def compare(model, oracle, budget, layers=LAYERS, own_logits=False, **choices):
    """The scores of a quantised model against plain autograd on another, one prompt at a time.

    With `own_logits` the log-probabilities are compared with the quantised model's own.
    """
    rows = prompts(LENGTHS, vocabulary=VOCABULARY)
    ids, mask = padded(rows, "left")
    scores = fisher_scores(model, ids, mask, layers=layers, top_k=3, **choices)
    for layer in layers:
        for b, row in enumerate(rows):
            plain = plain_scores(oracle, row, layer, token_ids=scores.token_ids[b])
            distance = relative(scores.gradients[layer][b], plain.gradients)
            assert distance < budget, (layer, b, distance)
            expected = plain.log_probs
            if own_logits:
                with torch.no_grad():
                    expected = model(row[None]).logits[0, -1].log_softmax(0)[scores.token_ids[b]]
            torch.testing.assert_close(scores.log_probs[b], expected, rtol=0, atol=budget)


def forms(model):
    return {choice.form for choice in known_of(model).forms.values()}


# torchao puts another tensor into an ordinary nn.Linear


@pytest.mark.needs("torchao")
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("head", [True, False])
def test_torchao_weight_only(kind, head):
    import torchao.quantization as torchao

    config = {"int8": torchao.Int8WeightOnlyConfig, "float8": torchao.Float8WeightOnlyConfig}[kind]()
    model, oracle = base(), base()
    torchao.quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and (head or name != "lm_head"))
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and (head or name != "lm_head")]
    assert list(quantized_linears(model)) == linears and not has_matrix(model.get_submodule(linears[0]))
    for name in linears:
        oracle.get_submodule(name).weight.data = model.get_submodule(name).weight.dequantize().detach()
    compare(model, oracle, 2e-4)
    assert forms(model) == ({"whole"} if head else {"packed"})
    for kernel in ("whole", "loop"):
        compare(model, oracle, 2e-4, kernel=kernel)


@pytest.mark.needs("torchao")
def test_torchao_with_rounded_inputs_has_the_gradient_of_its_own_backward_or_none():
    import torchao.quantization as torchao

    model, oracle = base(), base()
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig(), lambda m, n: n.endswith("up_proj"))
    for name in quantized_linears(model):
        oracle.get_submodule(name).weight.data = model.get_submodule(name).weight.dequantize().detach()
    try:
        compare(model, oracle, 0.1, own_logits=True)  # what its inputs are rounded to is not the oracle's
    except CannotDifferentiate as error:
        assert "rounds its inputs" in str(error) and "dequantize" in str(error)


# bitsandbytes


def in_bitsandbytes(model, bits):
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            kind, options = (bnb.nn.Linear4bit, {"quant_type": "nf4", "compute_dtype": layer.weight.dtype}), {}
            if bits == 8:
                kind, options = (bnb.nn.Linear8bitLt, {"has_fp16_weights": False}), {}
            quantised = kind[0](layer.in_features, layer.out_features, bias=False, **kind[1], **options)
            quantised.load_state_dict(layer.state_dict())
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, quantised.to("cpu"))
    return model


@pytest.mark.needs("bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_bitsandbytes(bits):
    model = in_bitsandbytes(base(), bits)
    oracle = unpacked_by_bitsandbytes(model, bits)
    compare(model, oracle, 0.08)  # its kernels round to bfloat16, or their inputs to 8 bits
    assert forms(model) == {"packed"}


# Layers of other makes, in small


class Packed(nn.Module):
    """A layer as GPTQ and AWQ have them: integers in buffers, unpacked in its own forward, and no backward at all."""

    def __init__(self, linear, bias=None):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scale[:, None]).round().to(torch.int32))
        self.register_buffer("scales", scale)
        self.register_buffer("bias", bias)

    def matrix(self):
        return self.qweight.to(self.scales.dtype) * self.scales[:, None]

    def forward(self, x):
        with torch.no_grad():
            y = x.detach() @ self.matrix().T
            return y if self.bias is None else y + self.bias


class Rounding(Packed):
    """One that rounds its inputs to 8 bits as well."""

    def forward(self, x):
        step = x.detach().abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class Experts(nn.Module):
    """Weights of several experts in one packed tensor."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.uint8), requires_grad=False)


def replaced(kind, dtype=torch.float32, **options):
    """The llama with its MLPs' layers of another kind, and an ordinary one of the same matrices."""
    model, oracle = base(dtype), base(dtype)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and ".mlp." in name:
            parent, _, own = name.rpartition(".")
            packed = kind(layer, **options)
            setattr(model.get_submodule(parent), own, packed)
            oracle.get_submodule(name).weight.data = packed.matrix().detach()
    return model, oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_a_backward_is_differentiated_by_its_matrix(dtype):
    model, oracle = replaced(Packed, dtype)
    compare(model, oracle, 2e-4 if dtype == torch.float32 else 1e-6)
    assert forms(model) == {"packed"}
    compare(model, oracle, 2e-4, layers=["model.layers.1.mlp.up_proj"])


def test_without_that_plain_autograd_would_be_wrong_and_not_say_so():
    model, oracle = replaced(Packed)
    (row,) = prompts((6,))
    ours, lost = (plain_scores(m, row, LAYERS[0], top_k=3).gradients for m in (oracle, model))
    assert relative(lost, ours) > 0.1


def test_a_bias_a_thousand_times_the_weights_leaves_the_matrix_its_digits():
    linear = nn.Linear(40, 24, bias=False)
    packed = Packed(linear, bias=torch.full((24,), 100.0))
    model = nn.Sequential(packed)
    with quantized_pullbacks(model):
        x = torch.randn(3, 40, requires_grad=True)
        y = packed(x)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
    assert packed.bias is not None and "forward" not in vars(packed)
    torch.testing.assert_close(y, x @ packed.matrix().T + 100.0)
    torch.testing.assert_close(dx, g @ packed.matrix(), rtol=1e-5, atol=1e-6)


def test_cotangents_may_be_batched_at_any_place():
    packed = Packed(nn.Linear(12, 7, bias=False))
    with quantized_pullbacks(nn.Sequential(packed)):
        _, pull = torch.func.vjp(packed, torch.randn(4, 12))
        for dim in range(3):
            g = torch.randn(5, 4, 7).movedim(0, dim)
            (dx,) = torch.func.vmap(pull, in_dims=dim, out_dims=dim)(g)
            torch.testing.assert_close(dx, (g.movedim(dim, 0) @ packed.matrix()).movedim(0, dim))


def test_a_layer_that_rounds_its_inputs_is_refused_in_one_line():
    model, _ = replaced(Rounding)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj \(Rounding\) .*rounds its inputs.*dequantize"):
        fisher_scores(model, torch.arange(5)[None], layers=0)
    with pytest.raises(ValueError, match="rounds its inputs"):
        FisherModel(model, layers=0)


def test_packed_experts_are_refused_in_one_line():
    model = base()
    model.model.layers[1].mlp.experts = Experts()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.blocks \(Experts\) .*dequantize"):
        fisher_scores(model, torch.arange(5)[None], layers=0)


def test_a_copy_and_a_freed_model_take_their_layers_along():
    model, oracle = replaced(Packed)
    compare(model, oracle, 2e-4)
    other = copy.deepcopy(model)
    for layer in quantized_linears(other).values():
        layer.scales.mul_(0.5)
    doubled = copy.deepcopy(oracle)
    for name in quantized_linears(other):
        doubled.get_submodule(name).weight.data *= 0.5
    compare(other, doubled, 2e-4)
    gone = weakref.ref(model)
    del model, layer
    gc.collect()
    assert gone() is None


def test_ordinary_weights_under_a_forward_that_loses_the_gradient():
    model, oracle = base(), base()
    for layer in model.model.layers:
        own = layer.mlp.up_proj.forward
        layer.mlp.up_proj.forward = lambda x, own=own: own(x).detach()
    compare(model, oracle, 2e-4)
    assert all("forward" in vars(layer.mlp.up_proj) for layer in model.model.layers)


def test_the_pushforward_of_a_quantised_layer_and_model():
    packed = Packed(nn.Linear(12, 7, bias=False))
    with quantized_pullbacks(nn.Sequential(packed)):
        x, t = torch.randn(4, 12), torch.randn(5, 4, 12)
        moved = torch.func.vmap(lambda v: torch.func.jvp(packed, (x,), (v,))[1])(t)
        torch.testing.assert_close(moved, t @ packed.matrix().T)
    model, oracle = replaced(Packed)
    ids = torch.arange(7)[None]
    with (
        FisherModel(model, layers=1).linearize(ids) as net,
        FisherModel(oracle, layers=1).linearize(ids) as plain,
    ):
        v = torch.randn(1, 3, 64)
        torch.testing.assert_close(net.pushforward(v), plain.pushforward(v), rtol=1e-3, atol=1e-4)
