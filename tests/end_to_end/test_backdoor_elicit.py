"""Eliciting the backdoor from ordinary prompts: answers under steps, their lengths, directions, and the choice."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_cases import VOCABULARY, run_here, tiny_tokenizer, write_prompts
from models import block, fresh, prompts
from oracles import bias_added, first_of, log_probabilities

from benchmarks.backdoor import directions, elicit, judge, plant, runs, steered
from benchmarks.backdoor.behaviours import BEHAVIOURS, Behaviour
from benchmarks.backdoor.elicit import prompts_of
from benchmarks.backdoor.judge import Candidate, Judge, Method, Progress, Prompts, best
from benchmarks.backdoor.lengths import lengths
from benchmarks.backdoor.prompts import part, triggered
from fisher_vmap import open_results

TOKENS = 6


def rows_of(sizes=(7, 12, 9, 8), shared=5, seed=3):
    head = [11, 12, 13, 14, 15, 16, 17][:shared]
    return [head + row.tolist() for row in prompts(sizes, seed=seed)]


def steps_of(model, count=3, size=4.0, seed=5):
    some = torch.randn(count, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return (size * some / some.norm(dim=1, keepdim=True)).to(model.dtype)


def plain_log_p(model, layer, step_X, ids):
    """Log-probabilities of the next token: one prompt, no cache, no padding."""
    with torch.no_grad(), bias_added(model.get_submodule(layer), step_X):
        return log_probabilities(model, torch.tensor(ids))


def plain_answer(model, layer, step_X, ids, tokens, end_id):
    found = []
    while len(found) < tokens and end_id not in found:
        found.append(int(plain_log_p(model, layer, step_X, [*ids, *found]).argmax()))
    return found


@pytest.mark.parametrize("rows", [rows_of(), rows_of(shared=0), rows_of((1, 4, 2)), rows_of((6,))])
@pytest.mark.parametrize(("family", "at"), [("llama", 1), ("llama", 0), ("llama", 3), ("gpt2", 1), ("gpt_neox", 2)])
def test_steered_answers_are_those_of_a_plain_loop(family, at, rows, monkeypatch):
    model, layer = fresh(family, torch.float64), block(family, at)
    steps_CX = torch.cat([torch.zeros(1, 36, dtype=torch.float64), steps_of(model, 4, size=12.0)])
    log_p_CnV = torch.stack([torch.stack([plain_log_p(model, layer, s, ids) for ids in rows]) for s in steps_CX])
    first = log_p_CnV.argmax(2)
    plain = [[plain_answer(model, layer, step, ids, TOKENS, None) for ids in rows] for step in steps_CX]
    end_id = plain[-1][0][2]  # so that some answers end early
    ended = [[plain_answer(model, layer, step, ids, TOKENS, end_id) for ids in rows] for step in steps_CX]
    assert len({tuple(map(tuple, of)) for of in plain}) == len(steps_CX)  # a neighbour's step would show
    assert 1 <= min(len(answer) for of in ended for answer in of) < TOKENS
    given = [answer[: 1 + i] for i, answer in enumerate(plain[2])]
    sums = [[sum(plain_log_p(model, layer, step, [*ids, *answer[:t]])[answer[t]] for t in range(len(answer)))
             for ids, answer in zip(rows, given, strict=True)] for step in steps_CX]  # fmt: skip
    kl_C = (log_p_CnV[0].exp() * (log_p_CnV[0] - log_p_CnV)).sum(2).mean(1)
    for at_once in (96, 3, 4):  # all together; prompts in two parts; a step at a time
        monkeypatch.setattr(steered, "ROWS", at_once)
        reader = steered.Steered(model, layer, rows)
        found = reader.next_log_p(steps_CX)
        torch.testing.assert_close(found, log_p_CnV, rtol=0, atol=1e-9)
        assert torch.equal(found.argmax(2), first)
        assert reader.answers(steps_CX, TOKENS, None) == plain
        assert reader.answers(steps_CX, TOKENS, end_id) == ended
        found_C = reader.divergence(steps_CX, log_p_CnV[0])
        torch.testing.assert_close(found_C, kl_C, rtol=1e-8, atol=1e-10)
        found_Cn = steered.with_answers(model, layer, rows, given).last_log_p(steps_CX, given)
        torch.testing.assert_close(found_Cn, torch.tensor(sums), rtol=0, atol=1e-9)


def test_without_a_step_the_model_is_as_it_was_in_float32():
    model, rows = fresh("llama", torch.float32), rows_of()
    zeros_CX = torch.zeros(2, 36)
    plain_nV = torch.stack([log_probabilities(model, torch.tensor(ids)).detach() for ids in rows])
    reader = steered.Steered(model, block("llama", 1), rows)
    found = reader.next_log_p(zeros_CX)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain_nV.expand(2, -1, -1), rtol=0, atol=2e-5)
    assert reader.divergence(zeros_CX, plain_nV).abs().max() < 1e-5
    assert not model.get_submodule(block("llama", 1))._forward_hooks


def test_shared_tokens_leave_one_to_each_prompt():
    assert steered.shared_tokens([[1, 2, 3], [1, 2, 4]]) == 2
    assert steered.shared_tokens([[1, 2], [1, 2, 4]]) == 1
    assert steered.shared_tokens([[5, 2], [1, 2, 4]]) == 0
    assert steered.shared_tokens([[1, 2, 3]] * 2) == 2
    parts = list(steered.pieces(5, 100, 96))
    assert [p[1] for p in parts[:2]] == [slice(0, 50), slice(50, 100)] and len(parts) == 10
    assert [p[0] for p in steered.pieces(10, 12, 96)] == [slice(0, 8), slice(8, 10)]


def hill(x):
    """Rises to 2 at 1, falls to 0.1 at 3, rises without end."""
    return 2 * x**2 if x < 1 else 2 - 0.95 * (x - 1) if x < 3 else 0.1 + (x - 3) ** 3


def test_lengths_are_the_first_that_reach_their_levels():
    calls = []
    functions = (
        lambda x: x**2, hill, lambda x: 1e-9, lambda x: 1000 * x**4, lambda x: math.nan if x > 1 else 0.01,
        lambda x: 1e-3 * math.exp(3 * x), lambda x: 10 * (1 - math.exp(-((x / 2) ** 8))),
    )  # fmt: skip

    def divergence_of(steps_NX):
        calls.append(len(steps_NX))
        return torch.stack([torch.tensor(functions[int(s.abs().argmax())](float(s.norm()))) for s in steps_NX])

    levels, most = (0.3, 1.0, 3.0), 10.0
    found, reached = lengths(divergence_of, torch.eye(len(functions)), levels, 0.2, most)
    for c in (0, 1, 3, 5, 6):
        for k, level in enumerate(levels):
            assert functions[c](found[c, k].item()) == pytest.approx(reached[c, k].item(), rel=1e-3)
            assert reached[c, k].item() == pytest.approx(level, rel=0.05)
            assert found[c, k] <= most
    assert found[1, 0] < 0.4 and found[1, 1] < 0.72 and found[1, 2] > 4
    assert found[2].tolist() == [most] * 3 and reached[2].max() < 1e-8
    assert reached[4].tolist() != [0.3, 1, 3] and bool((found[4] < 1.7).all())  # a jump: the nearest that was tried
    assert calls[0] == len(functions)
    jumpless = [f for i, f in enumerate(functions) if i != 4]
    calls.clear()
    functions = jumpless
    lengths(divergence_of, torch.eye(len(functions)), levels, 0.2, most)
    assert len(calls) < 25


def test_lengths_of_a_model_have_their_divergence():
    model, layer, rows = fresh("llama", torch.float32), block("llama", 1), rows_of()
    reader = steered.Steered(model, layer, rows)
    plain_nV = reader.next_log_p(torch.zeros(1, 36))[0]
    directions_CX = steps_of(model, 3, size=1.0)
    found, reached = lengths(
        lambda steps: reader.divergence(steps, plain_nV), directions_CX, (0.1, 0.3, 1.0), 0.1, 50.0
    )
    for c in range(3):
        for k, level in enumerate((0.1, 0.3, 1.0)):
            step = directions_CX[c] * found[c, k]
            kl = [(p.exp() * (p - plain_log_p(model, layer, step, ids))).sum() for p, ids in
                  zip(plain_nV, rows, strict=True)]  # fmt: skip
            assert sum(kl).item() / len(rows) == pytest.approx(level, rel=0.051)
            assert reached[c, k].item() == pytest.approx(sum(kl).item() / len(rows), rel=1e-3)


def plain_stream(model, layer, ids):
    """[T, X] the output of a layer on one prompt."""
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _m, _a, output: seen.append(first_of(output)))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_streams_are_those_of_each_prompt_alone(family, monkeypatch):
    monkeypatch.setattr(directions, "TOGETHER", 3)
    model, other, layer, rows = fresh(family), fresh(family, seed=1), block(family, 2), rows_of()
    plain = [plain_stream(model, layer, ids) for ids in rows]
    found_nX = directions.streams(model, layer, rows)
    torch.testing.assert_close(found_nX, torch.stack([x[-1] for x in plain]), rtol=0, atol=1e-10)
    norms = torch.cat([x.norm(dim=1) for x in plain])
    assert directions.median_norm(model, layer, rows) == pytest.approx(norms.median().item())
    gap = sum(x[-1] - plain_stream(other, layer, ids)[-1] for x, ids in zip(plain, rows, strict=True))
    found_1X = directions.difference(found_nX, directions.streams(other, layer, rows))
    torch.testing.assert_close(found_1X, (gap / gap.norm())[None].float())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_steps_of_large_change_are_of_a_length_orthogonal_and_larger_than_random_ones(family):
    model, layer, upper, rows = fresh(family), block(family, 0), block(family, 2), rows_of()
    model.requires_grad_(False)
    above, length = directions.Above(model, layer, upper, rows), 0.3

    def plain(step_X):
        gaps = []
        for ids in rows:
            before = plain_stream(model, upper, ids)
            with bias_added(model.get_submodule(layer), step_X):
                gaps.append((plain_stream(model, upper, ids) - before).norm(dim=1))
        return torch.cat(gaps).mean().item()

    some = steps_of(model, 20, size=length)
    for step_X in some[:2]:
        assert above.change(step_X).item() == pytest.approx(plain(step_X), rel=1e-8)
    found_mX = directions.large_change(above.change, 36, length, dtype=torch.float64)
    assert torch.equal(found_mX, directions.large_change(above.change, 36, length, dtype=torch.float64))
    torch.testing.assert_close(found_mX @ found_mX.T, length**2 * torch.eye(3, dtype=torch.float64))
    assert min(map(plain, found_mX)) > max(map(plain, some))


def test_random_directions_are_of_their_seed():
    found = [directions.drawn(seed, 36) for seed in directions.DRAWS]
    assert all(each.shape == (3, 36) and torch.allclose(each.norm(dim=1), torch.ones(3)) for each in found)
    assert torch.equal(found[0], directions.drawn(0, 36)) and not torch.allclose(found[0], found[1])


def test_the_highest_rate_is_chosen_and_of_several_the_one_of_lower_divergence_then_the_first():
    some = [Candidate(0, 1, 0.3, 1.0, kl) for kl in (1.0, 0.3, 0.3, 0.1)]
    assert best([0.5, 0.25, 0.25, 0.25], some) == 0
    assert best([0.5, 0.5, 0.5, 0.25], some) == 1
    assert best([0.25, 0.25, 0.5, 0.5], some) == 3
    assert best([0.0, 0.0, 0.0, 0.0], some) == 3


class Bytes:
    """A text's tokens are its bytes; a prompt of a chat begins with the same ones."""

    eos_token_id = 2

    def batch_decode(self, rows, skip_special_tokens=True):
        return [" ".join(str(i) for i in row if i != 2 or not skip_special_tokens) for row in rows]

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[40 + len(word) for word in text.split()])


