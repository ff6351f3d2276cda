"""The console script `fisher-vmap`: one word for each of the package's commands."""

import importlib
import sys
from collections.abc import Sequence

from fisher_vmap._version import __version__
from fisher_vmap.settings.command_line import command

COMMANDS = {
    "run": ("fisher_vmap.run", "compute the Fisher matrices of a data set's prompts"),
    "finish": ("fisher_vmap.finish", "complete a results folder that several processes have filled"),
    "report": ("fisher_vmap.report.command", "write a page and images to look at a results folder"),
    "verify": ("fisher_vmap.verify", "check a results folder"),
    "export": ("fisher_vmap.export", "write directions, control vectors or an npz, or push a folder to the hub"),
    "info": ("fisher_vmap.info", "show what a results folder holds"),
    "demo": ("fisher_vmap.demo", "run the main job on a small model and the prompts shipped with the package"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the command of that name; returns its exit code."""
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
