"""The demo ends in time on any machine, and what it finds does not depend on how many prompts that was."""

import logging
import time

import pytest

from fisher_vmap import demo
from fisher_vmap.load.model import Loaded
from fisher_vmap.run import open
from fisher_vmap.run.open import source_of
from fisher_vmap.run.settings import Settings


class Tokenizer:
    """A token a character."""

    def apply_chat_template(self, messages, **_):
        return [ord(c) for c in messages[0]["content"]]


@pytest.fixture
def machine(monkeypatch):
    """One that computes so many tokens a second, after a slow first batch; gives what the demo makes of it."""

    def of(rate):
        now, batches = [0.0], []

        class Fisher:
            def numbers(self, ids, rank):
                now[0] += sum(map(len, ids)) / rate + (0 if batches else 60)
                batches.append(ids)

        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        monkeypatch.setattr(open, "open_model", lambda *_: Fisher())
        return demo.affordable(Settings(), Loaded(None, Tokenizer(), {})), batches[-1]

    return of


def in_order():
    settings = Settings(dataset_name=str(demo.PROMPTS), num_prompts="all")
    return [prompt.messages_or_text for prompt in source_of(settings)]


def test_as_many_prompts_as_the_machine_has_time_for(machine, caplog):
    caplog.set_level(logging.INFO, "fisher_vmap")
    prompts = in_order()
    characters = sum(map(len, prompts))
    caplog.clear()
    assert machine(1e9)[0] == 64 and not caplog.records
    half, tried = machine(characters / 2 / demo.BUDGET_S)
    assert sum(map(len, prompts[:half])) <= characters / 2 < sum(map(len, prompts[: half + 1]))
    assert [len(ids) for ids in tried] == [len(prompt) for prompt in prompts[demo.TRIED]]  # the run's own order
    assert caplog.records[-1].getMessage().startswith(f"{half} of 64 prompts: this processor computes about ")
    assert machine(1e-3)[0] == demo.LEAST >= 12


def test_the_findings_prompt_is_among_those_that_any_machine_takes():
    assert in_order()[: demo.LEAST][-1].startswith("Write a Python function that takes a list of integers")
