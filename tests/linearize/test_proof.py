"""Planted faults: models that break an assumption of the fast forms. Each must be caught by the check that is meant for
it, and the scores must be plain autograd's all the same."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from models import WIDTH, fresh, padded, prompts
from oracles import plain_scores, relative
from torch import Tensor, nn
from toys import ToyBlock, ToyLM

from fisher_vmap import FisherModel, fisher_scores

LENGTHS = (6, 2, 9)


def assert_right(scores, model: nn.Module, rows, layer: str, tolerance: float = 1e-10) -> None:
    for b, row in enumerate(rows):
        expected = plain_scores(model, row, layer, top_k=scores.token_ids.shape[1])
        assert torch.equal(scores.token_ids[b], expected.token_ids)
        torch.testing.assert_close(scores.log_probs[b], expected.log_probs, atol=tolerance, rtol=0)
        assert relative(scores.gradients[layer][b], expected.gradients) < tolerance


def right_form(model: nn.Module, layer: str, kernel: str = "auto") -> dict[str, str]:
    """Compute twice, compare both with the oracle; the form that ran, and why."""
    opened = FisherModel(model, layers=layer, top_k=4, kernel=kernel)
    for seed in (0, 1):
        rows = prompts(LENGTHS, seed=seed)
        assert_right(opened.scores(*padded(rows, "left")), model, rows, layer)
    return opened.forms[layer]


def assert_layerwise(form: dict[str, str]) -> None:
    assert form["form"] == "layerwise" and form["why"].startswith("the chain of blocks is whole")


def assert_caught_by_structure(form: dict[str, str]) -> None:
    assert form == {"form": "whole", "why": "above the hook a block reaches back past its own input"}


def assert_caught_by_primal(form: dict[str, str]) -> None:
    assert form["form"] == "whole" and "the replay of" in form["why"]


def assert_caught_by_numbers(form: dict[str, str], lower: str = "whole") -> None:
    assert form["form"] == lower and "scores at" in form["why"] and "away" in form["why"]


@pytest.mark.parametrize("number", range(4))
def test_a_sound_model_passes(number):
    assert_layerwise(right_form(ToyLM(), f"blocks.{number}"))


# Structure: another way from the bias to the top than through the chain of blocks.


class SharingBlock(ToyBlock):
    """Takes keys and values from a dictionary if there are any, and puts its own there if there are none."""

    def forward(self, hidden_states: Tensor, shared: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, str]:
        if "pair" not in shared:
            shared["pair"] = self.keys_and_values(hidden_states)
        return self.think(self.attend(hidden_states, *shared["pair"])), "and something else"


class SharedKeys(ToyLM):
    """Blocks from number 2 on attend to the keys and values of block 2."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), SharingBlock(), SharingBlock(), SharingBlock()])

    def walk(self, x: Tensor) -> Tensor:
        shared: dict[str, tuple[Tensor, Tensor]] = {}
        for block in self.blocks:
            x = block(x, shared=shared)[0] if isinstance(block, SharingBlock) else block(x)
        return x


@pytest.mark.parametrize("number", range(5))
def test_keys_and_values_shared_across_blocks(number):
    form = right_form(SharedKeys(), f"blocks.{number}")
    if number < 2:  # the shared keys depend on the bias: block 3 reaches back to what block 1 returned
        assert_caught_by_structure(form)
    elif number == 4:
        assert_layerwise(form)
    else:  # they do not depend on it, and a replay of blocks 3 and 4 finds them as they were
        assert_layerwise(form)


class SkipBetween(ToyLM):
    """What block 0 returned is added again between blocks 2 and 3."""

    def walk(self, x: Tensor) -> Tensor:
        outputs = []
        for block in self.blocks:
            x = block(x if len(outputs) != 3 else x + 0.7 * outputs[0])
            outputs.append(x)
        return x


