"""What is said of a step that is under way: in a plain line of a log, and in a live line of a terminal."""

from dataclasses import dataclass, field


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
        from fisher_vmap.planning.sizes import readable

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
