"""Progress on standard error: a live line on a terminal, elsewhere a plain line from time to time.

Only the commands switch it on, with `show`. A background thread updates the line while a step runs. `prepare_streams`
makes standard error, and what is printed, bear disks that are full and characters that cannot be encoded.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def readable(size: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


@dataclass(eq=False)
class Line:
    """The progress line of a step of unknown length.

    Attributes:
        what: the step, such as "loading the model".
        began: when it began.
        at_once: whether to show the line at once, not only when the step takes long.
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
    """The progress line of a step of `total` units, `done` of them so far; bytes if `unit` is "B"."""

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
    """A time as on a clock, such as 00:50 or 2:05:00."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def meter(what: str, done: int, total: int, text: str, columns: int, ascii_only: bool) -> str:
    """A bar drawn by tqdm, followed by `text`."""
    from tqdm import tqdm

    words = text.replace("{", "{{").replace("}", "}}")
    picture: str = tqdm.format_meter(
        min(done, total), total or 1, 0.0, ncols=columns, prefix=what, ascii=ascii_only,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| " + words,
    )  # fmt: skip
    return picture[:columns]


T = TypeVar("T")

DRAWN_AFTER_S = 1.0  # on a terminal; shorter steps are not shown, so that nothing flickers
TOLD_AFTER_S = 2.0  # elsewhere, as a plain line
TOLD_EVERY_S = 30.0
TICK_S = 0.5
FRAME_S = 0.1  # least time between two updates of a line

log = logging.getLogger("fisher_vmap")


class Display:
    """Shows the progress line of the step that began last and has not ended.

    Args:
        stream: standard error; write errors are ignored.
        terminal: whether the stream is a terminal; None: find out.
        clock: seconds.
        ticking: whether a thread updates the line.
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
        self._width = 0  # of the line on the terminal
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
        """Draw the line, or write a plain one if it is due."""
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
        log.info("%s", text)  # without the lock: a logging thread holds the handler's lock and may wait for this one

    def moved(self) -> None:
        """Draw the line again after a change, but not too often."""
        if not self._terminal or self.clock() - self._frame >= FRAME_S:
            self.tick()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Remove the live line within the context, so that something else can be written."""
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
        except (OSError, ValueError):  # closed, or the disk is full
            self._broken = True

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError):
            columns = 0
        return (columns or 80) - 1  # many terminals wrap after the last column


_display: Display | None = None


def show() -> None:
    """Show progress from now on, unless TQDM_DISABLE is set. For commands."""
    global _display
    disabled = os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")
    _display = None if disabled or sys.stderr is None else Display(sys.stderr)


def hide() -> None:
    """Show no progress from now on."""
    global _display
    _display = None


def display() -> Display | None:
    """The display, if progress is shown."""
    return _display


@contextmanager
def step(what: str) -> Iterator[None]:
    """Show a line while the context runs, if it takes more than a moment.

    Args:
        what: the step, such as "loading the model".
    """
    if (place := _display) is None:
        yield
        return
    with place.showing(Line(what, place.clock())):
        yield


@contextmanager
def bar(total: int, unit: str, what: str) -> Iterator[Callable[[int], None]]:
    """Show a bar while the context runs.

    Args:
        total: the amount of work.
        unit: its unit, such as "shards", or "B" for bytes.
        what: the step, such as "writing prompts.parquet".

    Returns:
        A function that takes the amount done since the last call.
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
    """The same items; calls `advance(1)` after each."""
    for item in items:
        yield item
        advance(1)


@contextmanager
def aside() -> Iterator[None]:
    """Remove the live line within the context, for printing; logging does this by itself."""
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


class _Droppable(io.RawIOBase):
    """Standard error that drops what cannot be written: a full disk under a log ends no computation."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        left = bytes(data)
        size = len(left)
        with suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return size


class _Remembering(io.FileIO):
    """Standard output that remembers what it failed with: argparse and others pass over it."""

    failure: OSError | None = None

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


def prepare_streams() -> None:
    """Make standard output take any character, and standard error any fault.

    A stream that the shell has closed becomes the null device. Else the next file that is opened would get its number,
    and with it what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        encoding = "utf-8" if sys.stderr is None else sys.stderr.encoding
        below = io.BufferedWriter(_Droppable(2))
        sys.stderr = io.TextIOWrapper(below, encoding, "backslashreplace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        old, out = sys.stdout, io.BufferedWriter(_Remembering(1, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(
            out, old.encoding, line_buffering=old.line_buffering, write_through=old.write_through
        )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