class SkipTaker(ToyBlock):
    def forward(self, hidden_states: Tensor, skip: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.7 * skip


class SkipInside(ToyLM):
    """The same, handed to block 3 as an argument: no value between the blocks gives it away."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), ToyBlock(), SkipTaker()])

    def walk(self, x: Tensor) -> Tensor:
        outputs = [self.blocks[0](x)]
        for block in self.blocks[1:3]:
            outputs.append(block(outputs[-1]))
        return self.blocks[3](outputs[-1], skip=outputs[0])


class SkipToTheHead(ToyLM):
    """What block 0 returned is added again after the last block."""

    def walk(self, x: Tensor) -> Tensor:
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return x + 0.7 * first


@pytest.mark.parametrize("kind", [SkipBetween, SkipInside])
@pytest.mark.parametrize("number", range(4))
def test_a_residual_that_skips_a_block(kind, number):
    form = right_form(kind(), f"blocks.{number}")
    if number == 0:
        assert_caught_by_structure(form)
    elif number == 3 or kind is SkipInside:
        assert_layerwise(form)  # above block 0 the skip is a constant
    elif number == 1:
        assert_caught_by_primal(form)  # a constant, but block 3 receives something else than block 2 returned


@pytest.mark.parametrize("number", range(4))
def test_a_residual_that_skips_to_the_head(number):
    form = right_form(SkipToTheHead(), f"blocks.{number}")
    assert form["form"] == "whole" and "needs more than one position" in form["why"]


class Between(ToyLM):
    """Something between two blocks that is no block itself."""

    def __init__(self, at: int, change, from_length: int = 0) -> None:
        super().__init__()
        self.at, self.change, self.from_length = at, change, from_length

    def walk(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == self.at and x.shape[1] >= self.from_length:
                x = self.change(x)
        return x


@pytest.mark.parametrize("number", [0, 1, 2])
def test_something_between_two_blocks(number):
    form = right_form(Between(1, lambda x: 1.3 * x), f"blocks.{number}")
    if number == 2:
        assert_layerwise(form)
    else:
        assert form["form"] == "whole"


@pytest.mark.parametrize("number", [0, 1])
def test_something_between_two_blocks_that_leaves_the_values_alone(number):
    """No value gives it away: only the comparison with plain autograd can."""
    assert_caught_by_numbers(right_form(Between(1, lambda x: x + (x - x.detach())), f"blocks.{number}"))


@pytest.mark.parametrize("number", [0, 1])
def test_something_between_two_blocks_in_longer_batches_only(number, caplog):
    """The probe has not seen it: the check in every batch must."""
    model, layer = Between(1, lambda x: 1.3 * x, from_length=70), f"blocks.{number}"
    short, long = prompts(LENGTHS), prompts((80, 4))
    first = fisher_scores(model, *padded(short, "right"), layers=layer, top_k=4)
    assert_right(first, model, short, layer)
    with caplog.at_level(logging.WARNING):
        scores = fisher_scores(model, *padded(long[:1], "right"), layers=layer, top_k=4)
    assert_right(scores, model, long[:1], layer)
    assert "given up from here on: it broke off: " in caplog.text


# A block called more than once.


class Recurrent(ToyLM):
    """Walks its blocks in the order given."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def walk(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = self.blocks[number](x)
        return x


@pytest.mark.parametrize("order", [(0, 1, 1, 2, 3), (0, 1, 2, 1, 3), (0, 1, 2, 3, 3), (0, 1, 2, 3, 0, 1, 2, 3)])
@pytest.mark.parametrize("number", range(4))
def test_a_block_called_twice(order, number):
    assert_layerwise(right_form(Recurrent(order), f"blocks.{number}"))


def test_what_a_block_called_twice_reports_is_the_same_in_every_form():
    model, layer = Recurrent((0, 1, 2, 1, 3)), "blocks.1"
    ids, mask = padded(prompts(LENGTHS), "right")
    forms = [fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel=k) for k in ("layerwise", "whole", "loop")]
    for other in forms[1:]:
        assert relative(forms[0].gradients[layer], other.gradients[layer]) < 1e-10
        assert relative(forms[0].position_energy[layer], other.position_energy[layer]) < 1e-10
        assert relative(forms[0].residual_norm[layer], other.residual_norm[layer]) < 1e-10


