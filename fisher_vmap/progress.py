"""What is under way, on standard error: a live line on a terminal, and elsewhere a plain line now and then.

Only commands switch it on, with `show`: whoever uses the package from Python sees nothing of it. A background thread
keeps the line moving while the work itself says nothing.

Numbers of bytes in words.

What is said of a step that is under way: in a plain line of a log, and in a live line of a terminal.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO, TypeVar


def readable(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


@dataclass(eq=False)
class Line:
    """A step whose length is not known.

    Attributes:
        what: is done, such as "loading the model".
        began: when.
        at_once: whether it shows before it has lasted for a while.
        told: when its last plain line was written.
    """

    what: str
    began: float
    at_once: bool = False
    told: float | None = field(default=None, init=False)

    def plain(self, now: float) -> str:
        """For a log."""
        return self.what if self.told is None else f"{self.what}: {duration(now - self.began)} so far"

    def drawn(self, now: float, columns: int, ascii_only: bool) -> str:
        """For a terminal of this width."""
        return f"{self.what} [{on_a_clock(now - self.began)}]"[:columns]


@dataclass(eq=False)
class Counted(Line):
    """A step of `total` units, `done` of them so far; bytes where `unit` is "B"."""

    total: int = 0
    unit: str = ""
    done: int = 0

    def plain(self, now: float) -> str:
        """For a log."""
        text = f"{self.what}: {self._counted()}"
        elapsed = now - self.began
        if self.done and self.done < self.total and elapsed > 0:
            text += f", {duration(elapsed * (self.total - self.done) / self.done)} left"
        return text

    def drawn(self, now: float, columns: int, ascii_only: bool) -> str:
        """For a terminal of this width."""
        text = f"{self._counted()} [{on_a_clock(now - self.began)}]"
        return meter(self.what, self.done, self.total, text, columns, ascii_only)

    def _counted(self) -> str:
        if self.unit != "B":
            return f"{self.done:,} of {self.total:,} {self.unit}"

        return f"{readable(self.done)} of {readable(self.total)}"


def duration(seconds: float) -> str:
    """A time in words, such as 50 s, 12 min or 2 h 5 min."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.0f} days"


