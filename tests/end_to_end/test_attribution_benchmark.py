"""The evaluation of attribution: its texts, its methods on a tiny model, and what its page says of who wins."""

from itertools import islice

import numpy as np
import pytest
import torch
from models import prompts, tiny
from oracles import bias_added, log_probabilities

from benchmarks import attribution
from benchmarks.attribution_page import METHODS, REMOVALS, page
from benchmarks.attribution_texts import BETWEEN, KINDS, texts
from benchmarks.workloads import Workload


@pytest.fixture(scope="module")
def net():
    model = tiny("llama", torch.float32)
    embedding = model.get_input_embeddings().weight.detach()
    return attribution.Opened(Workload("tiny", model, None), embedding, embedding.mean(0))


@pytest.fixture(params=[(5, 1), (12, 2), (23, 3)], ids=lambda p: f"{p[0]} tokens")
def case(request, net):
    (ids,) = prompts((request.param[0],), seed=request.param[1])
    log_p = log_probabilities(net.workload.model, ids).detach()
    return attribution.Case(next(texts("name")), ids, 1, int(log_p.argmax()), float(log_p.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_asks_for_its_cue_and_has_it_once(kind):
    first = list(islice(texts(kind), 40))
    assert first == list(islice(texts(kind), 40)) and len({text.text for text in first}) == 40
    assert first != list(islice(texts(kind, seed=1), 40))
    for text in first:
        assert text.text[text.start : text.stop] == text.cue and text.text.count(text.cue) == 1
        assert not text.text.endswith(".") and text.text.split(". ")[1] + "." in BETWEEN


def test_one_token_is_the_packages_number_for_it(net, case):
    attribution.check(net, case)
    scope, one = attribution.fisher_scope(net, case), attribution.one_token(net, case)
    assert scope.shape == one.shape == case.ids.shape and (scope >= one * (1 - 1e-4)).all()


def test_integrated_gradients_add_up_to_the_change(net, case):
    with torch.no_grad():
        start = net.log_p(net.mean.expand(1, len(case.ids), -1))[0, case.top]
    total = attribution.integrated_gradients(net, case).sum()
    assert float(total) == pytest.approx(case.log_p - float(start), rel=0.1)


def test_gradient_x_input_is_the_change_to_first_order(net, case):
    x, _ = attribution.gradient(net, case)
    number = attribution.gradient_x_input(net, case)
    for place in (0, len(case.ids) - 1):
        moved = x.clone()
        moved[place] *= 1 + 1e-3
        with torch.no_grad():
            change = float(net.log_p(moved[None])[0, case.top]) - case.log_p
        assert change == pytest.approx(1e-3 * float(number[place]), rel=0.05, abs=2e-5)


def test_what_is_removed_is_gone(net, case):
    T = len(case.ids)
    removed = [[1], [T - 2]]
    found = attribution.drops(net, case, removed)
    for i, (place,) in enumerate(removed):
        shorter, model = torch.cat([case.ids[:place], case.ids[place + 1 :]]), net.workload.model
        to_the_mean = torch.zeros(len(case.ids), net.mean.shape[0])
        to_the_mean[place] = net.mean - net.embedding[case.ids[place]]
        with torch.no_grad():
            deleted = case.log_p - float(log_probabilities(model, shorter)[case.top])
            with bias_added(model.get_input_embeddings(), to_the_mean):
                mean = case.log_p - float(log_probabilities(model, case.ids)[case.top])
        assert found["deleted"][i] == pytest.approx(deleted, abs=1e-4)
        assert found["mean"][i] == pytest.approx(mean, abs=1e-4)
    assert list(found) == list(REMOVALS)


@pytest.mark.parametrize("stopped", [0, 1, 7, 30, 100])
def test_a_run_that_was_stopped_goes_on_to_the_same_texts(stopped):
    """Two workers, whose texts come back in their order; every third text is not completed by its cue."""

    def fill(rows, most):
        begun = []
        for _ in range(most):
            while len(begun) < 2 and (task := attribution.task(rows, 4, set(begun))):
                begun.append(task)
            if not begun:
                return True
            kind, number = begun.pop(0)
            rows.append({"kind": kind, "number": number} | ({"p": 0.5} if number % 3 != 1 else {}))
        return False

    rows, whole = [], []
    fill(rows, stopped)
    assert fill(rows, 1000) and fill(whole, 1000)
    assert sorted(map(str, rows)) == sorted(map(str, whole))
    assert all(sum(row["kind"] == kind and "p" in row for row in rows) == 4 for kind in KINDS)


def kept_of(nats):
    """Numbers as they are kept, of 60 texts, with a median drop for each method."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "kind": "name", "number": i, "text": "Once upon", "cue": "on", "tokens": 40, "cue_at": 3, "removed": 4,
            "rank": {name: 1 if nats[name] > 1 else 9 for name in METHODS},
            "seconds": dict.fromkeys(METHODS, 1.0), "integration_gap": -0.01, "p": 0.5,
            "drop": {name: dict.fromkeys(REMOVALS, nats[name] + 0.1 * rng.standard_normal()) for name in METHODS},
        }
        for i in range(60)
    ]  # fmt: skip
    return {
        "machine": {"cores": 2, "cpu_capability": "AVX2", "torch": "2"}, "model": "tiny", "top_k": 10, "steps": 32,
        "texts": [*rows, {"kind": "name", "number": 60}],
    }  # fmt: skip


@pytest.mark.parametrize("texts_done", [0, 1, 59])
def test_the_page_shows_no_numbers_of_few_texts(texts_done):
    kept = kept_of(dict.fromkeys(METHODS, 1.0))
    kept["texts"] = kept["texts"][:texts_done]
    text = page(kept)
    assert f"It has done {texts_done} of 60 texts" in text and "| method |" not in text and "wins" not in text


@pytest.mark.parametrize("best", METHODS)
def test_the_page_says_who_wins(best):
    lines = page(kept_of({name: 3.0 if name == best else 1.0 for name in METHODS})).splitlines()
    assert not any("It has done" in line for line in lines)
    tables = [line.count("|") for line in lines if line.startswith("| ")]
    assert tables == [6] * (len(METHODS) + 2) + [3] * (len(METHODS) + 2)  # head, rule, rows
    deleted = next(line for line in lines if line.startswith("* deleted: "))
    beaten = deleted.partition("It is beaten by ")[2]
    beats = deleted.partition("It beats ")[2]
    assert f"Deleted: highest for {best}." in next(line for line in lines if "Deleted: highest" in line)
    if best == METHODS[0]:
        assert not beaten and all(name in beats for name in METHODS[1:])
    else:
        assert beaten.startswith(f"{best} (-") and "It cannot be told from" in deleted
