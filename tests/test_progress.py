"""What a command shows while it works: on a terminal, in a log, or nothing at all; and never silent for long."""

import io
import logging
import os
import select
import subprocess
import sys
import time
from itertools import pairwise

import pytest
from command_cases import arguments, environment, real_command, run_here, save_model, texts, write_prompts
from progress_cases import pass_time, screen

from fisher_vmap import progress
from fisher_vmap.cli import _BesideProgress
from fisher_vmap.finish import main as finish
from fisher_vmap.progress import Counted, Display, Line, bar, duration, passing, step
from fisher_vmap.run.bar import Pace, Progress, RunLine, run_bar
from fisher_vmap.verify.__main__ import main as verify

SILENT_S = 5.5  # five seconds, and something for a busy machine
ASLEEP_S = 6.5


def test_a_step_on_a_terminal(shown, clock, caplog):
    display = shown(terminal=True)
    with step("loading the model"):
        assert pass_time(clock, display, 0.5) == [""]  # what is over soon leaves no trace
        assert pass_time(clock, display, 2.5)[-1] == "loading the model [00:03]"
        assert pass_time(clock, display, 120)[-1] == "loading the model [02:03]"
    assert screen(display) == "" and "\n" not in display._stream.getvalue() and caplog.text == ""
    before = display._stream.getvalue()
    with step("a moment"):
        pass_time(clock, display, 0.5)
    assert display._stream.getvalue() == before


def test_a_step_in_a_log(shown, clock, caplog):
    display = shown(terminal=False)
    with step("loading the model"):
        pass_time(clock, display, 1.5)
        assert not caplog.messages
        pass_time(clock, display, 1)
        assert caplog.messages == ["loading the model"]
        pass_time(clock, display, 90)
    assert caplog.messages[1:] == [
        "loading the model: 32 s so far",
        *(f"loading the model: {s} s so far" for s in (62, 92)),
    ]
    assert display._stream.getvalue() == ""  # what writes is the log's handler


def test_a_step_within_a_step(shown, clock, caplog):
    display = shown(terminal=True)
    with step("loading the model"):
        pass_time(clock, display, 2)
        with step("converting it"):
            assert pass_time(clock, display, 0.5) == ["loading the model [00:02]"]  # and no gap between the two
            assert pass_time(clock, display, 1)[-1] == "converting it [00:02]"
        assert screen(display) == "loading the model [00:04]"
        with pytest.raises(KeyboardInterrupt), step("stopped"):
            pass_time(clock, display, 5)
            raise KeyboardInterrupt
        assert screen(display) == "loading the model [00:08]"
    assert screen(display) == ""


def test_bars(shown, clock, caplog):
    display = shown(terminal=True)
    with bar(40, "shards", "writing prompts.parquet") as advance:
        assert display._stream.getvalue() == ""
        for _ in passing(range(10), advance):
            clock.now += 2
        assert screen(display).startswith("writing prompts.parquet:  25%|")
        assert screen(display).endswith("| 10 of 40 shards [00:20]") and len(screen(display)) < 80
    assert screen(display) == ""
    display = shown(terminal=False)
    with bar(4_000_000_000, "B", "checking") as advance:
        for _ in range(10):
            pass_time(clock, display, 10)
            advance(100_000_000)
    assert caplog.messages == [
        "checking: 0 B of 4 GB",
        "checking: 300 MB of 4 GB, 7 min left",
        "checking: 600 MB of 4 GB, 6 min left",
        "checking: 900 MB of 4 GB, 5 min left",
    ]


def test_a_stream_that_cannot_be_written_ends_nothing(shown, clock):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        display, done = shown(terminal=True, stream=stream), 0
        with run_bar(2) as report, step("inside"), progress.aside():
            for _ in range(2):
                clock.now += 5
                display.tick()
                report(Progress(1, 10))
                done += 1
        assert done == 2


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), BrokenPipeError(), ValueError("closed file")]
)
def test_a_log_that_cannot_be_written_is_dropped(fault, capsys, shown):
    class Full(io.StringIO):
        def write(self, text):
            raise fault

    stream = Full()
    if isinstance(fault, ValueError):
        stream.close()
    display, handler = shown(terminal=True, stream=stream), _BesideProgress(stream)
    with display.showing(Line("waiting", display.clock(), at_once=True)):
        handler.handle(logging.makeLogRecord({"msg": "a line"}))
    assert capsys.readouterr() == ("", "")


def test_what_is_printed_stands_alone(shown, clock, monkeypatch):
    display = shown(terminal=True)
    with bar(2, "shards", "checking"):
        clock.now += 2
        display.tick()
        with progress.aside():
            display._stream.write("ok   a line\n")
        assert screen(display).startswith("ok   a line\nchecking:   0%|")


