"""The console script `fisher-vmap`, and what its commands share: logging, errors, and a parser of flags."""

import argparse
import functools
import importlib
import logging
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from fisher_vmap import __version__, progress
from fisher_vmap.errors import UserError, WorkerError, nearest, shown

_log = logging.getLogger(__name__)


class _BesideProgress(logging.StreamHandler[TextIO]):
    """Clears the live progress line while it writes."""

    def emit(self, record: logging.LogRecord) -> None:
        with progress.aside():
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written."""
        if not isinstance(sys.exception(), OSError) and not getattr(self.stream, "closed", True):
            super().handleError(record)


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
    """Give a command's main function the exit codes and the one line of error that all commands share.

    2 a user's mistake, or standard output that cannot be written; 1 a worker failed; 130 stopped by Ctrl-C; and as in
    the shell, 141 without a line when the reader of standard output has had enough (`| head`).
    """

    @functools.wraps(main)
    def whole(argv: Sequence[str] | None = None) -> int:
        progress.prepare_streams()
        try:
            try:
                return main(argv)
            finally:
                progress.hide()
                if sys.stdout is not None:  # None if the shell has closed it
                    sys.stdout.flush()  # here, where the error can still be caught
                if failure := _stdout_failure():
                    raise failure
        except (UserError, WorkerError) as error:
            return user_mistake(error) if isinstance(error, UserError) else worker_failed(error)
        except KeyboardInterrupt:
            return stopped("stopped; the same command begins again")
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                if not _stdout_is_closed():
                    raise  # another pipe
                _leave_stdout()
                return 141
            if error is not _stdout_failure():
                raise
            _leave_stdout()
            reason = (error.strerror or str(error)).lower()
            return user_mistake(UserError(f"standard output cannot be written: {reason}; send it somewhere else"))

    return whole


def _stdout_is_closed() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
    except (OSError, AttributeError):  # not a file, or Windows
        return False
    return bool(poll.poll(0))


def _stdout_failure() -> OSError | None:
    """The error of standard output, if it could not be written: see `progress.prepare_streams`."""
    failure: OSError | None = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failure", None)
    return failure


def _leave_stdout() -> None:
    """Let what standard output still holds go nowhere, or Python would fail once more at its exit."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if _stdout_failure():
        stream: Any = sys.stdout.buffer
        stream.raw.failure = None  # it has been told


def say(text: str) -> None:
    """Print a line about the command as a whole on standard error."""
    print(f"fisher_vmap: {' '.join(text.split())}", file=sys.stderr)


def user_mistake(error: UserError) -> int:
    """Print an error in one line; returns exit code 2."""
    say(str(error))
    return 2


def worker_failed(error: WorkerError) -> int:
    """Print an error in one line; returns exit code 1."""
    say(str(error))
    return 1


def stopped(text: str) -> int:
    """Print a line after Ctrl-C, whose sign a terminal shows; returns exit code 130."""
    if sys.stderr.isatty():
        print(file=sys.stderr)
    say(text)
    return 130


# Names that people know from other programs -> ours, for each command that has that flag.
ALIASES = {
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "model_id"), "model_path"),
    **dict.fromkeys(("pretrained", "pretrained_model_name_or_path"), "model_path"),
    "revision": "model_revision",
    **dict.fromkeys(("adapter", "adapter_name_or_path", "peft", "lora_path"), "adapter_path"),
    "torch_dtype": "dtype",
    "attn_impl": "attn_implementation",
    **dict.fromkeys(("dataset", "dataset_path", "dataset_id", "data", "data_path", "input"), "dataset_name"),
    **dict.fromkeys(("dataset_config_name", "subset"), "dataset_config"),
    "split": "dataset_split",
    **dict.fromkeys(("limit", "num_samples", "max_samples", "num_examples", "max_examples"), "num_prompts"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "max_model_len"), "max_length"),
    **dict.fromkeys(("layer", "layers", "hook_layer", "hook_layers", "hook_name", "hook_point"), "hook_layer_name"),
    **dict.fromkeys(("top_k", "topk"), "top_k_tokens"),
    "rank": "num_singular_values",
    **dict.fromkeys(("output", "out", "output_path", "output_folder", "out_dir"), "output_dir"),
    "overwrite_output_dir": "overwrite",
    "config_file": "config",
}
_ALIASES_OF_OUTPUT = {"out": "output", "output_path": "output", "output_file": "output"}  # a report's


