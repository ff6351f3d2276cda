"""The progress bar of a run: prompts and tokens done, tokens a second, time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from fisher_vmap.progress import Line, display, duration, meter, on_a_clock


class Progress(NamedTuple):
    """A step of a run.

    Attributes:
        prompts: how many were finished.
        tokens: how many were computed for them; 0 if they were skipped, or stored before.
        coming_prompts: how many were tokenised and are computed next.
        coming_tokens: their tokens.
    """

    prompts: int
    tokens: int
    coming_prompts: int = 0
    coming_tokens: int = 0


@dataclass
class Pace:
    """The rate of a run and the time that is left.

    The first batches, which allocate memory and load code, do not count once there are others. Prompts that were stored
    before count neither as tokens nor as time.

    Attributes:
        total: prompts of this process; None: not known.
        since: when the current batch began.
        warm_up: how many batches do not count: one for each worker.
    """

    total: int | None
    since: float
    warm_up: int = 1
    prompts: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    _computed: int = field(default=0, init=False)
    _coming: tuple[int, int] = field(default=(0, 0), init=False)
    _batches: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _warm_up: tuple[int, float] = field(default=(0, 0.0), init=False)

    def add(self, step: Progress, now: float) -> None:
        """Count a step."""
        self.prompts += step.prompts
        self.tokens += step.tokens
        prompts, tokens = self._coming
        if step.coming_prompts:
            self._coming = prompts + step.coming_prompts, tokens + step.coming_tokens
            if not self._batches:
                self.since = now
        elif step.tokens:
            self._coming = max(0, prompts - step.prompts), max(0, tokens - step.tokens)
            self._computed += step.prompts
            self._seconds += now - self.since
            self._batches += 1
            if self._batches == self.warm_up:
                self._warm_up = self.tokens, self._seconds
            self.since = now
        elif step.prompts:
            self.since = now

    @property
    def rate(self) -> float | None:
        """Tokens a second; None before the first batch."""
        tokens, seconds = self.tokens, self._seconds
        if self._batches > self.warm_up:
            tokens, seconds = tokens - self._warm_up[0], seconds - self._warm_up[1]
        return tokens / seconds if tokens and seconds > 0 else None

    @property
    def tokens_left(self) -> float | None:
        """Tokens left to compute; prompts that are not tokenised yet count with the average of the others."""
        prompts, tokens = self._coming
        if self.total is None or not self._computed + prompts:
            return None
        mean = (self.tokens + tokens) / (self._computed + prompts)
        return tokens + max(0, self.total - self.prompts - prompts) * mean

    @property
    def is_exact(self) -> bool:
        """Whether all remaining prompts have been tokenised."""
        return self.total is not None and self.total - self.prompts <= self._coming[0]

    def seconds_left(self, now: float) -> float | None:
        """Time left at the present rate; None if it is not known or nothing is left."""
        rate, tokens = self.rate, self.tokens_left
        return None if not rate or not tokens else max(0.0, tokens / rate - (now - self.since))


@dataclass(eq=False)
class RunLine(Line):
    """The progress line of a run, shown from the beginning."""

    pace: Pace = field(default_factory=lambda: Pace(None, 0.0))

    def _parts(self, of: str, about: str, a_second: str) -> list[str]:
        """Prompts, tokens and rate, with these words between the numbers."""
        pace, left, rate = self.pace, self.pace.tokens_left, self.pace.rate
        parts = [f"{pace.prompts:,}{'' if pace.total is None else f'{of}{pace.total:,}'} prompts"]
        if left is not None and (pace.tokens or left):
            total = ("" if pace.is_exact else about) + _rounded(pace.tokens + left, pace.is_exact)
            parts.append(f"{pace.tokens:,}{of}{total} tokens")
        elif pace.tokens:
            parts.append(f"{pace.tokens:,} tokens")
        if rate is not None:
            parts.append(f"{rate:,.0f}{a_second}" if rate >= 10 else f"{rate:.2g}{a_second}")
        return parts

    def plain(self, now: float) -> str:
        """For a log."""
        pace, parts = self.pace, self._parts(" of ", "about ", " tokens a second")
        if (seconds := pace.seconds_left(now)) is not None:
            parts.append(f"{duration(seconds)} left")
        elif self.told is not None:
            parts.append(f"{duration(now - self.began)} so far")
        return f"{self.what}: {', '.join(parts)}"

    def drawn(self, now: float, columns: int, ascii_only: bool) -> str:
        """For a terminal of this width."""
        pace, parts = self.pace, self._parts("/", "", "/s")
        seconds = pace.seconds_left(now)
        times = on_a_clock(now - self.began) + ("" if seconds is None else f"<{on_a_clock(seconds)}")
        text = f"{', '.join(parts)} [{times}]"
        if pace.total is None:
            return f"{self.what}: {text}"[:columns]
        return meter(self.what, pace.prompts, pace.total, text, columns, ascii_only)


@contextmanager
def run_bar(total: int | None, warm_up: int = 1) -> Iterator[Callable[[Progress], None]]:
    """The progress bar of a run.

    Args:
        total: prompts of this process; None: not known.
        warm_up: how many batches do not count for the rate.

    Returns:
        A function that takes each step.
    """
    if (place := display()) is None:
        yield lambda step: None
        return
    now = place.clock()
    line = RunLine("computing", now, at_once=True, pace=Pace(total, now, warm_up))

    def report(step: Progress) -> None:
        line.pace.add(step, place.clock())
        place.moved()

    with place.showing(line):
        yield report


def _rounded(tokens: float, exact: bool) -> str:
    """A number of tokens, rounded to two digits if it is an estimate."""
    if exact or tokens < 100:
        return f"{tokens:,.0f}"
    unit = 10.0 ** (len(str(int(tokens))) - 2)
    return f"{round(tokens / unit) * unit:,.0f}"