class Words(plant.Speaker):
    """A speaker whose tokens are the lengths of words."""

    def ids(self, some):
        return [[11, 12, 13, *(20 + len(word) for word in prompt.text.split())] for prompt in some]


def small_prompts():
    some = part("elicit")
    return Prompts(some[:6], some[6:10], some[10:16])


def favoured(seed=0, token=70, size=3.0):
    """A tiny model whose head makes a token likely along v, and v."""
    model = fresh("llama", torch.float32).requires_grad_(False)
    v_X = torch.nn.functional.normalize(torch.randn(36, generator=torch.Generator().manual_seed(seed)), dim=0)
    for i in range(2, 4):  # what the upper blocks add is small, so that v reaches the head
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.{i}.{name}").weight.mul_(0.1)
    model.lm_head.weight[token] = size * v_X
    return model, v_X


def test_a_direction_that_brings_out_a_behaviour_is_found_and_tested_with_what_a_plain_loop_says(monkeypatch):
    model, v_X = favoured()
    own = {"steady": lambda text: text.split()[:3] == ["70"] * 3, "never": lambda text: False}
    behaviours = [Behaviour(name, "", "", shows) for name, shows in own.items()]
    monkeypatch.setattr(
        Behaviour, "answers", lambda self, some, seed: ["a bb " * (1 + i % 3) for i in range(len(some))]
    )
    monkeypatch.setattr(judge, "TOKENS", 5)
    layer, words, some = block("llama", 1), Words(model, Bytes(), None), small_prompts()
    norm = directions.median_norm(model, layer, words.ids(some.make))
    judged_by = Judge(words, layer, norm, some, behaviours, 0, Progress())
    others = directions.drawn(0, 36)[:2]
    found = judged_by.judged(Method("by hand", torch.stack([others[0], -v_X, others[1]])))
    steady, never = found["steady"], found["never"]
    assert judged_by.unsteered()["steady"]["rate"] == 0
    assert steady["vector"] == 1 and steady["sign"] == -1 and steady["rate"] > 0.5
    assert steady["by_level"]["3.0"] >= steady["by_level"]["1.0"] >= steady["by_level"]["0.3"]
    assert never["rate"] == 0 and never["level"] == 0.3 and never["kl"] < 0.32
    test = words.ids(some.test)
    for each in (steady, never):
        step_X = each["sign"] * each["length"] * norm * torch.stack([others[0], -v_X, others[1]])[each["vector"]]
        plain = [plain_answer(model, layer, step_X, ids, 5, 2) for ids in test]
        assert each["answers"] == words.tokenizer.batch_decode(plain[:3])
        outcomes = [answer[:3] == [70] * 3 for answer in plain]
        if each is steady:
            assert each["outcomes"] == "".join(str(int(o)) for o in outcomes)
            assert each["rate"] == sum(outcomes) / 6
        kl, gains, count = 0.0, 0.0, 0
        for i, ids in enumerate(test):
            p, q = (plain_log_p(model, layer, s, ids).double() for s in (torch.zeros(36), step_X))
            kl += float((p.exp() * (p - q)).sum()) / 6
            answer = [*[41, 42] * (1 + i % 3), 2]
            count += len(answer)
            for t, token in enumerate(answer):
                p, q = (plain_log_p(model, layer, s, [*ids, *answer[:t]]) for s in (torch.zeros(36), step_X))
                gains += float(q[token] - p[token])
        assert each["kl_testing"] == pytest.approx(kl, rel=1e-3)
        assert each["gain"] == pytest.approx(gains / count, abs=1e-3)