class Parser(argparse.ArgumentParser):
    """The flags of a command, with the habits that all commands share.

    In a flag's name `-` and `_` are the same; its value stays as it is, also one that begins with dashes, unless it is
    itself the name of a flag: that is written --flag=value. A flag given twice is refused. Names of `ALIASES` are
    taken with a line in the log. A mistake raises UserError.
    """

    def __init__(self, name: str, *, hints: Mapping[str, str] | None = None, **options: Any) -> None:
        """Begin a parser.

        Args:
            name: the command's.
            hints: unknown flag -> what to do instead.
            options: of `argparse.ArgumentParser`.
        """
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=f"fisher-vmap {name}", allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=VERSION, help="print the package's version")
        self.hints = hints or {}
        self.typed: dict[str, str] = {}
        """For each flag that was given, by its own name: how it was typed."""

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The values of a command line; None: this process's. Starts the logging, too.

        Raises:
            UserError: an unknown, repeated, or wrong flag, or a word too many.
        """
        start_logging()
        found, left = self.read_known(sys.argv[1:] if argv is None else argv)
        if getattr(found, "quiet", False):
            progress.hide()
        if left:
            raise self.unknown(left)
        return found

    def read_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The values, and the words that are left over."""
        found, left = self.parse_known_args(self._spelt_out(argv))
        if renamed := [f"{typed} as {name}" for name, typed in self.typed.items() if _plain(typed) != _plain(name)]:
            _log.info("read %s", ", ".join(renamed))
        return found, left

    def unknown(self, left: Sequence[str]) -> UserError:
        """The error for words that are left over."""
        flags = [word for word in left if word.startswith("-") and not _is_a_number(word)]
        if not flags:
            return UserError(f"unexpected argument {shown(left[0])}; `{self.prog} --help` shows what is expected")
        flag = flags[0].partition("=")[0]
        name = _plain(flag)
        if name in self.hints:
            return UserError(f"unknown flag {shown(flag)}; {self.hints[name]}")
        own = self._own_names()
        near = nearest(name, [*own, *(alias for alias, ours in ALIASES.items() if ours in own)])
        near = near if near in own else ALIASES.get(near or "")
        return UserError(f"unknown flag {shown(flag)}; {f'did you mean {near!r}?' if near else self.help_line()}")

    def help_line(self) -> str:
        """What to do when there is nothing better to say."""
        return "--help lists every flag"

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message."""
        raise UserError(f"{message}; {self.help_line()}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse, which takes the value "--" away where a flag has it."""
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def _own_names(self) -> dict[str, str]:
        """Names of flags, with underscores -> as they were defined."""
        return {_plain(flag): flag for flag in self._option_string_actions if flag.startswith("--")}

    def _flag(self, word: str) -> str | None:
        """The flag that a word of the command line names, as it was defined; None: it names none."""
        typed = word.partition("=")[0]
        if not typed.startswith("--"):
            return typed if typed in self._option_string_actions else None
        own, name = self._own_names(), _plain(typed)
        for known in (name, ALIASES.get(name), _ALIASES_OF_OUTPUT.get(name)):
            if known in own:
                return own[known]
        return None

    def _spelt_out(self, argv: Sequence[str]) -> list[str]:
        """The words with flags by their own names, and values behind "=", where argparse does not look at them."""
        self.typed = {}
        spelt: list[str] = []
        values: dict[int, str] = {}
        words = deque(argv)
        while words:
            word = words.popleft()
            if word == "--":
                return [*spelt, word, *words]
            if (flag := self._flag(word)) is None:
                spelt.append(word)
                continue
            action, (typed, equals, value) = self._option_string_actions[flag], word.partition("=")
            if action.nargs is None and not equals:
                value, equals = self._next_value(typed, words), "="
            elif action.nargs == "?" and not equals:
                said = words and not words[0].startswith("-") and not is_settings_file(words[0])
                value, equals = words.popleft() if said else str(action.const), "="
            if not isinstance(action, argparse._HelpAction | argparse._VersionAction | argparse._AppendAction):
                if id(action) in values:
                    raise UserError(self._repeated(flag, typed, values[id(action)], value))
                values[id(action)] = value
            self.typed.setdefault(flag, typed)
            spelt.append(f"{flag}{equals}{value}")
        return spelt

    def _next_value(self, typed: str, words: deque[str]) -> str:
        if not words:
            raise UserError(f"{typed}: a value was expected behind it; {self.help_line()}")
        if self._flag(words[0]) is not None:
            raise UserError(
                f"{typed}: a value was expected, and {shown(words[0])} is a flag; a value of this name is written "
                f"{typed}={words[0]}"
            )
        return words.popleft()

    def _repeated(self, flag: str, typed: str, first: str, second: str) -> str:
        before = self.typed[flag]
        both = f": {shown(first)} and {shown(second)}" if first or second else ""
        twice = f"{typed} is given twice" if before == typed else f"{before} and {typed} are the same flag"
        return f"{twice}{both}; keep one"


