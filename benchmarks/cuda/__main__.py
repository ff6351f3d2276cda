"""`python -m benchmarks.cuda`: the tests on a GPU, the claims at full size, profiles, and the small decompositions.

Each part has a share of the time, prints a line for each result as it comes, and cannot end another; the JSON file is
written after each result. `--device cpu --small` runs the same code on tiny shapes, within two minutes on two cores.
"""

import argparse
import faulthandler
import sys
from pathlib import Path

import torch

from benchmarks.cuda.device_tests import device_tests
from benchmarks.cuda.profiles import profiles
from benchmarks.cuda.rows import claims
from benchmarks.cuda.session import Session
from benchmarks.cuda.small_svd import decompositions

# In this order. The share is of the time that is left then: what a part does not take, the next ones have.
PARTS = (
    ("tests", 0.25, device_tests),
    ("claims", 0.75, claims),
    ("profiles", 0.75, profiles),
    ("small SVD", 1.0, decompositions),
)
GRACE = 1.2  # times the budget: what runs on after that hangs, and is ended


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, which any machine has time for")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all of it (default 480)")
    parser.add_argument("--json", type=Path, help="where the results go")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print(
            f"--device is cuda, and torch {torch.__version__} finds no CUDA device; expected a machine with one: "
            "run this there, or try the command here with --device cpu --small",
            file=sys.stderr,
        )
        return 2
    if args.device == "cpu" and not args.small:
        print("--device is cpu, and the full shapes would take days; expected --small with it", file=sys.stderr)
        return 2
    faulthandler.dump_traceback_later(GRACE * args.budget, exit=True)
    session = Session(torch.device(args.device), args.small, args.budget, args.json)
    for name, share, work in PARTS:
        session.run(name, share, work)
    errors, left_out = session.record["errors"], session.record["left_out"]
    session.say(f"{len(errors)} errors, {len(left_out)} left out for want of time")
    faulthandler.cancel_dump_traceback_later()
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