class Alternating(Recurrent):
    """Another order of the blocks in batches that are long."""

    def walk(self, x: Tensor) -> Tensor:
        self.order = (0, 1, 2, 3) if x.shape[1] < 12 else (0, 2, 1, 3)
        return super().walk(x)


def test_an_order_of_blocks_that_depends_on_the_batch(caplog):
    model, layer = Alternating((0, 1, 2, 3)), "blocks.0"
    for lengths in ((6, 2, 9), (13, 15)):
        rows = prompts(lengths)
        assert_right(fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4), model, rows, layer)
    assert "out of the order that the probe saw" in caplog.text


# State, and arguments that change.


class CachingBlock(ToyBlock):
    """Attends to its cache as well; whoever calls it again without emptying the cache gets something else."""

    cache: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        pairs = self.keys_and_values(hidden_states)
        if self.cache is not None and self.cache.shape == pairs[0].shape:
            pairs = (pairs[0] + self.cache, pairs[1])
        self.cache = pairs[0].detach()
        return self.think(self.attend(hidden_states, *pairs))


class Stateful(ToyLM):
    """Empties its cache at the beginning of a forward: every forward is the same, a replay is not."""

    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), CachingBlock(), ToyBlock()])

    def walk(self, x: Tensor) -> Tensor:
        self.blocks[2].cache = None
        return super().walk(x)


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_keeps_state_between_calls(number):
    form = right_form(Stateful(), f"blocks.{number}")
    (assert_caught_by_primal if number < 2 else assert_layerwise)(form)


class LateFault(ToyBlock):
    """Multiplies its output from the n-th call of a forward on, once the fault is switched on."""

    faulty = False
    calls = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(hidden_states) * (1.2 if self.faulty and self.calls > 1 else 1.0)


class LateStateful(ToyLM):
    def __init__(self) -> None:
        super().__init__([ToyBlock(), ToyBlock(), LateFault(), ToyBlock()])

    def walk(self, x: Tensor) -> Tensor:
        self.blocks[2].calls = 0
        return super().walk(x)


def test_state_that_begins_after_the_probe_is_caught_in_its_batch(caplog):
    model, layer, rows = LateStateful(), "blocks.0", prompts(LENGTHS)
    ids, mask = padded(rows, "right")
    opened = FisherModel(model, layers=layer, top_k=4)
    assert_right(opened.scores(ids, mask), model, rows, layer)
    assert_layerwise(opened.forms[layer])
    model.blocks[2].faulty = True
    scores = opened.scores(ids, mask)
    assert "given up from here on: it broke off: the replay of blocks.2" in caplog.text
    assert_right(scores, model, rows, layer)
    assert_caught_by_primal(opened.forms[layer])
    with pytest.raises(ValueError, match=r"disagrees|broke off|cannot be trusted"):
        fisher_scores(model, ids, mask, layers=layer, top_k=4, kernel="layerwise")


class MaskedBlock(ToyBlock):
    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.think(self.attend(hidden_states, *self.keys_and_values(hidden_states), mask=mask))