def on_a_clock(seconds: float) -> str:
    """A time that is seen to move, such as 00:50 or 2:05:00."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def meter(what: str, done: int, total: int, text: str, columns: int, ascii_only: bool) -> str:
    """A bar as tqdm draws it, with words of ours behind it."""
    from tqdm import tqdm

    words = text.replace("{", "{{").replace("}", "}}")
    picture: str = tqdm.format_meter(
        min(done, total), total or 1, 0.0, ncols=columns, prefix=what, ascii=ascii_only,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| " + words,
    )  # fmt: skip
    return picture[:columns]


T = TypeVar("T")

DRAWN_AFTER_S = 1.0  # on a terminal: what is over sooner leaves no trace, and nothing flickers
TOLD_AFTER_S = 2.0  # elsewhere, in a plain line
TOLD_EVERY_S = 30.0
TICK_S = 0.5
FRAME_S = 0.1  # least time between two pictures of the same line

log = logging.getLogger("fisher_vmap")


class Display:
    """Where lines are shown: the latest that has begun and not ended is the one that is seen.

    Args:
        stream: standard error. One that cannot be written any more is left alone.
        terminal: None: look whether the stream is one.
        clock: seconds.
        ticking: whether a thread keeps the line moving.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        ticking: bool = True,
    ) -> None:
        self.clock = clock
        self._stream = stream
        self._terminal = _is_terminal(stream) if terminal is None else terminal
        self._ascii_only = "utf" not in (getattr(stream, "encoding", None) or "").lower()
        self._ticking = ticking
        self._lines: list[Line] = []
        self._lock = threading.RLock()
        self._width = 0  # of what stands on the terminal
        self._frame = -FRAME_S
        self._broken = False

    @contextmanager
    def showing(self, line: Line) -> Iterator[None]:
        """Show a line within the context."""
        end = threading.Event()
        try:
            with self._lock:
                self._lines.append(line)
                first = len(self._lines) == 1
            if first and self._ticking:
                threading.Thread(target=self._tick_until, args=(end,), name="progress", daemon=True).start()
            if line.at_once:
                self.tick()
            yield
        finally:
            end.set()
            with self._lock:
                if line in self._lines:
                    self._lines.remove(line)
                if self._terminal and not (self._lines and self._is_due(self._lines[-1])):
                    self._erase()
            self.tick()

    def tick(self) -> None:
        """Draw the line as it is now, or write a plain one if it is time for that."""
        with self._lock:
            line = self._lines[-1] if self._lines else None
            if line is None or not self._is_due(line):
                return
            now = self.clock()
            if self._terminal:
                self._draw(line.drawn(now, self._columns(), self._ascii_only))
                self._frame = now
                return
            text, line.told = line.plain(now), now
        log.info("%s", text)  # without the lock: whoever logs has the handler's, and wants ours

    def moved(self) -> None:
        """The line's numbers have changed: draw it anew, but not too often."""
        if not self._terminal or self.clock() - self._frame >= FRAME_S:
            self.tick()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within the context others write to the terminal, where no live line stands meanwhile."""
        if not self._terminal:
            yield
            return
        with self._lock:
            stood = self._width > 0
            self._erase()
            try:
                yield
            finally:
                if stood:
                    self.tick()

    def _is_due(self, line: Line) -> bool:
        now = self.clock()
        if self._terminal:
            return line.at_once or now - line.began >= DRAWN_AFTER_S
        if line.told is None:
            return line.at_once or now - line.began >= TOLD_AFTER_S
        return now - line.told >= TOLD_EVERY_S

    def _tick_until(self, end: threading.Event) -> None:
        while not end.wait(TICK_S):
            self.tick()

    def _erase(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _draw(self, text: str) -> None:
        self._write("\r" + text.ljust(self._width))
        self._width = len(text)

    def _write(self, text: str) -> None:
        if self._broken:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, or its disk is full: the work goes on without it
            self._broken = True

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1  # in the last column many terminals begin a new line


_display: Display | None = None


def show() -> None:
    """Show what is under way from now on, unless TQDM_DISABLE is set. For commands."""
    global _display
    disabled = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    _display = None if disabled or sys.stderr is None else Display(sys.stderr)


def hide() -> None:
    """Show nothing from now on."""
    global _display
    _display = None


def display() -> Display | None:
    """Where lines are shown, if they are."""
    return _display


@contextmanager
def step(what: str) -> Iterator[None]:
    """Name what is done within the context, if it takes more than a moment.

    Args:
        what: is done, such as "loading the model".
    """
    if (place := _display) is None:
        yield
        return
    with place.showing(Line(what, place.clock())):
        yield


@contextmanager
def bar(total: int, unit: str, what: str) -> Iterator[Callable[[int], None]]:
    """A bar over work of known length.

    Args:
        total: how much there is to do.
        unit: of what, such as "shards", or "B" for bytes.
        what: is done, such as "writing prompts.parquet".

    Returns:
        A function that takes how much has been done since it was called last.
    """
    if (place := _display) is None:
        yield lambda amount: None
        return
    line = Counted(what, place.clock(), total=total, unit=unit)

    def advance(amount: int) -> None:
        line.done += amount
        place.moved()

    with place.showing(line):
        yield advance


def passing(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The same items; a bar advances by one when each has been dealt with."""
    for item in items:
        yield item
        advance(1)


@contextmanager
def aside() -> Iterator[None]:
    """Within the context something is printed (not logged: that does this itself), and no live line is in its way."""
    if (place := _display) is None:
        yield
        return
    with place.aside():
        yield


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except (OSError, ValueError):
        return False
