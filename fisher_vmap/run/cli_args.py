"""Where settings come from: the command line and a YAML file, and one clear line for whatever is wrong with them.

The functions take the settings class, or its fields, so nothing here names a setting.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fisher_vmap.errors import UserError
from fisher_vmap.results.folder import RETIRED
from fisher_vmap.run.setting_types import Expected

_log = logging.getLogger(__name__)

_UNASKED = "it was read because it lies in the working folder, and --config FILE names another"

SettingsT = TypeVar("SettingsT", bound=BaseModel)
OptionsT = TypeVar("OptionsT", bound=BaseModel)

_EPILOG = """\
examples:
  python -m fisher_vmap.run --model_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name prompts.jsonl
  python -m fisher_vmap.run --config config.yaml --hook_layer_name 3,5 --top-k-tokens 20
  python -m fisher_vmap.run --num_prompts all --output_dir results/all --overwrite
  python -m fisher_vmap.run --num_prompts all --plan
  python -m fisher_vmap.run --num_prompts all --shards 3/8

Every setting is also a key of the YAML file (./config.yaml if there is one). Flags beat the file, the file beats the
defaults; the environment is not read.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists every setting")


def _parser(fields: Mapping[str, FieldInfo], others: Mapping[str, FieldInfo]) -> argparse.ArgumentParser:
    """One flag for each field and each of the `others`; its value stays text, for the field's own check to read."""
    parser = _Parser(
        prog="python -m fisher_vmap.run",
        usage="%(prog)s [--config FILE] [--NAME VALUE ...]",
        description="The low-rank Fisher matrix of a language model's next token, for every prompt of a data set.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings. Default: ./config.yaml if it exists")
    for name, field in {**others, **fields}.items():
        default = "none" if field.default is None else written(field.default)
        text = f"{field.description} Default: {default}".replace("%", "%%")
        if bool in (field.annotation, *get_args(field.annotation)):
            parser.add_argument(f"--{name}", metavar="VALUE", help=text, nargs="?", const="true")
        else:
            parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    return parser


def written(value: object) -> str:
    """Write a setting's value as YAML does, on one line."""
    return str(yaml.safe_dump(value)).splitlines()[0]


def _underscored(argument: str) -> str:
    """`--top-k-tokens=5` means `--top_k_tokens=5`."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return "--" + flag.replace("-", "_") + equals + value


def _nearest(word: str, words: Iterable[str]) -> str:
    word, words = word.replace("-", "_"), list(words)
    # A slip of the fingers first, then a part of a name; what looks a little like one would be nonsense.
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.7)
    near = near or [name for name in words if word and word in name.split("_")]
    bare = word.replace("_", "")
    near = near or [name for name in words if len(bare) > 2 and bare in name.replace("_", "")]
    return f"did you mean {near[0]!r}?" if near else "--help lists every setting"


def _shown(value: object) -> str:
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = 60
    shortened.maxlong = 30
    return shortened.repr(value)


def _expected(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return "one of " + ", ".join(get_args(field.annotation))
    return next(mark.text for mark in field.metadata if isinstance(mark, Expected))


def read_flags(
    argv: Sequence[str], fields: Mapping[str, FieldInfo], others: Mapping[str, FieldInfo] | None = None
) -> dict[str, Any]:
    """Read the command line: `--NAME VALUE` for each field (dashes work too) and `--config FILE`; prints `--help`.

    Args:
        argv: the command line's arguments.
        fields: the settings.
        others: what is no setting, and has a flag nevertheless.

    Returns:
        The values given, as text, under the fields' names; and under "config" the file, if it is named.

    Raises:
        UserError: an unknown flag, a flag without its value, or anything that is no flag.
        SystemExit: with code 0, after `--help` was printed.
    """
    parser = _parser(fields, others or {})
    for name in RETIRED:
        parser.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)
    parsed, left_over = parser.parse_known_args([_underscored(argument) for argument in argv])
    if left_over:
        first = left_over[0].partition("=")[0]
        if not first.startswith("-"):
            raise UserError(f"unexpected argument {_shown(first)}; settings are --NAME VALUE, a file is --config FILE")
        raise UserError(f"unknown flag {_shown(first)}; {_nearest(first.lstrip('-'), {**fields, **(others or {})})}")
    return {name: value for name, value in vars(parsed).items() if not _is_retired(name, "the command line")}


def _is_retired(name: object, where: object) -> bool:
    """Whether a setting is one of earlier versions; if so it is left out, and a line says so."""
    if name not in RETIRED:
        return False
    _log.warning("%s: the setting %s is left out: %s", where, name, RETIRED[str(name)])
    return True


def read_settings_file(path: Path, fields: Mapping[str, FieldInfo]) -> dict[str, Any]:
    """Read a YAML file of settings; an empty one holds none.

    Raises:
        UserError: the file cannot be read, is not YAML, is no mapping, or has a key twice or an unknown one.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: the settings file cannot be read ({error.strerror}); check --config") from error
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
    for key_node, _ in tree.value:  # PyYAML itself lets the last of several win
        if key_node.value in seen:
            line = key_node.start_mark.line + 1
            raise UserError(f"{path}: line {line} sets {key_node.value!r} a second time; keep one of the two")
        seen.add(key_node.value)
    values = {key: value for key, value in values.items() if not _is_retired(key, path)}
    for key in values:
        if key not in fields:
            raise UserError(f"{path}: unknown setting {_shown(key)}; {_nearest(str(key), fields)}")
    return values