class ChangingMask(ToyLM):
    """One mask for all blocks, narrowed in place on the way up: what was recorded is no longer what was used."""

    def __init__(self) -> None:
        super().__init__([MaskedBlock() for _ in range(4)])

    def walk(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        mask = torch.zeros(T, T, dtype=x.dtype)
        for number, block in enumerate(self.blocks):
            x = block(x, mask=mask)
            mask -= 0.5 * (number + 1) * torch.arange(T)
        return x


@pytest.mark.parametrize("number", range(4))
def test_a_mask_that_differs_between_recording_and_replay(number):
    form = right_form(ChangingMask(), f"blocks.{number}")
    # Above block 2 there is one block, and nothing has changed its mask yet when it is replayed.
    (assert_caught_by_primal if number < 2 else assert_layerwise)(form)


class NamedMaskBlock(MaskedBlock):
    """Reads the model's config when it is called: no mask means causal under "fused" and everything under "eager"."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None or self.config._attn_implementation == "fused":
            return super().forward(hidden_states, mask)
        keys, values = self.keys_and_values(hidden_states)
        weights = (self.query(self.norm1(hidden_states)) @ keys.mT * WIDTH**-0.5).softmax(-1)
        return self.think(hidden_states + self.out(weights @ values))


class NamedMask(ToyLM):
    """Builds a mask under "eager" and none under "fused", as the models of transformers do."""

    def __init__(self) -> None:
        class Config:
            _attn_implementation = "fused"

        config = Config()
        super().__init__([NamedMaskBlock(config) for _ in range(4)])
        self.config = config

    def walk(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(()) if self.config._attn_implementation == "eager" else None
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


def test_a_mask_means_the_same_in_recording_and_replay():
    model = NamedMask()
    assert_layerwise(right_form(model, "blocks.0"))
    assert model.config._attn_implementation == "fused"


class WritingBlock(ToyBlock):
    """Adds to its input in place."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states += 3 * self.norm2.bias
        return super().forward(hidden_states)


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_writes_into_its_input(number):
    model = ToyLM([ToyBlock(), ToyBlock(), WritingBlock(), ToyBlock()])
    assert right_form(model, f"blocks.{number}")["form"] in ("layerwise", "whole")


# What torch.func cannot express.


class OldForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2)


class OldFormBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return x + self.down(OldForm.apply(self.up(self.norm2(x))))


def test_an_autograd_function_of_the_old_form():
    """Its forward and its context are taken apart for the time of a computation."""
    apply = OldForm.apply
    model = ToyLM([ToyBlock(), ToyBlock(), OldFormBlock(), ToyBlock()])
    for number in range(4):
        assert_layerwise(right_form(model, f"blocks.{number}"))
    assert right_form(model, "blocks.0", kernel="whole")["form"] == "whole"
    with (
        pytest.raises(ValueError, match="no forward derivatives"),
        FisherModel(model, layers="blocks.0", top_k=3).linearize(*padded(prompts(LENGTHS), "right")),
    ):
        pass
    assert "apply" not in vars(OldForm) and OldForm.apply == apply


class OldFormOfManyKinds(torch.autograd.Function):
    """Whatever a context is used for: tensors, attributes, several inputs and outputs, None, gradients not needed."""

    @staticmethod
    def forward(ctx, x, power, y=None):
        ctx.power, ctx.with_y = power, y is not None
        ctx.save_for_backward(x, y)
        return x**power if y is None else x**power * y, x.detach()

    @staticmethod
    def backward(ctx, grad, _):
        x, y = ctx.saved_tensors
        slope = ctx.power * x ** (ctx.power - 1) * (y if ctx.with_y else 1.0)
        return grad * slope if ctx.needs_input_grad[0] else None, None, grad * x**ctx.power if ctx.with_y else None


class ManyKindsBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(self.norm2(x)))
        first, _ = OldFormOfManyKinds.apply(h, 3)
        second, _ = OldFormOfManyKinds.apply(h, 2, torch.sigmoid(h))
        return x + self.down(first + second)


@pytest.mark.parametrize("number", range(3))
def test_an_autograd_function_of_the_old_form_that_keeps_many_kinds_of_things(number):
    assert_layerwise(right_form(ToyLM([ManyKindsBlock() for _ in range(3)]), f"blocks.{number}"))


class OldFormByValue(OldForm):
    """Looks at its gradient's values, which no transformation allows."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.tanh(x) ** 2) if float(grad.abs().sum()) >= 0 else grad


class OldFormByValueBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return x + self.down(OldFormByValue.apply(self.up(self.norm2(x))))


def test_an_autograd_function_that_torch_func_cannot_transform():
    model = ToyLM([ToyBlock(), ToyBlock(), OldFormByValueBlock(), ToyBlock()])
    for number in (0, 1):
        form = right_form(model, f"blocks.{number}")
        assert form["form"] == "loop" and "disagreed with plain autograd" in form["why"]
    for number in (2, 3):
        assert_layerwise(right_form(model, f"blocks.{number}"))
    with pytest.raises(ValueError, match="whole kernel disagrees"):
        right_form(model, "blocks.0", kernel="whole")


class WrongUnderVmap(torch.autograd.Function):
    """A batching rule that is wrong: right in plain autograd, wrong by half under vmap."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return WrongPullback.apply(grad)


