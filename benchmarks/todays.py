"""`python -m benchmarks.todays`: the package on the shapes of today's models, beside the loop, the floor and a forward.

For each shape, with K = 10 and eight prompts of 44 to 76 tokens: at an early, the middle and a late block the whole job
beside the careful loop's, and the scores beside the floor of the matrix products; then the bias at the last position
alone beside all positions at the middle block, and beside a forward pass of the same tokens as transformers runs it,
which also stands beside the scores of the last two blocks. The results of what was timed are compared afterwards.
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import roofline
from benchmarks.claims import HEADING, TOP_K, Asked, Line, Outcome
from benchmarks.loop_rows import against_forward, against_loops
from benchmarks.timing import Ratio, machine, measurement_flags, parsed, write_json
from benchmarks.todays_shapes import LONGEST, SHAPES, SHORTEST, todays_shape, unequal
from benchmarks.workloads import Batch, Workload, middle

LARGER, SMALLER = Asked(True, None), Asked(False, None)  # what is good; no bound was asked for

ROWS = ("early", "middle", "late", "positions")


class Case(NamedTuple):
    """A shape, its prompts, and how often everything is timed."""

    workload: Workload
    batch: Batch
    rounds: int

    def rows(self) -> Iterator[tuple[str, Callable[[], Outcome]]]:
        """The rows by name, those of one block only once."""
        blocks, seen = self.workload.blocks, set[int]()
        places = {"early": blocks // 10, "middle": middle(blocks), "late": max(0, blocks - 2)}
        for place, number in places.items():
            if number not in seen:
                yield place, partial(self.at, number)
            seen.add(number)
        yield "positions", self.positions

    def at(self, number: int) -> Outcome:
        """The whole job beside the careful loop's, and the scores beside their floor, at one block."""
        lines, loops = against_loops(self.workload, self.batch, number, self.rounds, LARGER, None)
        floor = roofline.measure(self.workload, self.batch, number, TOP_K, self.rounds)
        what = f"block {number} of {self.workload.blocks}"
        lines = [
            *(line._replace(what=f"{what}: {line.what}") for line in lines),
            Line(f"{what}: time / floor", SMALLER, Ratio(**floor["time_over_floor"])),
        ]
        return lines, {"loops": loops, "floor": floor}

    def positions(self) -> Outcome:
        """The last position beside all, and beside a forward pass; and so the last two blocks."""
        blocks = self.workload.blocks
        number = middle(blocks)
        next_to_last, last = f"block {blocks - 2}", f"block {blocks - 1}"
        jobs = {"all": (number, "all"), "last": (number, "last")}
        jobs |= {next_to_last: (blocks - 2, "all"), last: (blocks - 1, "all")}
        timed, record = against_forward(self.workload, self.batch, jobs, self.rounds)
        lines = [
            Line(f"block {number}: all / last position", LARGER, timed.ratio("all", "last")),
            Line(f"block {number}, last position / bare forward", SMALLER, timed.ratio("last", "forward")),
            Line(f"{next_to_last}, next to last / bare forward", SMALLER, timed.ratio(next_to_last, "forward")),
            Line(f"{last}, the last / bare forward", SMALLER, timed.ratio(last, "forward")),
        ]
        return lines, record


def case(name: str, args: argparse.Namespace) -> Case:
    """The model of a name and its prompts; with --small both are a test's size."""
    workload = todays_shape(name, device=args.device, precision=args.precision, small=args.small)
    shortest, longest = (5, 21) if args.small else (SHORTEST, LONGEST)
    return Case(workload, unequal(workload, 8, shortest, longest), args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.todays", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME", help=", ".join(SHAPES)
    )
    parser.add_argument("--small", action="store_true", help="models of each kind and a test's size, on short prompts")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    measurement_flags(parser)
    parser.add_argument("--json", type=Path)
    args = parsed(parser)
    choices = {"device": args.device, "rounds": args.rounds, "small": args.small, "precision": args.precision}
    written: dict[str, Any] = {"machine": machine(), "choices": choices, "shapes": {}}
    for name in args.shapes:
        now = case(name, args)
        rows: dict[str, Any] = {}
        workload = now.workload
        about = {"model": workload.name, "blocks": workload.blocks, "dtype": str(workload.model.dtype)}
        written["shapes"][name] = about | {"precision": workload.precision.stored(), "rows": rows}
        print(f"{name}: {workload.name}, {workload.model.dtype}\n{HEADING}")
        for row, measure in now.rows():
            if row not in args.rows:
                continue
            lines, record = measure()
            for line in lines:
                print(line.text(row), flush=True)
            rows[row] = record | {"ratios": [line.stored() for line in lines]}
            write_json(args.json, written)
        del now, workload, measure  # before the next model is made
        gc.collect()


if __name__ == "__main__":
    main()
