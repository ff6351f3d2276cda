"""Read settings from the command line and a YAML file, with a one-line error for any mistake."""

from __future__ import annotations

import argparse
import difflib
import logging
import os.path
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fisher_vmap.cli import ALIASES, Parser, is_settings_file
from fisher_vmap.errors import UserError, nearest, shown
from fisher_vmap.results.folder import RETIRED
from fisher_vmap.run.setting_types import Expected
from fisher_vmap.run.settings import RunOptions, Settings

_log = logging.getLogger(__name__)

_UNASKED = "it was read because it lies in the working folder; --config FILE names another, --config none reads none"
_NO_FILE = "none"  # of --config
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".arrow")
_HINTS = {
    "seed": "a run needs none, it gives the same numbers each time; a random order of the prompts is --shuffle_seed",
    "load_in_4bit": "did you mean --quantization 4bit?",
    "load_in_8bit": "did you mean --quantization 8bit?",
    "prompts": "did you mean 'dataset_name'?",
}
_FIELDS = {**RunOptions.model_fields, **Settings.model_fields}
_EPILOG = """\
examples:
  fisher-vmap run --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl
  fisher-vmap run settings.yaml --hook_layer_name 3,5 --top-k-tokens 20
  fisher-vmap run --num_prompts all --output_dir results/all --overwrite
  fisher-vmap run --num_prompts all --plan
  fisher-vmap run --num_prompts all --shards 3/8

Every setting is also a key of the YAML file (./config.yaml if there is one). Flags beat the file, the file beats the
defaults; the environment is not read. A value that is the name of a flag is written --NAME=VALUE.
"""


class Command(NamedTuple):
    """A command line: the settings of the run and the options of this process."""

    settings: Settings
    options: RunOptions


def load_settings(argv: Sequence[str], *, working_directory: str | Path = ".") -> Settings:
    """The settings part of `load_command`, with the same arguments and errors."""
    return load_command(argv, working_directory=working_directory).settings


def load_command(argv: Sequence[str], *, working_directory: str | Path = ".") -> Command:
    """Read the command line and the YAML file. Flags beat the file, the file beats the defaults.

    Args:
        argv: the command line's arguments, without the program's name.
        working_directory: where `config.yaml` is looked for, and what a relative `--config` is relative to.

    Raises:
        UserError: an unknown name, a wrong value, or a file that cannot be read; one line.
        SystemExit: with code 0, after `--help` was printed.
    """
    flags, typed = _read_flags(argv)
    named = flags.pop("config", None)
    file = Path(working_directory, "config.yaml" if named is None else os.path.expanduser(named))
    values: dict[str, Any] = {}
    if named != _NO_FILE and (named is not None or file.exists()):
        try:
            values = _read_file(file)
        except UserError as error:
            raise error if named is not None else UserError(f"{error} ({_UNASKED})") from error
        _log.info("settings read from %s", file)
    given = values | flags
    options = {name: given.pop(name) for name in RunOptions.model_fields if name in given}
    try:
        return Command(Settings(**given), RunOptions(**options))
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        line = _explain(name, {**given, **options}[name])
        if name in flags:
            raise UserError(f"{line}correct the flag {typed[name]}") from error
        raise UserError(f"{line}correct it in {file}{'' if named is not None else f' ({_UNASKED})'}") from error


def settings_of(kind: type[BaseModel] = Settings, **values: Any) -> Any:
    """The settings with these values, of the class given, for commands that have some of them as flags.

    Raises:
        UserError: a value is wrong; the line names its flag.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        line = _explain(name, values[name], kind.model_fields)
        raise UserError(f"{line}correct the flag --{name}") from error


def add_settings(
    parser: argparse._ActionsContainer, names: Iterable[str], fields: Mapping[str, FieldInfo] = _FIELDS
) -> None:
    """Add settings as flags: their values stay text, for `settings_of`, and one that is not given is no attribute."""
    for name in names:
        field = fields[name]
        default = "none" if field.default is None else written(field.default)
        text = f"{field.description} Default: {default}".replace("%", "%%")
        truth = {"nargs": "?", "const": "true"} if bool in (field.annotation, *get_args(field.annotation)) else {}
        parser.add_argument(f"--{name}", metavar="VALUE", default=argparse.SUPPRESS, help=text, **truth)  # type: ignore[arg-type]


def default_config_yaml() -> str:
    """The text of config.yaml: every setting with its default, below a comment that says what it means."""
    heading = "# Settings of fisher_vmap, with their defaults. A flag of the same name overrides each: --top_k_tokens 5"
    entries = (f"\n# {f.description}\n{name}: {written(f.default)}\n" for name, f in Settings.model_fields.items())
    return heading + "\n" + "".join(entries)


def written(value: object) -> str:
    """A setting's value in YAML, on one line."""
    return str(yaml.safe_dump(value)).splitlines()[0]