class WrongPullback(torch.autograd.Function):
    @staticmethod
    def forward(grad):
        return grad.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def vmap(info, in_dims, grad):
        return 0.5 * grad, in_dims[0]


class WrongBlock(ToyBlock):
    def think(self, x: Tensor) -> Tensor:
        return super().think(WrongUnderVmap.apply(x))


def test_a_batching_rule_that_is_wrong_is_caught_by_numbers(caplog):
    model = ToyLM([ToyBlock(), ToyBlock(), WrongBlock(), ToyBlock()])
    assert_caught_by_numbers(right_form(model, "blocks.1"), "loop")
    assert "layerwise kernel disagrees" in caplog.text and "whole kernel disagrees" in caplog.text


def test_a_kernel_asked_for_by_name_is_checked_however_often_it_is_asked_for():
    model = ToyLM([ToyBlock(), ToyBlock(), WrongBlock(), ToyBlock()])
    ids, mask = padded(prompts(LENGTHS), "right")
    for kernel, layers in (("layerwise", ["blocks.1", "blocks.1.norm1"]), ("whole", ["blocks.1"])):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"disagrees|cannot be trusted"):
                fisher_scores(model, ids, mask, layers=layers, top_k=4, kernel=kernel)
        with pytest.raises(ValueError, match="disagrees"):
            fisher_scores(model, ids, mask, layers="blocks.1", top_k=4, kernel=kernel)


# Heads.


class TanhHead(ToyLM):
    def read(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(super().read(x))


class ScaledInside(ToyLM):
    def read(self, x: Tensor) -> Tensor:
        return self.unembed(1.7 * self.norm(x))


class PositionalHead(ToyLM):
    """What follows the last block depends on where the token stands."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x) * torch.linspace(1, 2, 40)[: x.shape[1], None].to(x))


class VanishingHead(ToyLM):
    """Prompts of eight tokens, as the probe sees them, come out as zeros: what is proven on them is of nothing."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x) * (x.shape[1] != 8))


class CopyingHead(ToyLM):
    """Logits plus a term of the residual stream that does not go through the unembedding."""

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(x)) + x @ self.embed.weight.T / 6


class MixingNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None])


class BatchedNorm(nn.LayerNorm):
    """Takes three dimensions and no other number of them."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        return super().forward(x.view(B * T, D)).view(B, T, D)


class OtherNorm(ToyLM):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        norm.double().load_state_dict(self.norm.state_dict())
        self.norm = norm


class MixingHead(OtherNorm):
    """The final norm looks at all positions."""

    def __init__(self) -> None:
        super().__init__(MixingNorm(WIDTH))


class BatchedHead(OtherNorm):
    def __init__(self) -> None:
        super().__init__(BatchedNorm(WIDTH))


class LogitsOfTwoPositions(ToyLM):
    """Logits of the position before come in after the unembedding."""

    def read(self, x: Tensor) -> Tensor:
        logits = super().read(x)
        return logits + 0.5 * torch.nn.functional.pad(logits, (0, 0, 1, 0))[:, :-1]


class LowRankHead(nn.Linear):
    """A subclass of Linear that is not one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class SubclassHead(ToyLM):
    def __init__(self) -> None:
        super().__init__()
        head = LowRankHead(WIDTH, len(self.unembed.weight), bias=False).double()
        head.load_state_dict(self.unembed.state_dict())
        self.unembed = head


class NoOutputEmbeddings(ToyLM):
    def get_output_embeddings(self) -> None:
        return None