def _plain(flag: str) -> str:
    """A flag's name with underscores, without the dashes before it."""
    return flag[2:].replace("-", "_") if flag.startswith("--") else flag.lstrip("-")


def _is_a_number(word: str) -> bool:
    return word.lstrip("-")[:1].isdecimal()


def is_settings_file(word: str) -> bool:
    """Whether a word of the command line looks like the name of a YAML file."""
    return word.lower().endswith((".yaml", ".yml"))


def path_argument(text: str) -> Path:
    """A path of the command line, whose `~` is the home folder: the shell leaves that of --name=~/x as it is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path was expected, and an empty text was given")
    return Path(os.path.expanduser(text))


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """Add --quiet, which `Parser.read` carries out."""
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no progress lines")


def folder_command(
    name: str, description: str, lines_of: Callable[[Path], Iterable[str]], argv: Sequence[str] | None
) -> int:
    """Run a command whose only argument is a results folder.

    Args:
        name: of the command.
        description: for --help.
        lines_of: does the work and returns the lines to print.
        argv: the command line's arguments; None: those of the process.

    Returns:
        The exit code, 0.

    Raises:
        UserError: as `lines_of`, or the arguments are wrong.
    """
    parser = Parser(name, description=description, epilog=f"example: fisher-vmap {name} fisher_results")
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="the results folder, such as fisher_results")
    add_quiet(parser)
    folder: Path = parser.read(argv).folder
    print("\n".join(lines_of(folder)))
    return 0


COMMANDS = {
    "run": ("fisher_vmap.run.__main__", "compute the Fisher matrices of a data set's prompts"),
    "finish": ("fisher_vmap.finish", "complete a results folder that several processes have filled"),
    "report": ("fisher_vmap.report.__main__", "write a page and images to look at a results folder"),
    "compare": ("fisher_vmap.compare.__main__", "compare two results folders of the same prompts"),
    "verify": ("fisher_vmap.verify.__main__", "check a results folder"),
    "export": ("fisher_vmap.export", "write directions, control vectors or an npz, or push a folder to the hub"),
    "steer-to": ("fisher_vmap.steer_to", "find the step that gains tokens most for a given KL divergence"),
    "lens": ("fisher_vmap.lens.__main__", "fit the Jacobian lens of a model on texts"),
    "info": ("fisher_vmap.info", "show what a results folder holds"),
    "demo": ("fisher_vmap.demo", "run the main job on a small model and the prompts shipped with the package"),
}
VERSION = f"fisher-vmap {__version__}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["help"]:  # help, or help COMMAND
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(VERSION)
        return 0
    name, *rest = arguments
    if (found := COMMANDS.get(name) or COMMANDS.get(name.replace("_", "-"))) is None:
        raise UserError(_no_command(name, arguments))
    return int(importlib.import_module(found[0]).main(rest))


DATA_ENDINGS = ("jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz")  # the commonest


def _no_command(name: str, arguments: Sequence[str]) -> str:
    line = f"there is no command {name!r}; expected one of {', '.join(COMMANDS)}"
    if name.startswith("--") or is_settings_file(name):
        return f"{line}: a run is fisher-vmap run {name}{' ...' if len(arguments) > 1 else ''}"
    if name.partition(".")[2] in DATA_ENDINGS:
        return f"{line}: a run is fisher-vmap run --dataset_name {name} ..."
    near = nearest(name, COMMANDS)
    return f"{line}; did you mean {near!r}?" if near else line


def usage() -> str:
    """The list of commands."""
    lines = "\n".join(f"  {name:9} {what}" for name, (_module, what) in COMMANDS.items())
    return f"usage: fisher-vmap COMMAND ...\n\n{lines}\n\nfisher-vmap COMMAND --help tells more; fisher-vmap --version."


if __name__ == "__main__":
    sys.exit(main())
