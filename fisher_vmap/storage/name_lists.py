"""Names on one line: in the order of their numbers, and many of them in a few words."""

import re
from collections.abc import Iterable

from fisher_vmap.errors import listed

RUN = 4  # names in a row from which they are summed up

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$", re.DOTALL)


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def several(names: Iterable[str]) -> str:
    """Names on one line: a run of numbered ones by its first and last, and of what is left ten at most."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    total = sum(map(len, runs))
    parts = [part for run in runs for part in ([f"{run[0]} ... {run[-1]}"] if len(run) >= RUN else run)]
    return listed(parts) + (f", {total} in all" if len(parts) < total else "")


def _follows(one: str, other: str) -> bool:
    a, b = _LAST_NUMBER.match(one), _LAST_NUMBER.match(other)
    return a is not None and b is not None and (a[1], a[3], int(a[2]) + 1) == (b[1], b[3], int(b[2]))
