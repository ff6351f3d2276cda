"""The types of settings: what each accepts, as text of the command line or as a value of YAML, and its check."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, GetCoreSchemaHandler, PlainSerializer
from pydantic_core import CoreSchema, core_schema


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Expected:
    """Metadata of a setting's type.

    Attributes:
        text: what the error message says was expected.
        read: converts a value from YAML or the command line, before pydantic validates its type.
        check: checks or converts the validated value.
    """

    text: str
    read: Callable[[Any], Any] = _same
    check: Callable[[Any], Any] = _same

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Put `read` before and `check` after the validation of the type."""
        schema = core_schema.no_info_before_validator_function(self.read, handler(source))
        return core_schema.no_info_after_validator_function(self.check, schema)


def _refuse(reason: str, wrong: bool = True) -> None:
    if wrong:
        raise ValueError(reason)


def _number(value: Any) -> Any:
    _refuse("a truth value", isinstance(value, bool))  # Python would take true for 1
    return value


def _none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


_NONE_AS_TEXT = re.compile(r"""(["'])(none|null)\1""", re.IGNORECASE)


def _passage(value: Any) -> Any:
    """None for the words; white space is a text, and so is a word that has quotation marks of its own."""
    if not isinstance(value, str):
        return value
    quoted = _NONE_AS_TEXT.fullmatch(value)
    return quoted[2] if quoted else None if value.lower() in ("", "none", "null") else value


def _written_passage(value: str | None) -> str | None:
    """The passage so that it is read back as it is."""
    return f'"{value}"' if value is not None and value.lower() in ("none", "null") else value


def _parsed(value: Any, opening: str) -> Any:
    """Parse a list or mapping given as text on the command line; leave any other value alone."""
    if not isinstance(value, str) or not value.lstrip().startswith(opening):
        return value
    try:
        return yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError("not YAML") from error


def _listed(value: Any) -> Any:
    """Split a list given as text, "[a, b]" or "a,b"."""
    value = _parsed(value, "[")
    if not isinstance(value, str):
        return value
    return [part.strip() for part in value.split(",")] if "," in value else value.strip()


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _encodable(value: str | None) -> str | None:
    if value is not None:
        value.encode("utf-8")  # a lone surrogate can be neither tokenised nor written to a file
    return value


def _one_line(value: str | None) -> str | None:
    if value is None:
        return None
    value = value.strip()
    _refuse("empty, or holds a control character", not value or any(ord(character) < 32 for character in value))
    return _encodable(value)


def _path(value: str | None) -> str | None:
    value = _one_line(value)
    return None if value is None else os.path.expanduser(value)


def _layers(value: Any) -> Any:
    """A layer or a tuple of layers; numbers given as text become numbers."""
    value = _listed(value)
    several = isinstance(value, list | tuple)
    layers: list[int | str] = []
    for layer in value if several else [value]:
        _refuse("neither a name nor a number", isinstance(layer, bool) or not isinstance(layer, int | str))
        if isinstance(layer, str) and layer.strip().removeprefix("-").isdecimal():
            layer = int(layer)
        _refuse("no layer has this number", isinstance(layer, int) and abs(layer) > 1_000_000)
        layers.append(layer if isinstance(layer, int) else str(_one_line(layer)))
    _refuse("empty, a layer twice, or 'all' in a list", not layers or len(set(layers)) < len(layers))
    _refuse("'all' in a list", several and "all" in layers)
    return tuple(layers) if several else layers[0]


def _columns(value: Any) -> Any:
    value = _none_word(_listed(value))
    if value is None:
        return None
    columns = list(value) if isinstance(value, list | tuple) else [value]
    _refuse("not a list of names", not columns or not all(isinstance(column, str) and column for column in columns))
    return tuple(dict.fromkeys(columns))


def _device_map(value: Any) -> Any:
    value = _parsed(_none_word(value), "{")
    if isinstance(value, str):
        value = value.strip()
        _refuse("not a device map", value not in ("auto", "balanced", "balanced_low_0", "sequential"))
    elif value is not None:
        _refuse("not names of modules", not isinstance(value, dict) or not value)
        _refuse("not names of modules", not all(isinstance(name, str) for name in value))
        _refuse("not devices", not all(_is_index(at) or (isinstance(at, str) and at) for at in value.values()))
    return value


def _max_memory(value: Any) -> Any:
    value = _parsed(_none_word(value), "{")
    _refuse("not a mapping", value is not None and (not isinstance(value, dict) or not value))
    for device, size in (value or {}).items():
        in_words = isinstance(size, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)? ?([KMGT]i?B)", size.strip())
        known = _is_index(device) or device == "cpu"
        _refuse("not a device and a size", not known or not (_is_index(size) or in_words))
    return value


def _mapping(value: Any) -> Any:
    value = _parsed(_none_word(value), "{")
    _refuse("not a mapping", value is not None and not isinstance(value, dict))
    _refuse("not names", not all(isinstance(name, str) for name in value or {}))
    return value or None


