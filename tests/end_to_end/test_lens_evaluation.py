"""The evaluation of a lens: its numbers on a tiny model by plain means, and what its page says of them."""

import copy
import re

import pytest
import torch
from models import block, prompts, tiny, word_tokenizer

from benchmarks.lens_evaluation import JACOBIAN, KINDS, LOGIT, SMALL, cut, evaluate, stepped
from benchmarks.lens_evaluation_page import draw, page
from fisher_vmap import FisherModel, steer
from fisher_vmap.lens.jacobian_lens import JacobianLens
from fisher_vmap.lens.matrices import prompt_matrices

SKIP, T = 3, 14
LAYERS = [0, 1, 2]
TEXTS = torch.stack(prompts([T, T, T], seed=5))


@pytest.fixture(scope="module")
def fisher():
    return FisherModel(tiny("llama", torch.float32), layers=LAYERS)


@pytest.fixture(scope="module")
def lens(fisher):
    """Of two short prompts."""
    found = prompt_matrices(fisher, [ids.tolist() for ids in prompts([9, 12])], skip_first=SKIP)
    names = [block("llama", n) for n in LAYERS]
    jacobians = {n: sum(one.jacobians[name] for one in found).float() / 2 for n, name in enumerate(names)}
    return JacobianLens(jacobians, 2, sum(one.metric for one in found).float() / 2, metadata={"skip_first": SKIP})


@pytest.fixture(scope="module")
def kept(fisher, lens):
    *_, found = evaluate(fisher, lens, TEXTS, step_texts=2, step_layers=2, draws=3, seed=0)
    machine = {"cores": 2, "cpu_capability": "AVX512", "torch": "2"}
    return found | {"about": {"name": "tiny", "lens_prompts": 2, "machine": machine}, "seconds": 1}


def plain(model, ids_BT):
    with torch.no_grad():
        return model(input_ids=ids_BT, use_cache=False).logits[:, SKIP:-1].double().log_softmax(2)


def test_what_is_read_is_compared_with_the_model(kept, fisher, lens):
    model, following = fisher.model, TEXTS[:, SKIP + 1 :]
    log_p = plain(model, TEXTS)
    assert kept["positions"] == log_p.shape[0] * log_p.shape[1]
    outputs = []
    handle = model.get_submodule(block("llama", 1)).register_forward_hook(
        lambda _m, _i, out: outputs.append((out if isinstance(out, torch.Tensor) else out[0])[:, SKIP:-1])
    )
    plain(model, TEXTS)
    handle.remove()
    for name, J in ((LOGIT, torch.eye(lens.d_model)), (JACOBIAN, lens.of(1))):
        with torch.no_grad():
            log_q = model.lm_head(model.model.norm(outputs[0] @ J.T)).double().log_softmax(2)
        kl = (log_p.exp() * (log_p - log_q)).sum(2)
        place = log_q.sort(2, descending=True).indices.eq(following[:, :, None]).float().argmax(2) + 1
        told = kept["layers"]["1"][name]
        assert told["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
        assert told["kl_median"] == pytest.approx(float(kl.flatten().median()), rel=1e-3)
        assert told["rank_median"] == float(place.flatten().median())
        assert told["top10"] == pytest.approx(float((place <= 10).float().mean()))
    place = log_p.sort(2, descending=True).indices.eq(following[:, :, None]).float().argmax(2) + 1
    assert kept["model"]["top10"] == pytest.approx(float((place <= 10).float().mean()))


def test_a_step_is_what_steer_does(kept, fisher, lens):
    model, some = fisher.model, TEXTS[:2]
    rows = kept["steps"]["2"]["directions"]
    assert [row["kind"] for row in rows] == [kind for kind, count in KINDS.items() for _ in range(count)]
    sensitive = lens.sensitive_directions(2, 1).directions[0]
    row = rows[-KINDS["sensitive directions"]]
    assert row["predicted"] == pytest.approx(lens.sensitivity(sensitive, 2), rel=1e-6)
    length = (SMALL / row["predicted"]) ** 0.5
    mask = torch.zeros_like(some)
    mask[:, SKIP:-1] = 1
    log_p = plain(model, some)
    with steer(model, 2, sensitive, length, residual_norm=1.0, positions=mask):
        log_q = plain(model, some)
    kl = (log_p.exp() * (log_p - log_q)).sum(2).mean()
    assert row["measured"] == pytest.approx(float(kl) / length**2, rel=0.02)


def test_the_last_layer_alone_is_linear_enough(fisher):
    """A lens of one position's J and C predicts the KL there: fitted on the text that is stepped."""
    text = TEXTS[:1, : SKIP + 2]
    (found,) = prompt_matrices(fisher, [text[0].tolist()], skip_first=SKIP)
    J = {2: found.jacobians[block("llama", 2)].float()}
    lens = JacobianLens(J, 1, found.metric.float(), metadata={"skip_first": SKIP})
    *_, told = evaluate(fisher, lens, text, step_texts=1, step_layers=1, draws=1, seed=0)
    assert told["steps"]["2"]["ratio"] == pytest.approx(1, rel=0.05)
    assert told["steps"]["2"]["spearman"] > 0.95
    assert told["orders"]["2"]["kl"] > 0.99 * told["orders"]["2"]["most"]


def test_orders_hold_no_more_than_the_most(kept):
    for held in kept["orders"].values():
        assert all(0 < share <= held["most"] + 1e-6 <= 1 + 2e-6 for share in held.values())


def test_a_step_of_nothing_changes_nothing(fisher):
    outputs = torch.randn(2, T, fisher.widths[block("llama", 1)], generator=torch.Generator().manual_seed(0))
    zero = torch.zeros_like(outputs[:, 0])
    once, again = (stepped(fisher, 1, outputs, zero, slice(SKIP, T - 1)) for _ in range(2))
    assert torch.equal(once, again) and fisher.model.get_submodule(block("llama", 0)) is not None
    assert type(fisher.model.get_submodule(block("llama", 0))).__name__ == "LlamaDecoderLayer"


def test_texts_are_cut_and_short_ones_passed_over():
    tokenizer = word_tokenizer()
    found = cut(["w1 w2", "w3 w4 w5 w6", "w7 w8 w9"], tokenizer, 2, 3)
    assert found.tolist() == [[5, 6, 7], [9, 10, 11]]
    with pytest.raises(ValueError, match="1 of 2 texts have 3 tokens; expected 2"):
        cut(["w1 w2", "w3 w4 w5 w6"], tokenizer, 2, 3)


def test_the_page_says_what_the_numbers_say(kept, tmp_path):
    draw(kept, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    told = page(kept)
    assert not re.search(r"[{}]|nan|None", told)
    numbers = copy.deepcopy(kept)
    for of in numbers["layers"].values():
        of[JACOBIAN], of[LOGIT] = ({"kl_median": x, "kl_mean": x, "rank_median": 5.0, "top10": 1 / x} for x in (2, 4))
    for of in numbers["steps"].values():
        of["ratio"], of["spearman"] = 7.0, 0.5
    told = page(numbers)
    assert "nearer to the model at 3 of 3 layers" in told and "as near or nearer in the median KL at no layer" in told
    assert "more than a factor of 2 at layers 0 (7), 2 (7)" in told and "below 0.8 at layers 0 (0.50), 2 (0.50)" in told
    swapped = copy.deepcopy(numbers)
    for of in swapped["layers"].values():
        of[JACOBIAN], of[LOGIT] = of[LOGIT], of[JACOBIAN]
    assert "nearer to the model at 0 of 3 layers" in page(swapped)
    assert "median KL at layers 0, 1, 2" in page(swapped)
