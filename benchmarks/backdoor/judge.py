"""Which of a method's steps brings out a behaviour the most, and how often it does on other prompts."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.backdoor.behaviours import Behaviour
from benchmarks.backdoor.lengths import lengths
from benchmarks.backdoor.plant import Speaker
from benchmarks.backdoor.prompts import Prompt
from benchmarks.backdoor.steered import ROWS, Steered, with_answers

TOKENS = 24  # of an answer
LEVELS = (0.3, 1.0, 3.0)  # nats
START, MOST = 0.02, 8.0  # the first length and the largest one, over the median norm
SHOWN = 3  # answers that are kept
EVERY = 12  # seconds between two lines of progress


class Prompts(NamedTuple):
    """Ordinary prompts: to make directions, to choose candidates, and to test them."""

    make: list[Prompt]
    choose: list[Prompt]
    test: list[Prompt]


class Method(NamedTuple):
    """Unit vectors [m, X]; `only`: the one behaviour that they are for, or None."""

    name: str
    vectors_mX: Tensor
    only: str | None = None


class Candidate(NamedTuple):
    """A step: its method's vector, the sign, the level, the length over the norm and the nats that it has."""

    vector: int
    sign: int
    level: float
    length: float
    kl: float


class Progress:
    """Seconds of each part of the work, and a line now and then."""

    def __init__(self) -> None:
        self.seconds = dict[str, float]()
        self._began = self._said = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last lap belongs to this part."""
        now = time.perf_counter()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._began, 1)
        self._began = now

    def say(self, line: str, often: bool = True) -> None:
        """Print a line; one that would come often only if there was none for a while."""
        if not often or time.perf_counter() - self._said > EVERY:
            self._said = time.perf_counter()
            print(line, flush=True)


def candidates_of(vectors_mX: Tensor, divergence_of: Callable[[Tensor], Tensor], norm: float) -> list[Candidate]:
    """Each vector with both signs at all levels, in this order."""
    signs = [(vector, sign) for vector in range(len(vectors_mX)) for sign in (1, -1)]
    both_CX = torch.stack([sign * vectors_mX[vector] for vector, sign in signs])
    found, reached = lengths(divergence_of, both_CX, LEVELS, START * norm, MOST * norm)
    return [
        Candidate(vector, sign, level, length / norm, kl)
        for (vector, sign), *rest in zip(signs, found.tolist(), reached.tolist(), strict=True)
        for level, length, kl in zip(LEVELS, *rest, strict=True)
    ]


def best(rates: Sequence[float], candidates: Sequence[Candidate]) -> int:
    """The place of the highest rate; of several the one with the lower KL, then the first."""
    return min(range(len(rates)), key=lambda k: (-rates[k], candidates[k].kl, k))


def shares(behaviour: Behaviour, texts: Sequence[str]) -> tuple[float, str]:
    """The share of answers that show a behaviour, and 0 or 1 for each."""
    shown = [behaviour.shows(text) for text in texts]
    return sum(shown) / len(shown), "".join(str(int(each)) for each in shown)


class Judge:
    """What a model answers under steps at a layer.

    Args:
        tuned: the model.
        layer: the name of the block whose output is steered.
        norm: the unit of a candidate's length.
        prompts: those to choose by and those to test on.
        behaviours: what is tested for.
        seed: of the behaviours' own answers.
        progress: of the work.
    """

    def __init__(
        self, tuned: Speaker, layer: str, norm: float, prompts: Prompts, behaviours: Sequence[Behaviour], seed: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.tokenizer, self.norm, self.progress, self.behaviours = tuned.tokenizer, norm, progress, behaviours
        test = tuned.ids(prompts.test)
        self.choose, self.test = (Steered(tuned.model, layer, rows) for rows in (tuned.ids(prompts.choose), test))
        self.zero_1X = torch.zeros(1, tuned.model.config.hidden_size)
        self.plain_choose, self.plain_test = (of.next_log_p(self.zero_1X)[0] for of in (self.choose, self.test))
        self.own = {each.name: tuned.spelt(each.answers(prompts.test, seed)) for each in behaviours}
        self.with_own, self.plain_own = dict[str, Steered](), dict[str, float]()
        for name, own in self.own.items():
            self.with_own[name] = with_answers(tuned.model, layer, test, own)
            self.plain_own[name] = self.own_log_p(self.zero_1X, name)
            progress.say(f"no step: own answers of {name}")

    def own_log_p(self, step_1X: Tensor, name: str) -> float:
        """The mean log-probability of a token of the behaviour's own answers to the testing prompts."""
        total = self.with_own[name].last_log_p(step_1X, self.own[name]).sum()
        return float(total) / sum(map(len, self.own[name]))

    def texts(self, steps_CX: Tensor, of: Steered, what: str) -> list[list[str]]:
        """The greedy answers under each step."""
        found = list[list[str]]()
        for some_cX in steps_CX.split(max(1, ROWS // of.count)):
            ids = of.answers(some_cX, TOKENS, self.tokenizer.eos_token_id)
            found += [self.tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in ids]
            self.progress.say(f"{what}: answers under {len(found)} of {len(steps_CX)} steps")
        return found

    def unsteered(self) -> dict[str, Any]:
        """Of each behaviour what `judged` says of a candidate, without a step."""
        (chosen,), (tested,) = (self.texts(self.zero_1X, of, "no step") for of in (self.choose, self.test))
        found = {}
        for each in self.behaviours:
            rate, outcomes = shares(each, tested)
            found[each.name] = {
                "rate_choosing": shares(each, chosen)[0], "rate": rate, "outcomes": outcomes,
                "answers": tested[:SHOWN], "log_p": round(self.plain_own[each.name], 5),
            }  # fmt: skip
        return found

    def judged(self, method: Method) -> dict[str, Any]:
        """Of each behaviour the method's best candidate, and how it does on the testing prompts."""

        def divergence_of(steps_CX: Tensor) -> Tensor:
            self.progress.say(f"{method.name}: lengths")
            return self.choose.divergence(steps_CX, self.plain_choose)

        candidates = candidates_of(method.vectors_mX, divergence_of, self.norm)
        self.progress.lap("lengths")
        places = {(each.vector, each.sign, each.length): self.step(method, each) for each in candidates}
        written = self.texts(torch.cat(list(places.values())), self.choose, method.name)
        texts = dict(zip(places, written, strict=True))
        self.progress.lap("choosing")
        found, tested = dict[str, Any](), dict[int, tuple[list[str], float]]()
        for behaviour in self.behaviours:
            if method.only not in (None, behaviour.name):
                continue
            rates = [shares(behaviour, texts[each.vector, each.sign, each.length])[0] for each in candidates]
            k = best(rates, candidates)
            step_1X = self.step(method, candidates[k])
            if k not in tested:
                (answered,) = self.texts(step_1X, self.test, method.name)
                kl = self.test.divergence(step_1X, self.plain_test)
                tested[k] = answered, float(kl)
            rate, outcomes = shares(behaviour, tested[k][0])
            gain = self.own_log_p(step_1X, behaviour.name) - self.plain_own[behaviour.name]
            levels = {str(level): max(r for r, each in zip(rates, candidates, strict=True) if each.level == level)
                      for level in LEVELS}  # fmt: skip
            found[behaviour.name] = {
                **{key: round(value, 5) for key, value in candidates[k]._asdict().items()},
                "at_most": candidates[k].length >= MOST * (1 - 1e-6), "kl_testing": round(tested[k][1], 5),
                "rate_choosing": rates[k], "rate": rate, "outcomes": outcomes, "answers": tested[k][0][:SHOWN],
                "by_level": levels, "gain": round(gain, 5),
            }  # fmt: skip
            self.progress.say(f"{method.name}: {behaviour.name} {rate:.2f}", often=False)
        self.progress.lap("testing")
        return found

    def step(self, method: Method, candidate: Candidate) -> Tensor:
        """[1, X] a candidate's step."""
        return candidate.sign * candidate.length * self.norm * method.vectors_mX[None, candidate.vector]
