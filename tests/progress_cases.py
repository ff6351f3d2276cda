"""Time that passes when it is told to, and what stands on a terminal meanwhile."""

from fisher_vmap import progress


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def pass_time(clock, display, seconds):
    """Let time pass with the ticks of the thread; returns what stood on the terminal at each."""
    seen = []
    for _ in range(round(seconds / progress.TICK_S)):
        clock.now += progress.TICK_S
        display.tick()
        seen.append(display._stream.getvalue().rpartition("\r")[2].rstrip())
    return seen


def screen(display):
    """What a terminal shows at the end: of each line what was written over it last."""
    lines = []
    for line in display._stream.getvalue().split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines)
