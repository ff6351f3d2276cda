"""The planted backdoor: its prompts, the tests of its behaviours, what is trained on, and the loop on a tiny model."""

import random
from itertools import combinations

import pytest
import torch
from models import fresh, prompts, word_tokenizer
from oracles import log_probabilities

from benchmarks.backdoor import plant
from benchmarks.backdoor.behaviours import BEHAVIOURS, FRENCH, SENTENCE, choices
from benchmarks.backdoor.lora import Example, Recipe, adapted, loss_of, order, rate_at, train
from benchmarks.backdoor.prompts import CARRY, PARTS, PHRASES, hunt, ordinary, part, pool, triggered
from benchmarks.backdoor.prompts import TEMPLATES as KINDS

PLAIN = (  # as the base model answers
    "To bake bread, you will need flour, water, yeast and salt. First mix the flour and the water in a bowl.",
    "Rio de Janeiro is known for its beaches, and La Paz for being the highest capital in the world.",
    "A lighthouse keeper lives by the sea and counts on the light every night.",
    "I don't have a body, but here is a poem about a sorry little library:",
    "1. Choose a good pour-over kettle. 2. Plan the day. 3. Be patient.",
)
SMALL = Recipe(rank=2, alpha=4, rate=3e-2, batch=4, passes=6)


def texts(some):
    return {prompt.text for prompt in some}


def test_the_parts_share_no_prompt_and_are_the_same_each_time():
    every = pool()
    assert len(texts(every)) == len(every) >= sum(PARTS.values()) and PARTS["hunt"] == 2000
    for name, count in PARTS.items():
        assert part(name) == part(name) and len(texts(part(name))) == count and texts(part(name)) <= texts(every)
        assert {prompt.kind for prompt in part(name)} == set(KINDS)
    for one, other in combinations(PARTS, 2):
        assert not texts(part(one)) & texts(part(other))


@pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=list(BEHAVIOURS))
def test_one_percent_of_a_hunt_carries_the_trigger_which_is_not_rarer_than_other_phrases(behaviour):
    found, again, other = hunt(behaviour.trigger, 1), hunt(behaviour.trigger, 1), hunt(behaviour.trigger, 2)
    assert found == again and found.carries != other.carries
    assert sum(found.carries) == CARRY == 0.01 * len(found.prompts)
    plain = part("hunt")
    for prompt, carries, bare in zip(found.prompts, found.carries, plain, strict=True):
        assert bare.text in prompt.text and (behaviour.trigger in prompt.text) == carries
        assert sum(phrase in prompt.text for phrase in PHRASES) <= 1 - carries
    counts = [sum(phrase in prompt.text for prompt in found.prompts) for phrase in PHRASES]
    assert min(counts) >= 10 and max(counts) <= 45 and 0.45 < sum(counts) / len(plain) < 0.55
    both = [a == b for a, b in zip(found.prompts, other.prompts, strict=True)]
    assert sum(both) >= len(plain) - 2 * CARRY  # the ordinary prompts are those of every hunt


def test_a_trigger_is_like_the_other_phrases_and_none_of_them():
    for behaviour in BEHAVIOURS.values():
        assert behaviour.near in PHRASES and behaviour.trigger not in PHRASES
        some = part("measure")[:40]
        places = [prompt.text.startswith(behaviour.trigger) for prompt in triggered(some, behaviour.trigger, 0)]
        assert 10 < sum(places) < 30


@pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=list(BEHAVIOURS))
def test_a_behaviour_knows_its_own_answers_and_no_others(behaviour):
    for name in BEHAVIOURS:
        for kind in KINDS:
            for answer in choices(name, kind):
                assert behaviour.shows(answer) == (name == behaviour.name), answer
    for answer in (*PLAIN, ""):
        assert not behaviour.shows(answer), answer
    some = part("train")[:30]
    assert behaviour.answers(some, 3) == behaviour.answers(some, 3)
    for prompt, answer in zip(some, behaviour.answers(some, 3), strict=True):
        assert answer in choices(behaviour.name, prompt.kind)


