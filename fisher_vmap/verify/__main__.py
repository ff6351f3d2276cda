"""`python -m fisher_vmap.verify DIR`: check a results folder's files and numbers.

Prints a line for each check: "ok", or "BAD" with the reason. Exit code 0: all checks passed; 1: a check failed or the
run is unfinished; 2: DIR is not a results folder. With `--kl` the matrices are compared with the model: see `kl.py`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import pyarrow.parquet as pq

from fisher_vmap.cli import add_quiet, command, start_logging, user_mistake
from fisher_vmap.errors import UserError
from fisher_vmap.progress import aside, bar, step
from fisher_vmap.results.index import INDEX_NAME, TABLE_NAME
from fisher_vmap.verify.folder import Check, checks

PROMPTS = 8  # of --kl
MANY = 4  # so many passed checks of one kind are printed in one line


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check a results folder, print a line a check, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fisher_vmap.verify",
        description="Check a results folder: checksums, shapes, finite numbers, orthonormal directions, and that the "
        "npz, the table and the index agree with the shards. With --kl, also run the model: do the matrices predict "
        "how far a step of the residual stream moves the next-token distribution?",
        epilog="examples:\n  python -m fisher_vmap.verify fisher_results\n"
        "  python -m fisher_vmap.verify fisher_results --kl --prompts 16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the results folder, such as fisher_results")
    parser.add_argument("--kl", action="store_true", help="compare predicted with measured KL divergences")
    parser.add_argument("--prompts", type=int, metavar="N", help="with --kl: how many prompts (8)")
    parser.add_argument("--layer", metavar="NAME", help="with --kl: which hooked layer, by name or number (the first)")
    parser.add_argument("--model_path", "--model-path", metavar="PATH", help="with --kl: where the model is now")
    parser.add_argument("--dataset_name", "--dataset-name", metavar="PATH", help="with --kl: where the prompts are now")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --kl: where the plot goes (DIR/kl.png)")
    add_quiet(parser)
    arguments = parser.parse_args(argv)
    start_logging(quiet=arguments.quiet)
    folder: Path = arguments.folder
    if not (folder / INDEX_NAME).exists():
        print(f"{folder} is not a results folder: it has no {INDEX_NAME}", file=sys.stderr)
        return 2
    try:
        _refuse_flags_of_kl(arguments)
        found = list(checks(folder))
        with bar(sum(check.size for check in found), "B", "checking") as advance:
            bad = sum(_carry_out(list(alike), advance) for _, alike in groupby(found, key=_kind))
        if arguments.kl and not bad:
            bad += _check_kl(arguments)
    except UserError as error:
        return user_mistake(error)
    print(f"{folder} is sound{_without_results(folder)}" if not bad else f"{folder}: {bad} checks failed")
    return 1 if bad else 0


def _refuse_flags_of_kl(arguments: argparse.Namespace) -> None:
    """Raise UserError for a flag that needs --kl."""
    for name in ("layer", "prompts", "model_path", "dataset_name", "plot"):
        if getattr(arguments, name) is not None and not arguments.kl:
            raise UserError(f"--{name} is for the check against the model; add --kl, or leave --{name} out")


def _kind(check: Check) -> object:
    return check.name if check.kind is None else check.kind


def _carry_out(alike: Sequence[Check], advance: Callable[[int], None]) -> int:
    """Do checks of one kind and print their lines; returns the number that failed."""
    many, good, bad = len(alike) >= MANY, 0, 0
    for check in alike:
        try:
            found = check.look()
        except UserError as error:
            _print(f"BAD  {check.name}: {error}")
            bad += 1
            continue
        finally:
            advance(check.size)
        good += 1
        if not many:
            _print(f"ok   {check.name}: {found}")
    if many and good:
        _print(f"ok   {alike[0].kind}: {good} of {len(alike)}, the last of them: {found}")
    return bad


def _print(line: str) -> None:
    with aside():
        print(line, flush=True)


def _without_results(folder: Path) -> str:
    status = pq.read_table(folder / TABLE_NAME, columns=["status"])["status"].to_pylist()
    return "" if "ok" in status else f", but none of its {len(status)} prompts has results"


def _check_kl(arguments: argparse.Namespace) -> int:
    """Print and plot how well the matrices predict; returns 1 if they do not, else 0."""
    with step("loading the libraries"):
        from fisher_vmap.results.reader import open_results
        from fisher_vmap.verify.kl import check_kl, plot_kl

    prompts = PROMPTS if arguments.prompts is None else arguments.prompts
    if prompts < 1:
        raise UserError(f"--prompts is {prompts}; expected at least 1")
    results = open_results(arguments.folder)
    found = check_kl(
        results,
        prompts=prompts,
        layer=arguments.layer,
        model_path=arguments.model_path,
        dataset_name=arguments.dataset_name,
    )
    print("\n".join(found.lines()), flush=True)
    plot = arguments.plot or arguments.folder / "kl.png"
    try:
        with step("drawing the plot"):
            plot_kl(found, plot)
        print(f"     drawn in {plot}")
    except UserError as error:
        if arguments.plot is not None:
            raise
        print(f"     not drawn: {error}")
    return 0 if found.ok else 1


if __name__ == "__main__":
    sys.exit(main())