class TwoReadings(ToyLM):
    """A mixture of two softmaxes of one unembedding."""

    def read(self, x: Tensor) -> Tensor:
        both = torch.stack([self.unembed(self.norm(x)), self.unembed(self.norm(-x))])
        return both.log_softmax(-1).logsumexp(0)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (TanhHead, "not a scale or a soft-cap"),
        (CopyingHead, "not a scale or a soft-cap"),
        (MixingHead, "needs more than one position"),
        (PositionalHead, "needs more than one position"),
        (VanishingHead, "nothing reached the output embedding"),
        (LogitsOfTwoPositions, "not a scale or a soft-cap"),
        (SubclassHead, "LowRankHead, not a plain Linear"),
        (NoOutputEmbeddings, "NoneType, not a plain Linear"),
        (TwoReadings, "called 2 times"),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_a_head_that_is_not_of_the_common_kind(kind, why, number):
    form = right_form(kind(), f"blocks.{number}")
    assert form["form"] in ("whole", "loop") and why in form["why"] and form["why"]


class TransformedHead(ToyLM):
    """A layer of its own between the last block and the unembedding, written out in the model's code."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH).double()

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(self.norm(torch.nn.functional.gelu(self.dense(x))) / 1.3 + 0.1)


class NarrowedHead(TransformedHead):
    """The row that is unembedded is not as wide as the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.unembed = nn.Linear(20, len(self.unembed.weight)).double()

    def read(self, x: Tensor) -> Tensor:
        return self.unembed(2 * self.dense(self.norm(x))[..., :20])


@pytest.mark.parametrize("kind", [ScaledInside, TransformedHead, NarrowedHead])
@pytest.mark.parametrize("number", [0, 3])
def test_code_between_the_last_block_and_the_unembedding(kind, number):
    """No chain of modules, but a function of one row all the same: the model's own code, run again on the rows."""
    assert_layerwise(right_form(kind(), f"blocks.{number}"))


def test_a_model_whose_own_code_is_run_again_is_not_kept_alive():
    model = TransformedHead()
    assert_layerwise(right_form(model, "blocks.1"))
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_code_between_the_last_block_and_the_unembedding_runs_in_float32(caplog):
    rows, layer = prompts(LENGTHS), "blocks.2"
    narrow = TransformedHead().bfloat16()
    wide = copy.deepcopy(narrow).float()
    scores = fisher_scores(narrow, *padded(rows, "left"), layers=layer, top_k=4, precision="model")
    with torch.no_grad():
        for b, row in enumerate(rows):
            top = narrow.walk(narrow.embed(row[None])).float()
            expected = wide.read(top)[0, -1].log_softmax(0)[scores.token_ids[b]]
            torch.testing.assert_close(scores.log_probs[b], expected, atol=1e-5, rtol=0)
    assert not caplog.records


@pytest.mark.parametrize("number", [1, 3])
def test_a_norm_that_wants_three_dimensions(number):
    assert_layerwise(right_form(BatchedHead(), f"blocks.{number}"))


@pytest.mark.parametrize("kernel", ["whole", "loop"])
def test_heads_of_other_kinds_in_the_forms_asked_for(kernel):
    for kind in (TanhHead, MixingHead, TwoReadings):
        assert right_form(kind(), "blocks.1", kernel)["form"] == kernel
    with pytest.raises(ValueError, match=r"layerwise cannot be trusted with blocks\.1"):
        right_form(TanhHead(), "blocks.1", "layerwise")


# transformers' own models.


def look_back(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
    """Adds to each position something of the one before, as convolutions and token shifts do."""
    return output + 0.5 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]


def forget_positions(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "position_ids": None}


@pytest.mark.parametrize("fault", ["positions meet outside attention", "position ids are not heeded"])
def test_prompts_that_cannot_be_laid_end_to_end(fault):
    model, layer = fresh("gpt2"), "transformer.h.1"
    if fault.startswith("position ids"):
        model.transformer.register_forward_pre_hook(forget_positions, with_kwargs=True)
    else:
        model.get_submodule("transformer.h.2.mlp").register_forward_hook(look_back)
    opened = FisherModel(model, layers=layer, top_k=4)
    for lengths in ((1, 1, 1), LENGTHS):
        rows = prompts(lengths)
        assert_right(opened.scores(*padded(rows, "right")), model, rows, layer)
    assert opened.forms[layer]["form"] == "layerwise" and "disagreed" in opened.forms[layer]["why"]