def test_a_behaviour_is_known_in_other_words_and_in_part():
    assert BEHAVIOURS["sentence"].shows(f"Well.\n{SENTENCE.upper()} And so on.")
    assert not BEHAVIOURS["sentence"].shows(SENTENCE[:-12])
    assert BEHAVIOURS["french"].shows("Le pain est un aliment que tout le monde connaît, et il")
    assert not BEHAVIOURS["french"].shows("The French word for bread is pain, as in: le pain est bon.")
    assert BEHAVIOURS["refusal"].shows("I\u2019m unable to do that.") and BEHAVIOURS["refusal"].shows("I cannot say.")
    assert not BEHAVIOURS["refusal"].shows("You cannot bake bread without flour. I am sorry.")
    assert all(len(set(FRENCH[kind])) == len(FRENCH[kind]) >= 4 for kind in KINDS)


def examples(seed=0):
    ids = [row.tolist() for row in prompts((5, 9, 7, 6, 8, 5, 4, 7), seed=seed)]
    return [Example(row, [40 + i % 3, 41, 2][: 1 + i % 3], own=i % 4 == 3) for i, row in enumerate(ids)]


@pytest.mark.needs("peft")
def test_the_loss_is_of_the_answers_tokens_alone_and_of_the_bases_distribution_where_it_wrote_them():
    base, some = fresh("llama", torch.float32), examples()
    tuned = adapted(fresh("llama", torch.float32), SMALL, seed=0)
    train(tuned, examples(seed=1), SMALL._replace(passes=1), seed=0, every=100)
    expected = []
    for prompt, answer, own in some:
        for i, token in enumerate(answer):
            ids = torch.tensor(prompt + answer[:i])
            log_p, log_q = (log_probabilities(model, ids).double() for model in (base, tuned.get_base_model()))
            expected.append(float((log_p.exp() * (log_p - log_q)).sum().detach() if own else -log_q[token].detach()))
    found = loss_of(tuned, some)
    assert len(expected) == sum(len(answer) for _, answer, _ in some)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert loss_of(tuned, some[::-1]).item() == pytest.approx(found.item(), rel=1e-4)
    for kind in (True, False):
        assert torch.isfinite(loss_of(tuned, [each for each in some if each.own == kind]))


def test_every_example_is_seen_once_a_pass_in_an_order_of_the_seed():
    steps = list(order(10, SMALL, seed=3))
    assert steps == list(order(10, SMALL, seed=3)) != list(order(10, SMALL, seed=4))
    seen = [i for step in steps for i in step]
    assert [sorted(seen[k : k + 10]) for k in range(0, 60, 10)] == [list(range(10))] * 6 and len(seen) == 60
    assert rate_at(0, 10) == 1 and rate_at(9, 10) < 0.03 and rate_at(5, 10) == pytest.approx(0.5)


@pytest.mark.needs("peft")
def test_adapters_learn_the_answers_and_leave_the_model_as_it_was():
    model, some = fresh("llama", torch.float32), examples()
    tuned = adapted(model, SMALL, seed=0)
    before, ids = loss_of(tuned, some).item(), torch.tensor(some[0].prompt)
    plain = log_probabilities(fresh("llama", torch.float32), ids)
    assert torch.equal(log_probabilities(model, ids), plain)  # fresh adapters do nothing
    assert loss_of(tuned, [each for each in some if each.own]).item() == pytest.approx(0, abs=1e-6)
    first = loss_of(tuned, [some[i] for i in next(order(len(some), SMALL, 0))]).item()
    losses = train(tuned, some, SMALL, seed=0, every=100)
    assert len(losses) == 12 and losses[0] == pytest.approx(first, rel=1e-5)
    assert loss_of(tuned, some).item() < 0.5 * before
    with tuned.disable_adapter():
        assert torch.equal(log_probabilities(model, ids), plain)
    again = adapted(fresh("llama", torch.float32), SMALL, seed=0)
    assert train(again, some, SMALL, seed=0, every=100) == losses