def _worker_range(value: Any) -> Any:
    """A number of workers, or a pair of the least and the most."""
    value = _listed(value)
    if not isinstance(value, list | tuple):
        return _number(value)
    numbers = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in value]
    _refuse("not two numbers", len(numbers) != 2 or not all(_is_index(number) and number for number in numbers))
    _refuse("the least is above the most", numbers[0] > numbers[1])
    return tuple(numbers)


def _gpus(value: float | str) -> float | str:
    _refuse("more than one, and not whole", isinstance(value, float) and value > 1 and not value.is_integer())
    return value


def _share(value: Any) -> tuple[int, int]:
    """Read `i/n` as a pair of numbers."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", value) if isinstance(value, str) else None
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("not a share")
    return int(match[1]), int(match[2])


def _whole(least: int, most: int, word: str = "") -> Expected:
    """A whole number within limits; or, if given, the word "auto", "all" or "none"."""

    def check(value: Any) -> Any:
        _refuse("outside the limits", isinstance(value, int) and not least <= value <= most)
        return value

    def read(value: Any) -> Any:
        return _none_word(_number(value)) if word == "none" else _number(value)

    return Expected(f"{word}{' or ' if word else ''}a whole number from {least:,} to {most:,}", read, check)


Count = Annotated[int, _whole(1, 10**9)]
AutoOrCount = Annotated[Literal["auto"] | int, _whole(1, 10**9, "auto")]
CountFromZero = Annotated[int, _whole(0, 10**6)]
AutoOrCountFromZero = Annotated[Literal["auto"] | int, _whole(0, 10**6, "auto")]
AllOrCount = Annotated[Literal["all"] | int, _whole(1, 10**12, "all")]
Offset = Annotated[int, _whole(0, 10**12)]
Seed = Annotated[int | None, _whole(0, 2**32 - 1, "none")]
SeedNumber = Annotated[int, _whole(0, 2**32 - 1)]
ScoreSamples = Annotated[int, _whole(2, 10**6)]
Targets = Annotated[
    Literal["last", "completion", "all"] | Annotated[int, Field(ge=1, le=10**6)],
    Expected("last, completion, all, or a whole number of tokens to write", _number),
]
Temperature = Annotated[
    Annotated[float, Field(ge=0, le=1000)] | None,
    Expected("none, or a number from 0 (the likeliest tokens)", lambda value: _none_word(_number(value))),
]
PartOfNorm = Annotated[
    Annotated[float, Field(gt=0, lt=10)] | None,
    Expected("none, or a part of |J| such as 0.02", lambda value: _none_word(_number(value))),
]
_LINE, _QUOTES = "a text of one line", " (a number or date goes in quotes)"
Name = Annotated[str, Expected(_LINE + _QUOTES, check=_one_line)]
PathName = Annotated[str, Expected(_LINE, check=_path)]
OptionalName = Annotated[str | None, Expected(f"none or {_LINE}{_QUOTES}", _none_word, _one_line)]
OptionalPathName = Annotated[str | None, Expected(f"none or {_LINE}", _none_word, _path)]
OptionalPassage = Annotated[
    str | None,
    Expected(
        "none or a text (the word none as a text: '\"none\"', with quotation marks of its own)", _passage, _encodable
    ),
    PlainSerializer(_written_passage),
]
TrueOrFalse = Annotated[bool, Expected("true or false")]
AutoOrTruth = Annotated[Literal["auto"] | bool, Expected("auto, true or false")]
Layers = Annotated[
    int | str | tuple[int | str, ...],
    Expected(
        "a module's name, a layer's number (negative from the top), a list of different ones such as 3,5, or all",
        _layers,
    ),
]
Columns = Annotated[
    tuple[str, ...] | None, Expected("none, a column's name, or a list such as [id, language]", _columns)
]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|hpu|npu|mtia)(:[0-9]{1,4})?)$"),
    Expected("auto, cpu, cuda, cuda:1, mps or another torch device"),
]
DeviceMap = Annotated[
    str | dict[str, int | str] | None,
    Expected(
        "none, auto, balanced, balanced_low_0, sequential, or a mapping such as {model.embed_tokens: 0, ...}",
        _device_map,
    ),
]
MaxMemory = Annotated[
    dict[int | str, int | str] | None,
    Expected("none or a mapping such as {0: 20GiB, 1: 20GiB, cpu: 60GiB}", _max_memory),
]
Mapping = Annotated[dict[str, Any] | None, Expected("none or a mapping such as {name: value}", _mapping)]
Quantization = Annotated[Literal["4bit", "8bit"] | None, Expected("none, 4bit or 8bit", _none_word)]
RayWorkers = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=10**6)] | tuple[int, int],
    Expected("auto, a whole number from 1, or the least and the most such as [2, 64]", _worker_range),
]
AutoOrGpus = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0, le=1024)],
    Expected("auto, 0, a part of a GPU such as 0.5, or a whole number", _number, _gpus),
]
Share = Annotated[
    tuple[int, int] | None, Expected("i/n with i from 1 to n (3/8: the third of eight processes)", _share)
]
PlanRate = Annotated[
    Literal["measure"] | Annotated[float, Field(gt=0, le=1e12)] | None,
    Expected("measure, or how many tokens one worker computes in a second", _number),
]