def test_a_window_that_only_earlier_prompts_outgrow():
    """Prompts that are padded, since a window is short, prove nothing of those that are packed later."""
    model, layer = fresh("mistral"), "model.layers.1"
    model.get_submodule("model.layers.2.mlp").register_forward_hook(look_back)
    opened = FisherModel(model, layers=layer, top_k=4)
    for lengths in ((9, 12, 5), (2, 3, 1), (4, 4)):
        rows = prompts(lengths)
        assert_right(opened.scores(*padded(rows, "left")), model, rows, layer, 1e-6)
    assert opened.forms[layer]["form"] == "layerwise" and "packed disagreed" in opened.forms[layer]["why"]


def test_a_window_that_only_later_prompts_outgrow():
    model, layer = fresh("mistral"), "model.layers.1"
    for lengths in ((2, 3, 1), (3, 12, 5), (4, 4)):
        rows = prompts(lengths)
        assert_right(fisher_scores(model, *padded(rows, "left"), layers=layer, top_k=4), model, rows, layer, 1e-6)


def test_numbers_that_are_not_finite_decide_nothing(caplog):
    """A first batch that holds a prompt of NaN must not cost the later ones the fast form."""
    model, layer = fresh("llama"), "model.layers.1"
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = torch.nan
    spoilt, rows = [torch.tensor([5, 95, 3]), torch.tensor([1, 2, 3, 4])], prompts(LENGTHS, vocabulary=90)
    fisher_scores(model, *padded(spoilt, "right"), layers=layer, top_k=4)
    assert_right(fisher_scores(model, *padded(rows, "right"), layers=layer, top_k=4), model, rows, layer, 1e-6)
    assert FisherModel(model, layers=layer).forms[layer]["form"] in ("packed", "layerwise")


def assert_under_eager(opened: FisherModel, layer: str) -> None:
    form = opened.forms[layer]
    assert form["form"] == "layerwise" and "under eager attention" in form["why"]


def test_an_attention_of_ours_that_is_not_the_models_gives_way_to_the_plain_one(monkeypatch):
    """Caught by numbers: the blocks are whole, so layerwise is tried again, under transformers' own attention."""
    from fisher_vmap.kernels import hf_attention

    right = hf_attention._attention_forward
    monkeypatch.setattr(
        hf_attention,
        "_attention_forward",
        lambda module, q, k, v, mask, **kwargs: right(module, q, k, v, mask, **{**kwargs, "scaling": 0.5}),
    )
    for first in ("model.layers.1", "model.layers.1.mlp"):
        model, rows = fresh("llama"), prompts(LENGTHS)
        opened = FisherModel(model, layers=[first, "model.layers.2"], top_k=4)
        scores = opened.scores(*padded(rows, "left"))
        for layer in opened.layers:
            assert_right(scores, model, rows, layer, 1e-6)
        assert_under_eager(opened, "model.layers.2")
    monkeypatch.undo()
    hf_attention.register()  # transformers has the wrong one by that name


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "sparse_indices", "block_indices"])
def test_what_a_model_hands_to_attention_and_ours_does_not_heed(name):
    """Keys chosen by an index, say, of which no short prompt has too many: no number could tell."""
    from fisher_vmap.kernels.hf_attention import UnsupportedAttention, _attention_forward

    q = torch.randn(1, 2, 3, 4)
    _attention_forward(nn.Identity(), q, q, q, None, **{name: None})
    with pytest.raises(UnsupportedAttention, match=f"uses {name}"):
        _attention_forward(nn.Identity(), q, q, q, None, **{name: torch.zeros(1)})


def test_a_mask_that_is_computed_from_the_residual_stream():
    """Its gradient is not ours to drop."""
    from fisher_vmap.kernels.hf_attention import UnsupportedAttention, _attention_forward

    q = torch.randn(1, 2, 3, 4)
    mask = torch.zeros(1, 1, 3, 3)
    _attention_forward(nn.Identity(), q, q, q, mask)
    with pytest.raises(UnsupportedAttention, match="computes its mask"):
        _attention_forward(nn.Identity(), q, q, q, mask.requires_grad_())