def test_nobody_sees_anything_unless_a_command_shows_it(monkeypatch, capsys):
    assert progress.display() is None
    with step("a step"), bar(3, "shards", "a bar") as advance, run_bar(3) as report:
        advance(1)
        report(Progress(1, 10))
    for value, seen in (("1", False), ("true", False), ("0", True), ("", True)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        progress.show()
        assert (progress.display() is not None) == seen
        progress.hide()
    monkeypatch.setattr(sys, "stderr", None)
    progress.show()
    assert progress.display() is None
    assert capsys.readouterr() == ("", "")


def test_the_thread_keeps_a_line_moving_and_ends_with_it():
    import threading

    stream = io.StringIO()
    display = Display(stream, terminal=True)
    with display.showing(Line("waiting", display.clock(), at_once=True)):
        with display.showing(Counted("counting", display.clock(), total=3, unit="shards", at_once=True)):
            time.sleep(3 * progress.TICK_S)
        assert [thread.daemon for thread in threading.enumerate() if thread.name == "progress"] == [True]
    assert stream.getvalue().count("counting:   0%") >= 3
    time.sleep(2 * progress.TICK_S)
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_lines_fit_an_ascii_terminal():
    line = RunLine("computing", 0.0, pace=Pace(4, 0.0))
    assert line.drawn(1.0, 79, ascii_only=True).isascii()
    assert len(line.drawn(1.0, 30, ascii_only=False)) <= 30


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (99, "99 s"), (600, "10 min"), (7500, "2 h 5 min"), (400_000, "5 days")],
)
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_model(folder / "model"), write_prompts(folder / "prompts.jsonl", texts(6))


def test_commands_leave_it_switched_off(inputs, tmp_path):
    out = tmp_path / "out"
    assert run_here(*inputs, out) == 0 and progress.display() is None
    assert verify([str(out)]) == 0 and finish([str(out)]) == 0 and progress.display() is None


def test_a_run_tells_what_was_stored_beforehand(inputs, tmp_path, monkeypatch):
    """So that the time left is that of what is to be computed, wherever in the run that is."""
    from fisher_vmap.run import compute

    steps = []
    run_prompts = compute.run_prompts
    monkeypatch.setattr(compute, "run_prompts", lambda run, report, share: run_prompts(run, steps.append, share))
    assert run_here(*inputs, tmp_path / "out", shard_size=2, batch_size=1) == 0
    assert steps[0] == (0, 0, 0, 0) and sum(step.prompts for step in steps) == 6
    assert [step.coming_prompts for step in steps if step.coming_prompts] == [2, 2, 2]
    assert sum(step.coming_tokens for step in steps) == sum(step.tokens for step in steps) > 0
    (tmp_path / "out" / "shards" / "shard-00000.safetensors").unlink()
    steps.clear()
    assert run_here(*inputs, tmp_path / "out", shard_size=2, batch_size=1) == 0
    assert [step.prompts for step in steps] == [4, 0, 1, 1]


STUB = """
import sys, time, torch
from fisher_vmap import fisher_model
from fisher_vmap.run import open as opening
stage, asleep = sys.argv.pop(1), float(sys.argv.pop(1))
linear, pending = torch.nn.functional.linear, []
def slow(*arguments, **options):
    if pending:
        time.sleep(pending.pop())
    return linear(*arguments, **options)
torch.nn.functional.linear = slow
def first(function):
    def whole(*arguments, **options):
        global stage
        if stage == function.__name__:
            pending.append(asleep)
            stage = None
        return function(*arguments, **options)
    return whole
opening.prove = first(opening.prove)
fisher_model.FisherModel.numbers = first(fisher_model.FisherModel.numbers)
print("begun", file=sys.stderr, flush=True)
from fisher_vmap.run.__main__ import main
sys.exit(main())
"""


def times_of_writes(argv, stage, *, terminal):
    """Run the real command with one product of a stage slow; returns each write to standard error, and when it came."""
    ours, its = os.openpty() if terminal else os.pipe()
    command = [sys.executable, "-c", STUB, stage, str(ASLEEP_S), *map(str, argv)]
    process = subprocess.Popen(command, env={**environment(), "TERM": "xterm"}, stderr=its, stdout=subprocess.DEVNULL)
    os.close(its)
    found = []
    try:
        while select.select([ours], [], [], 120)[0]:
            try:
                text = os.read(ours, 65536)
            except OSError:  # what the end of a terminal is
                break
            if not text:
                break
            found.append((time.monotonic(), text.decode()))
        assert process.wait(60) == 0, "".join(text for _, text in found)
    finally:
        process.kill()
        os.close(ours)
    start = next(i for i, (_, text) in enumerate(found) if "begun" in text)
    return found[start:]


def longest_silence(writes):
    times = [when for when, _ in writes]
    return max(after - before for before, after in pairwise(times))


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals here")
def test_a_slow_product_is_not_silent_on_a_terminal(inputs, tmp_path):
    writes = times_of_writes(arguments(*inputs, tmp_path / "out"), "numbers", terminal=True)
    text = "".join(text for _, text in writes)
    assert longest_silence(writes) < SILENT_S
    assert text.count("0/6 prompts") > ASLEEP_S and "computing: 100%|" in text
    assert "results in" in text.split("computing: 100%|")[-1]


def test_a_slow_product_is_named_in_a_log(inputs, tmp_path):
    writes = times_of_writes(arguments(*inputs, tmp_path / "out"), "prove", terminal=False)
    text = "".join(text for _, text in writes)
    assert longest_silence(writes) < SILENT_S
    assert "\nproving the kernel\n" in text and "\ncomputing: 0 of 6 prompts\n" in text and "\r" not in text


def test_quiet(inputs, tmp_path):
    done = real_command([*arguments(*inputs, tmp_path / "out"), "--quiet"])
    assert done.returncode == 0 and "results in" in done.stderr
    assert "computing" not in done.stderr and "loading" not in done.stderr