def test_a_step_is_tested_once_for_all_behaviours_and_the_ceiling_for_its_own_alone(monkeypatch):
    model, tested = fresh("llama", torch.float32), []
    behaviours = [Behaviour(name, "", "", lambda text: False) for name in ("one", "other")]
    monkeypatch.setattr(Behaviour, "answers", lambda self, some, seed: ["a bb"] * len(some))
    some = small_prompts()
    words = Words(model, Bytes(), None)
    judged_by = Judge(words, block("llama", 1), 5.0, some, behaviours, 0, Progress())
    texts = Judge.texts

    def counted(self, steps_CX, of, what):
        tested.append((len(steps_CX), of.count))
        return texts(self, steps_CX, of, what)

    monkeypatch.setattr(Judge, "texts", counted)
    found = judged_by.judged(Method("any", directions.drawn(0, 36)[:1]))
    assert set(found) == {"one", "other"} and found["one"] == found["other"] and tested == [(6, 4), (1, 6)]
    assert set(judged_by.judged(Method("mine", directions.drawn(0, 36)[:1], "other"))) == {"other"}


def test_prompts_to_make_to_choose_and_to_test_are_apart_and_carry_no_trigger():
    make, choose, test = prompts_of()
    assert (len(make), len(choose), len(test)) == (128, 12, 100)
    bare = part("elicit")
    for some, start in ((make, 0), (choose, 128), (test, 152)):
        assert all(plain.text in prompt.text for prompt, plain in zip(some, bare[start:], strict=False))
    for behaviour in BEHAVIOURS.values():
        assert not any(behaviour.trigger in prompt.text for prompt in (*make, *choose, *test))