def explain(
    error: ValidationError,
    fields: Mapping[str, FieldInfo],
    flags: Mapping[str, Any],
    values: Mapping[str, Any],
    file: Path,
) -> str:
    """Say in one line what was given for the first wrong setting, what was expected, and where to correct it."""
    name = str(error.errors()[0]["loc"][0])
    field = fields[name]
    given = flags[name] if name in flags else values[name]
    line = f"{name}: {_shown(given)} was given, {_expected(field)} was expected; "
    if isinstance(given, str) and get_origin(field.annotation) is Literal:
        near = difflib.get_close_matches(given, get_args(field.annotation), n=1)
        line += f"did you mean {near[0]!r}? " if near else ""
    return line + (f"correct the flag --{name}" if name in flags else f"correct it in {file}")


def load(
    settings: type[SettingsT], options: type[OptionsT], argv: Sequence[str], working_directory: Path
) -> tuple[SettingsT, OptionsT]:
    """Make settings and options from a command line and a YAML file; flags beat the file, the file the defaults.

    Args:
        settings: their fields are flags and keys of the file.
        options: their fields are flags alone.
        argv: the command line's arguments.
        working_directory: where `config.yaml` is looked for, and what a relative `--config` is relative to.

    Raises:
        UserError: an unknown name, a wrong value, or a file that cannot be read; one line.
        SystemExit: with code 0, after `--help` was printed.
    """
    flags = read_flags(argv, settings.model_fields, options.model_fields)
    for_this_process = {name: flags.pop(name) for name in options.model_fields if name in flags}
    named = flags.pop("config", None)
    file = Path(working_directory, "config.yaml" if named is None else named)
    values: dict[str, Any] = {}
    if named is not None or file.exists():
        try:
            values = read_settings_file(file, settings.model_fields)
        except UserError as error:
            raise error if named is not None else UserError(f"{error}; {_UNASKED}") from error
        _log.info("settings read from %s", file)
    try:
        return settings(**(values | flags)), options(**for_this_process)
    except ValidationError as error:
        fields = {**settings.model_fields, **options.model_fields}
        line = explain(error, fields, flags | for_this_process, values, file)
        unasked = named is None and line.endswith(str(file))
        raise UserError(f"{line}; {_UNASKED}" if unasked else line) from error