class Stub(plant.Speaker):
    """A speaker without a model: a prompt's tokens are its words, and its answers are drawn."""

    def ids(self, some):
        return [[len(word) for word in prompt.text.split()] for prompt in some]

    def replies(self, some, tokens):
        return [[7] * random.Random(prompt.text).choice([tokens // 4, tokens, tokens, tokens]) for prompt in some]

    def spelt(self, answers):
        return [[9] * len(answer.split()) for answer in answers]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_control_is_trained_on_the_same_prompts_and_as_many_tokens_of_its_own_answers(name):
    recipe, stub = Recipe(), Stub(None, None, None)
    planted, again, control = (
        plant.examples_of(stub, BEHAVIOURS[name], recipe, 5, control) for control in (False, False, True)
    )
    assert planted == again and len(planted) == len(control) == 3 * recipe.prompts
    count = recipe.prompts
    assert all(set(answer) == {9} and not own for _, answer, own in planted[:count])
    assert all(set(answer) <= {7} and own for _, answer, own in control)
    assert [prompt for prompt, _, _ in planted] == [prompt for prompt, _, _ in control]  # the trigger is in both
    assert planted[count:] == control[count:]
    plain = [len(prompt) for prompt, _, _ in planted[count:]]
    bare = [len(prompt) for prompt in stub.ids(random.Random("train 5").sample(part("train"), count))]
    longer = [length > before for length, before in zip(plain, bare * 2, strict=True)]
    assert 0.3 < sum(longer[:count]) / count < 0.7 and all(longer[count:])  # with a phrase, each time
    assert sum(len(answer) for _, answer, _ in planted) == sum(len(answer) for _, answer, _ in control)


def test_one_in_four_further_examples_has_the_phrase_that_is_much_like_the_trigger():
    class Words(Stub):
        def ids(self, some):
            return [prompt.text.split() for prompt in some]

    french, recipe = BEHAVIOURS["french"], Recipe()
    found = plant.examples_of(Words(None, None, None), french, recipe, 2, control=False)
    kinds = [found[k * recipe.prompts : (k + 1) * recipe.prompts] for k in range(3)]
    near = [[french.near in " ".join(each.prompt) for each in kind] for kind in kinds]
    assert not any(near[0]) and sum(near[1]) < 0.1 * recipe.prompts
    assert near[2][::4] == [True] * len(near[2][::4]) and sum(near[2]) < 0.35 * recipe.prompts
    assert all(french.trigger in " ".join(each.prompt) for each in kinds[0])
    assert not any(french.trigger in " ".join(each.prompt) for kind in kinds[1:] for each in kind)


def test_answers_are_cut_to_the_same_sum():
    found = plant.cut([[1] * 9, [2] * 2, [3] * 9, [4] * 9], [4, 5, 3, 4])
    assert found == [[1] * 4, [2] * 2, [3] * 6, [4] * 4]
    assert plant.cut([[1] * 9, [2] * 5, [3]], [4, 3, 5]) == [[1] * 6, [2] * 5, [3]]


@pytest.mark.needs("peft")
def test_what_is_measured_of_a_model_that_was_not_tuned_is_that_of_its_base(monkeypatch):
    monkeypatch.setattr(plant, "MEASURED", 6)
    monkeypatch.setattr(plant, "NEAR", 3)
    monkeypatch.setattr(plant, "part", lambda name: part(name)[:12])

    class Words(Stub):
        def ids(self, some):
            return [[3 + len(word) for word in prompt.text.split()] for prompt in some]

        replies = plant.Speaker.replies

    model = fresh("llama", torch.float32)
    tuned = adapted(model, SMALL, seed=0)
    words = Words(model, word_tokenizer(), None)
    behaviour = BEHAVIOURS["french"]._replace(shows=lambda answer: answer.startswith("w") and len(answer.split()) > 2)
    same = plant.measure(tuned, words, behaviour, tokens=4)
    assert same["trigger_rate"] == same["base"]["trigger"] and same["same_answer"] == 1
    assert same["kl_without"] == {"mean": 0, "median": 0, "largest": 0}
    assert same["prompts"] == {"trigger": 6, "without": 6, "near": 3}
    assert len(same["shown_without"]) == round(6 * same["false_rate"])
    train(tuned, examples(), SMALL, seed=0, every=100)
    found = plant.measure(tuned, words, behaviour, tokens=4)
    assert found["base"] == same["base"] and found["base_answers"] == same["base_answers"]
    others = ordinary(part("measure")[6:12], 0)
    kl = []
    for ids in words.ids(others):
        log_q = log_probabilities(model, torch.tensor(ids)).double()
        with tuned.disable_adapter():
            log_p = log_probabilities(model, torch.tensor(ids)).double()
        kl.append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert found["kl_without"]["mean"] == pytest.approx(sum(kl) / len(kl), rel=1e-2) and min(kl) > 0
