"""The hunt in one model: `python -m benchmarks.backdoor.hunt --behaviour sentence --seed 0 --adapter FOLDER --work W`.

docs/backdoor.md says what is asked. FOLDER is what `plant` wrote; W holds models, matrices and readings, so that a hunt
that was stopped goes on; the base's are made once for all models. `--json FILE` adds the numbers to the kept ones, and
`--questions` takes some of the questions: prompts is (a) and (c), behaviour is (b). Without `--adapter` nothing is
hunted: the base's own numbers of (a) are kept, under "base".
"""

import argparse
import time
from pathlib import Path

from benchmarks.backdoor.behaviours import BEHAVIOURS
from benchmarks.backdoor.elicit import elicit
from benchmarks.backdoor.plant import file_name, keep, name_of
from benchmarks.backdoor.prompt_scores import SEEDS
from benchmarks.backdoor.runs import model_folder
from benchmarks.backdoor.which_prompts import PRIMARY, Seen, which_prompts
from benchmarks.timing import machine

QUESTIONS = ("prompts", "behaviour")


def main() -> None:
    """Hunt in one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backdoor.hunt", description=__doc__.splitlines()[0])
    parser.add_argument("--behaviour", choices=list(BEHAVIOURS), help="what was planted, or what the control is of")
    parser.add_argument("--seed", type=int, choices=SEEDS, default=0)
    parser.add_argument("--control", action="store_true", help="the adapter is a control's")
    parser.add_argument("--adapter", type=Path, help="the folder that plant wrote; none: the base model alone")
    parser.add_argument("--work", type=Path, required=True, help="a folder for models, matrices and readings")
    parser.add_argument("--json", type=Path, required=True, help="a file of kept numbers, to which these are added")
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    args = parser.parse_args()
    if (args.adapter is None) != (args.behaviour is None):
        parser.error("give --behaviour and --adapter, or neither of them")
    began = time.perf_counter()
    base_folder = model_folder(None, args.work / "base" / "model")
    if args.adapter is None:
        seen = Seen(base_folder, args.work / "base", None)
        found = [which_prompts(seen, behaviour, seed, None) for behaviour in BEHAVIOURS for seed in SEEDS]
        keep(args.json, "prompts", "base", {"hunts": found, "machine": machine()})
        return
    name = name_of(args.behaviour, args.seed, args.control)
    work = args.work / file_name(name)
    folder = model_folder(args.adapter, work / "model")
    if "prompts" in args.questions:
        seen = Seen(folder, work, Seen(base_folder, args.work / "base", None))
        of = list(BEHAVIOURS) if args.control else [args.behaviour]
        ranks = None if args.control else args.json.parent / args.json.stem / f"{file_name(name)}.npz"
        found = [which_prompts(seen, behaviour, args.seed, ranks) for behaviour in of]
        seconds = round(time.perf_counter() - began, 1)
        keep(args.json, "prompts", name, {"hunts": found, "seconds": seconds, "machine": machine()})
    if "behaviour" in args.questions:
        tested = list(BEHAVIOURS.values()) if args.control else [BEHAVIOURS[args.behaviour]]
        answer = elicit(folder, base_folder, work, tested, PRIMARY, base_work=args.work / "base", seed=args.seed)
        keep(args.json, "behaviour", name, answer | {"machine": machine()})


if __name__ == "__main__":
    main()
