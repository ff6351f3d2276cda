"""`python -m fisher_vmap COMMAND ...`, which is `fisher-vmap COMMAND ...`, and how every command is started.

Only `sys` is imported before `start` runs: Ctrl-C ends a command in one line even while its libraries are imported. So
each module that `python -m` runs calls `start` before it imports anything else.
"""

import sys


def start(*words: str) -> int:
    """Run the command line of this process.

    Args:
        words: put before its arguments, such as the name of a command.

    Returns:
        The exit code.
    """
    try:
        from fisher_vmap.cli import main

        return main([*words, *sys.argv[1:]])
    except KeyboardInterrupt:  # during that import, or a second one while the first is told
        if sys.stderr is not None:
            sys.stderr.write("fisher_vmap: stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(start())