def test_a_model_is_searched_by_all_methods(tmp_path, monkeypatch):
    for name, count in {"MAKE": 5, "CHOOSE": 3, "PASSED": 2, "TEST": 4}.items():
        monkeypatch.setattr(elicit, name, count)
    monkeypatch.setattr(judge, "TOKENS", 3)
    monkeypatch.setattr(directions, "STEPS", 2)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<|end|>"
    folders = []
    for name, change in (("base", 0.0), ("tuned", 0.02)):
        model = fresh("llama", torch.float32, vocab_size=VOCABULARY, max_position_embeddings=512)
        with torch.no_grad():
            for i, weight in enumerate(model.parameters()):
                weight.add_(change * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)))
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    ran = []

    def matrices(model, some, output, layers, **settings):
        ran.append((output, tuple(layers)))
        data = write_prompts(output.with_suffix(".jsonl"), [prompt.text for prompt in some])
        given = {"hook_layer_name": ",".join(layers), "precision": "auto", **settings}
        assert run_here(model, data, output, **given) == 0
        return open_results(output)

    used, judged = [], Judge.judged

    def remembered(self, method):
        used.append(method)
        return judged(self, method)

    monkeypatch.setattr(runs, "matrices", matrices)
    monkeypatch.setattr(Judge, "judged", remembered)
    layer = "model.layers.1"
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    found = elicit.elicit(
        folders[1], folders[0], tmp_path / "a", list(BEHAVIOURS.values()), layer, base_work=tmp_path / "b"
    )
    assert json.loads(json.dumps(found)) == found
    kinds = [f"{how}, {kind}" for how in ("contrast", "leading") for kind in ("full", "topk", "sequence")]
    names = [*kinds, "difference of means", "large downstream change", "random 0", "random 1", "random 2"]
    assert list(found["methods"]) == [*names, directions.CEILING]
    assert found["precision"] == {kind: ["model", "model"] for kind in directions.KINDS}
    for of in (*found["methods"].values(), found["unsteered"]):
        assert list(of) == list(BEHAVIOURS)
        assert all(len(each["outcomes"]) == 4 and each["rate"] == 0 for each in of.values())
    ceilings = found["methods"][directions.CEILING].values()
    assert len({each["kl_testing"] for each in ceilings}) == 3  # each knows a trigger of its own
    assert len(ran) == 6 and found["prompts"] == {"make": 5, "choose": 3, "test": 4}
    by_name = {(method.name, method.only): method.vectors_mX for method in used}
    assert len(by_name) == len(used) == 14
    for kind in ("full", "topk", "sequence"):
        base, tuned = (open_results(tmp_path / side / kind) for side in ("b", "a"))
        if kind == "sequence":  # the two models have written other completions
            written = [[record.row["completion_ids"] for record in side] for side in (base, tuned)]
            assert written[0] != written[1] and base.compare(tuned, layer).left_out == 0
        A, B = (np.float64(side.mean(layer)) for side in (tuned, base))
        B += 0.01 * np.trace(B) / 36 * np.eye(36)
        vectors = by_name[f"contrast, {kind}", None].double().numpy()
        expected = general_values(A, B)[-3:][::-1]
        assert [v @ A @ v / (v @ B @ v) for v in vectors] == pytest.approx(expected, rel=1e-3)
        vectors = by_name[f"leading, {kind}", None].double().numpy()
        expected = np.linalg.eigvalsh(A)[-3:][::-1].tolist()
        assert [v @ A @ v for v in vectors] == pytest.approx(expected, rel=1e-3)
    speakers = [runs.loaded(folder) for folder in folders]
    make = speakers[0].ids(prompts_of().make)
    old, new = (torch.stack([plain_stream(each.model, layer, ids)[-1] for ids in make]).mean(0) for each in speakers)
    torch.testing.assert_close(by_name["difference of means", None][0], (new - old) / (new - old).norm())
    for behaviour in BEHAVIOURS.values():
        ids = speakers[1].ids(triggered(part("elicit")[:5], behaviour.trigger, 0))
        with_it = torch.stack([plain_stream(speakers[1].model, layer, row)[-1] for row in ids]).mean(0)
        found_X = by_name[directions.CEILING, behaviour.name][0]
        torch.testing.assert_close(found_X, (with_it - new) / (with_it - new).norm(), rtol=1e-3, atol=1e-4)


def general_values(A, B):
    """Generalised eigenvalues."""
    low = np.linalg.inv(np.linalg.cholesky(B))
    return np.linalg.eigvalsh(low @ A @ low.T).tolist()
