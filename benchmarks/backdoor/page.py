"""The results in docs/backdoor.md, from the kept numbers: `python -m benchmarks.backdoor.page`.

What stands before the mark in the page is the plan, which this script does not touch.
"""

import argparse
from pathlib import Path

from benchmarks.backdoor import directions
from benchmarks.backdoor.figure import draw
from benchmarks.backdoor.sections import FIRST_METHOD, behaviours, label, layers, planting, prompts
from benchmarks.backdoor.verdicts import CRITERIA, MODELS, Kept, elicited, parts
from benchmarks.backdoor.which_prompts import PRIMARY

KEPT = Path("benchmarks/results/backdoor.json")
PAGE = Path("docs/backdoor.md")
FIGURE = Path("docs/images/backdoor.png")
MARK = "<!-- What follows is written by `python -m benchmarks.backdoor.page`. -->\n"


LEFT_OUT = """\
Left out for computing time, as the plan allows: the second reading of (a) with eight targets, and elicitation at layers
10 and 20. Of them there is no code.
"""


def summary(kept: Kept) -> list[str]:
    """What the numbers say, in short."""
    lines, asked, names = list[str](), kept.measured("prompts"), kept.measured("behaviour")
    counted = (("(a) and (c)", "prompts", asked), ("(b)", "behaviour", names))
    for question, section, of in counted:
        if kept.state(section):
            counts = f"{question}: so far {len(of)} of {len(MODELS)} planted models"
            lines += [f"{counts}; no criterion is met before all are measured, and all controls.", ""]
    for score, base in (("total", "Without the base"), ("change", "With it")) if asked else ():
        each = [kept.data["prompts"][name]["hunts"][0]["layers"][PRIMARY][score] for name in asked]
        told = [
            f"{of['auc']:.3f} and {of['precision']:.2f} in {label(kept, n)}" for n, of in zip(asked, each, strict=True)
        ]
        lines += [f"* {base}, AUC and precision at 20 of `{score}` are {'; '.join(told)}."]
        for what, word in (("auc", "AUC"), ("precision", "precision")):
            against = dict[str, list[str]]()
            for name in CRITERIA[score]:
                gain = kept.gain((score, PRIMARY), (name, PRIMARY), what)
                against.setdefault(gain.against(), []).append(name)
            said = "; ".join(f"{how} {' and '.join(of)}" for how, of in against.items())
            lines += [f"  By mean {word} it is {said}."]
    if names:
        own = [elicited(kept, name, FIRST_METHOD) for name in names]
        best = max(kept.data["behaviour"][n]["methods"][directions.CEILING][parts(n)[0]]["rate"] for n in names)
        rates, count = ", ".join(f"{of.rate:.2f}" for of in own), sum(of.found for of in own)
        lines += [
            f"* Steps from ordinary prompts bring out the behaviour in {count} of {len(own)} models ({FIRST_METHOD}: "
            f"{rates} of the testing prompts). The difference of means with the trigger and without it, which no "
            f"hunter has, brings it out in {best:.0%} of them at most."
        ]
    return [*lines, ""]


def precisions(kept: Kept) -> list[str]:
    """What the matrices were computed in."""
    said = [f"of ({name}) of {', '.join(of)}" for name, question in (("a", "prompts"), ("b", "behaviour"))
            if (of := kept.in_float32(question))]  # fmt: skip
    return [f"The matrices are in bfloat16, but those {' and '.join(said)} in float32.", ""] if said else []


def results(kept: Kept, numbers: Path = KEPT, figure: str = f"images/{FIGURE.name}") -> str:
    """Everything after the mark, of numbers in a file, with a link to the figure."""
    machines = {record["machine"]["cpu"] for of in kept.data.values() for record in of.values() if "machine" in record}
    text = [
        "## What was found",
        "",
        f"Computed on {', '.join(sorted(machines))}; seeds, versions and commits stand beside each number in "
        f"`{numbers}`.",
        "",
        *precisions(kept),
        f"![The AUC of the prompts with the trigger by layer, and the rates of all methods]({figure})", "",
        "On the left `total` is solid and `change` dashed; models with * are not planted by the criterion.", "",
        *summary(kept), LEFT_OUT, *planting(kept), *prompts(kept), *behaviours(kept), *layers(kept),
    ]  # fmt: skip
    return "\n".join(text).rstrip() + "\n"


def main() -> None:
    """Write the results into the page, or of other numbers into a file of their own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backdoor.page", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help=f"other numbers than {KEPT}, which need --output")
    parser.add_argument("--output", type=Path, help=f"a file for the results alone, in place of {PAGE}")
    args = parser.parse_args()
    if args.output:
        numbers, figure = args.json or KEPT, args.output.with_suffix(".png")
        kept = Kept(numbers)
        args.output.write_text(results(kept, numbers, figure.name), "utf-8")
        draw(kept, figure)
        print(f"the results are in {args.output}")
        return
    if args.json:
        parser.error("give --output with --json")
    plan = PAGE.read_text("utf-8").split(MARK)[0].rstrip()
    kept = Kept(KEPT)
    PAGE.write_text(f"{plan}\n\n{MARK}\n{results(kept)}", "utf-8")
    draw(kept, FIGURE)


if __name__ == "__main__":
    main()