class _Parser(Parser):
    """The flags of a run: its settings, and those of this process."""

    def help_line(self) -> str:
        return "--help lists every setting"


def _read_flags(argv: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The values of the command line as text, which the validation of each setting converts, and how it was typed."""
    parser = _Parser(
        "run",
        hints=_HINTS,
        usage="%(prog)s [FILE.yaml] [--NAME VALUE ...]",
        description="The low-rank Fisher matrix of a language model's next token, for every prompt of a data set.",
        epilog=_EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings; none: no file. Default: ./config.yaml if it exists"
    )
    add_settings(parser, _FIELDS)
    for name in RETIRED:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    parsed, left = parser.read_known(argv)
    typed = {flag[2:]: word for flag, word in parser.typed.items()}
    flags = _without_retired(vars(parsed), "the command line")
    if left:
        if any(word.startswith("-") for word in left) or not all(map(is_settings_file, left)):
            raise _unexpected(parser, left)
        if len(left) > 1 or "config" in flags:
            both = [*left, *([f"{typed['config']} {flags['config']}"] if "config" in flags else [])]
            raise UserError(f"two files of settings are named, {' and '.join(both[:2])}; keep one")
        flags["config"] = left[0]
    return flags, typed


def _unexpected(parser: Parser, left: Sequence[str]) -> UserError:
    """The error for words that are no flag and no value."""
    if any(word.startswith("-") and not word[1:2].isdecimal() for word in left):
        return parser.unknown(left)
    word = next(word for word in left if not is_settings_file(word))
    if word.lower().endswith(_DATA_FILES):
        todo = f"prompts are given as --dataset_name {word}, other settings as --NAME VALUE"
    elif word.lstrip("-")[:1].isdecimal():
        todo = "settings are --NAME VALUE, and a list is one word, such as 3,5"
    else:
        todo = "settings are --NAME VALUE, a file of settings ends in .yaml"
    return UserError(f"unexpected argument {shown(word)}; {todo}")


def _without_retired(values: Mapping[Any, Any], where: object) -> dict[Any, Any]:
    """Drop settings of earlier versions with a warning."""
    for name in values:
        if name in RETIRED:
            _log.warning("%s: the setting %s is left out: %s", where, name, RETIRED[name])
    return {name: value for name, value in values.items() if name not in RETIRED}


def read_settings_file(path: str, fields: Mapping[str, FieldInfo], used: Collection[str]) -> dict[str, Any]:
    """The settings of a YAML file that a command uses; the others are left out with a line.

    Raises:
        UserError: the file cannot be read, or a name is no setting.
    """
    values = _read_file(Path(os.path.expanduser(path)), fields)
    if others := [name for name in values if name not in used]:
        _log.info("%s: not used here: %s", path, ", ".join(others))
    return {name: value for name, value in values.items() if name in used}


def _read_file(path: Path, fields: Mapping[str, FieldInfo] = Settings.model_fields) -> dict[str, Any]:
    """Read a YAML file of settings; an empty file holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(
            f"{path}: the settings file cannot be read ({error.strerror}); check its name (--config)"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the settings file as UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}: line {line} is not YAML ({error.problem}); write one 'name: value' a line") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date or number
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not YAML ({reason}); write one 'name: value' a line") from error
    if values is None:
        _log.info("%s is empty: the defaults hold", path)
        return {}
    if not isinstance(values, dict) or not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path}: holds a {type(values).__name__}, not settings; write one 'name: value' a line")
    seen = set()
    for key_node, _ in tree.value:  # PyYAML itself keeps the last of several
        if key_node.value in seen:
            line = key_node.start_mark.line + 1
            raise UserError(f"{path}: line {line} sets {key_node.value!r} a second time; keep one of the two")
        seen.add(key_node.value)
    values = _without_retired(values, path)
    for key in values:
        if key not in fields:
            raise UserError(f"{path}: unknown setting {shown(key)}; {_meant(str(key))}")
    return values


def _explain(name: str, given: object, fields: Mapping[str, FieldInfo] = _FIELDS) -> str:
    """What was given for a setting and what was expected."""
    field = fields[name]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    expected = f"one of {', '.join(choices)}" if choices else None
    expected = expected or next(mark.text for mark in field.metadata if isinstance(mark, Expected))
    near = difflib.get_close_matches(given, choices, n=1) if isinstance(given, str) else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{name}: {shown(given)} was given, {expected} was expected; {hint}"


def _meant(key: str) -> str:
    """What to do about a key of a file that is no setting; names of other programs are only taken as flags."""
    name = key.replace("-", "_")
    if name in _HINTS:
        return _HINTS[name]
    fields = Settings.model_fields
    near = nearest(name, [*fields, *(alias for alias, ours in ALIASES.items() if ours in fields)])
    near = near if near in fields else ALIASES.get(near or "")
    return f"did you mean {near!r}?" if near else "--help lists every setting"
