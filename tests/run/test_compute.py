"""The bar of a run: prompts and tokens done, tokens a second, time left."""

import pytest
from progress_cases import pass_time, screen

from fisher_vmap.run.bar import Pace, Progress, run_bar


def test_the_bar_of_a_run_in_a_log(shown, clock, caplog):
    display = shown(terminal=False)
    with run_bar(64) as report:
        assert caplog.messages == ["computing: 0 of 64 prompts"]  # before the first batch
        report(Progress(0, 0, 32, 1600))
        for _ in range(3):
            pass_time(clock, display, 10)
            report(Progress(8, 400))
    assert caplog.messages[1:] == [
        "computing: 16 of 64 prompts, 800 of about 3,200 tokens, 40 tokens a second, 50 s left"
    ]


def test_the_bar_of_a_run_on_a_terminal(shown, clock):
    display = shown(terminal=True)
    with run_bar(64) as report:
        assert screen(display).startswith("computing:   0%|") and screen(display).endswith("| 0/64 prompts [00:00]")
        report(Progress(0, 0, 32, 1600))
        moving = pass_time(clock, display, 200)  # a batch of minutes
        assert len(set(moving)) > 190 and "| 0/64 prompts, 0/3,200 tokens [03:20]" in moving[-1]
        for _ in range(2):
            pass_time(clock, display, 10)
            report(Progress(16, 800))
        clock.now += 0.1
        display.tick()
        assert "32/64 prompts, 1,600/3,200 tokens, 80/s [03:40<00:20]" in screen(display)
        assert all(len(line) < 80 for line in moving)
    assert screen(display) == ""
    with run_bar(None) as report:
        report(Progress(8, 400))
        clock.now += 1
        report(Progress(8, 400))
        assert screen(display) == "computing: 16 prompts, 800 tokens, 400/s [00:01]"


def test_rate_and_time_left_are_right_from_the_second_batch_on():
    pace = Pace(40, 0.0)
    assert pace.rate is None and pace.tokens_left is None and pace.seconds_left(1.0) is None
    pace.add(Progress(2, 0, 18, 1800), 5.0)  # reading takes its time before the first batch, and two are skipped
    assert pace.tokens_left == 1800 + 20 * 100 and pace.seconds_left(6.0) is None
    pace.add(Progress(8, 500), 55.0)  # the first batch claims memory
    assert pace.rate == pytest.approx(500 / 50) and pace.tokens_left == 1300 + 20 * 100
    pace.add(Progress(8, 1000), 65.0)
    assert pace.rate == pytest.approx(100)
    assert pace.seconds_left(65.0) == pytest.approx((300 + 2000) / 100)
    assert pace.seconds_left(70.0) == pytest.approx(18)  # and goes down while a batch is computed
    pace.add(Progress(2, 300), 68.0)
    assert not pace.is_exact and pace.rate == pytest.approx(100)
    pace.add(Progress(0, 0, 20, 900), 69.0)  # the next shard's prompts are shorter than the first one's
    assert pace.is_exact and pace.tokens_left == 900 and pace.seconds_left(69.0) == pytest.approx(8)
    pace.add(Progress(20, 900), 77.0)
    assert pace.prompts == 40 and pace.tokens == 2700 and pace.tokens_left == 0 and pace.seconds_left(77.0) is None


def test_what_was_stored_costs_nothing():
    pace = Pace(1000, 0.0)
    pace.add(Progress(900, 0), 40.0)  # compared with their checksums
    assert pace.rate is None and pace.tokens_left is None
    pace.add(Progress(0, 0, 50, 500), 40.0)
    pace.add(Progress(25, 250), 50.0)
    assert pace.rate == pytest.approx(25) and pace.seconds_left(50.0) == pytest.approx(75 * 10 / 25)
    pace.add(Progress(25, 250), 55.0)
    pace.add(Progress(10, 0), 85.0)  # another process has stored these meanwhile
    pace.add(Progress(0, 0, 40, 400), 85.0)
    pace.add(Progress(20, 200), 89.0)
    assert pace.rate == pytest.approx(450 / 9) and pace.seconds_left(89.0) == pytest.approx(200 / 50)


def test_the_first_batch_of_every_worker_is_left_out():
    pace = Pace(100, 0.0, warm_up=4)
    for second in (60.0, 60.1, 60.2, 60.3):
        pace.add(Progress(10, 100), second)
    assert pace.rate == pytest.approx(400 / 60.3)
    for second in (70.3, 70.3, 70.3, 70.3):
        pace.add(Progress(10, 100), second)
    assert pace.rate == pytest.approx(40)
