"""The console script `fisher-vmap`, and what its commands share: logging, error messages, and a common parser."""

import argparse
import functools
import importlib
import logging
import os
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from fisher_vmap import __version__, progress
from fisher_vmap.errors import UserError, WorkerError


class _BesideProgress(logging.StreamHandler[TextIO]):
    """Clears the live progress line while it writes."""

    def emit(self, record: logging.LogRecord) -> None:
        with progress.aside():
            super().emit(record)


def start_logging(*, quiet: bool = False) -> None:
    """Show the package's messages on standard error, and only warnings of the libraries, without their bars.

    Args:
        quiet: show no progress.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_BesideProgress(sys.stderr)])
    logging.getLogger("fisher_vmap").setLevel(logging.INFO)
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):  # they warn whenever they are imported
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not quiet:
        progress.show()


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Make a command's main function end quietly when stdout is closed (`| head`), with the shell's exit code 141."""

    @functools.wraps(main)
    def whole(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(argv)
            finally:
                progress.hide()
                if sys.stdout is not None:  # None if the shell has closed it
                    sys.stdout.flush()  # here, where the error can still be caught
        except BrokenPipeError:
            if not _stdout_is_closed():
                raise  # another pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
            return 141

    return whole


def _stdout_is_closed() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, AttributeError):  # not a file, or Windows
        return False
    return bool(poll.poll(0))


def user_mistake(error: UserError | WorkerError) -> int:
    """Print an error in one line; returns exit code 2."""
    print(f"fisher_vmap: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add --quiet, which `start_logging` takes."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no progress lines")


def folder_command(
    name: str, description: str, lines_of: Callable[[Path], Iterable[str]], argv: Sequence[str] | None, *, long: bool
) -> int:
    """Run a command whose only argument is a results folder.

    Args:
        name: of its module.
        description: for --help.
        lines_of: does the work and returns the lines to print.
        argv: the command line's arguments; None: those of the process.
        long: whether it may take a while and shows its progress.

    Returns:
        The exit code: 0 done, 2 a user's mistake.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m fisher_vmap.{name}",
        description=description,
        epilog=f"example: python -m fisher_vmap.{name} fisher_results",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the results folder, such as fisher_results")
    if long:
        add_quiet(parser)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder
    if long:
        start_logging(quiet=arguments.quiet)
    try:
        print("\n".join(lines_of(folder)))
    except UserError as error:
        return user_mistake(error)
    return 0


COMMANDS = {
    "run": ("fisher_vmap.run.__main__", "compute the Fisher matrices of a data set's prompts"),
    "finish": ("fisher_vmap.finish", "complete a results folder that several processes have filled"),
    "report": ("fisher_vmap.report.__main__", "write a page and images to look at a results folder"),
    "verify": ("fisher_vmap.verify.__main__", "check a results folder"),
    "export": ("fisher_vmap.export", "write directions, control vectors or an npz, or push a folder to the hub"),
    "info": ("fisher_vmap.info", "show what a results folder holds"),
    "demo": ("fisher_vmap.demo", "run the main job on a small model and the prompts shipped with the package"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"fisher-vmap {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"fisher-vmap: there is no command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    code: int = importlib.import_module(COMMANDS[name][0]).main(rest)
    return code


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:8} {what}" for name, (_module, what) in COMMANDS.items()]
    return (
        "usage: fisher-vmap COMMAND ...\n\n"
        + "\n".join(lines)
        + "\n\nfisher-vmap COMMAND --help tells more; fisher-vmap --version."
    )


if __name__ == "__main__":
    sys.exit(main())