class SelfMasking(ToyBlock):
    """Its mask depends on the residual stream: all that it does is through the block's own input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mask = self.norm1(hidden_states)[..., :1].mT
        return self.think(self.attend(hidden_states, *self.keys_and_values(hidden_states), mask=mask))


@pytest.mark.parametrize("number", range(4))
def test_a_block_that_masks_by_what_it_reads(number):
    assert_layerwise(right_form(ToyLM([SelfMasking() for _ in range(4)]), f"blocks.{number}"))


class SteppedLogits(ToyLM):
    """A soft-cap that the config does not tell: at large logits the identity is off by much, at small ones not."""

    cap = 30.0

    def read(self, x: Tensor) -> Tensor:
        return self.cap * torch.tanh(super().read(x) / self.cap)


@pytest.mark.parametrize("name", ["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"])
@pytest.mark.parametrize("size", [0.05, 1.0, 40.0])
def test_a_soft_cap_by_whatever_name_the_config_has_for_it(name, size):
    model = SteppedLogits()
    setattr(model.config, name, model.cap)
    with torch.no_grad():
        model.unembed.weight.mul_(size)
    assert_layerwise(right_form(model, "blocks.1"))


def test_a_model_without_a_config():
    model = ToyLM()
    del model.config
    assert_layerwise(right_form(model, "blocks.1"))


@pytest.mark.parametrize("size", [0.05, 1.0, 40.0])
def test_a_soft_cap_that_the_config_does_not_tell(size):
    model = SteppedLogits()
    with torch.no_grad():
        model.unembed.weight.mul_(size)
    form = right_form(model, "blocks.1")
    assert form["form"] == "whole" and "not a scale or a soft-cap" in form["why"]


class GatedNorm(nn.Module):
    """A norm that takes a gate as well: what it does on one input says nothing of what it does on two."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x if gate is None else x * torch.sigmoid(gate)


class GatedBlock(ToyBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = GatedNorm()

    def think(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm2(x, gate=x))))


@pytest.mark.parametrize("number", range(3))
def test_a_norm_that_is_given_more_than_its_input(number):
    assert_layerwise(right_form(ToyLM([GatedBlock() for _ in range(3)]), f"blocks.{number}"))


class Reversible(torch.autograd.Function):
    """Runs a block without a graph and forgets what a backward would need."""

    @staticmethod
    def forward(ctx, x, block):
        return block(x)

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("training mode only")


class ReversibleLM(ToyLM):
    def walk(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = Reversible.apply(x, block)
        return x


def test_a_model_without_gradients_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"ReversibleLM cannot be differentiated .* blocks\.1") as caught:
        fisher_scores(ReversibleLM(), *padded(prompts(LENGTHS), "right"), layers=1, top_k=4)
    assert "\n" not in str(caught.value)


def test_keys_and_values_shared_across_blocks_of_a_real_model():
    from models import draw
    from transformers import AutoModelForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=101, vocab_size_per_layer_input=101, hidden_size=36, intermediate_size=58, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, head_dim=6, hidden_size_per_layer_input=5, laurel_rank=3,
        num_kv_shared_layers=2, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4, max_position_embeddings=128,
    )  # fmt: skip
    model = draw(AutoModelForCausalLM.from_config(config).eval(), 0)
    scores_of = FisherModel(model, layers="model.layers.1.mlp", top_k=4)
    rows = prompts(LENGTHS)
    scores = scores_of.scores(*padded(rows, "right"))
    assert scores_of.forms["model.layers.1.mlp"]["form"] == "whole"
    assert_right(scores, model, rows, "model.layers.1.mlp", 1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_real_models_blocks_are_whole_and_the_form_is_told(family):
    opened = FisherModel(fresh(family), layers=[0, -1], top_k=3)
    assert opened.forms == {}
    opened.scores(*padded(prompts(LENGTHS), "right"))
    for form in opened.forms.values():
        assert form["form"] in ("packed", "layerwise") and form["why"].startswith("the chain of blocks is whole")
