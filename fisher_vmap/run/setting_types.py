"""The types of settings: how a value from YAML or a command line is read, and what is said when it is wrong."""

from __future__ import annotations

import os.path
import re
from typing import Annotated, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
SIZE = r"[0-9]+(\.[0-9]+)? ?([KMGT]i?B)"


class Expected(NamedTuple):
    """What a setting's error message says was expected; a mark in the setting's type."""

    text: str


def _not_a_truth_value(value: object) -> object:
    if isinstance(value, bool):  # Python would take true for 1
        raise ValueError("a truth value is no number")
    return value


def _none_word(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else value


def _encodable(value: str | None) -> str | None:
    if value is not None:
        value.encode("utf-8")  # a lone surrogate could be neither tokenised nor written to a file
    return value


def _one_line(value: str | None) -> str | None:
    if value is None:
        return None
    value = value.strip()
    if not value or any(ord(character) < 32 for character in value):
        raise ValueError("empty, or holds a control character")
    return _encodable(value)


def _listed(value: object) -> object:
    """Split a list written as one text, as on the command line: "[a, b]" or "a,b"; anything else is left alone."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError("not a list") from error
    return [part.strip() for part in value.split(",")] if "," in value else value.strip()


def _layer_names(value: object) -> object:
    """Bring one layer or a list of layers into the form `int | str | tuple`; numbers written as text become numbers."""
    value = _listed(value)
    listed = value if isinstance(value, list | tuple) else [value]
    layers: list[int | str] = []
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError("neither a name nor a number")
        layer = int(item) if isinstance(item, str) and item.strip().removeprefix("-").isdecimal() else item
        if isinstance(layer, int) and not -1_000_000 <= layer <= 1_000_000:
            raise ValueError("no layer has this number")
        layers.append(layer if isinstance(layer, int) else str(_one_line(layer)))
    if not layers or len(set(layers)) < len(layers) or ("all" in layers and listed is value):
        raise ValueError("an empty list, a layer named twice, or 'all' in a list")
    return tuple(layers) if listed is value else layers[0]


def _column_names(value: object) -> object:
    value = _none_word(_listed(value))
    if value is None:
        return None
    columns = list(value) if isinstance(value, list | tuple) else [value]
    if not columns or not all(isinstance(column, str) and column for column in columns):
        raise ValueError("not a list of names")
    return tuple(dict.fromkeys(columns))


def _mapping(value: object) -> object:
    """Read a mapping written as one text, as on the command line: "{0: 20GiB}"; other text is left alone."""
    value = _none_word(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return yaml.safe_load(value)
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError("not a mapping") from error
    return value


def _device_map(value: object) -> object:
    value = _mapping(value)
    if isinstance(value, str):
        value = value.strip()
        if value not in DEVICE_MAPS:
            raise ValueError("not a device map")
        return value
    if value is None:
        return None
    places = value.values() if isinstance(value, dict) else ()
    if not places or not all(isinstance(name, str) for name in value):  # type: ignore[attr-defined]
        raise ValueError("not names of modules")
    if not all(_is_index(place) or (isinstance(place, str) and place) for place in places):
        raise ValueError("not devices")
    return value


def _max_memory(value: object) -> object:
    value = _mapping(value)
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError("not a mapping")
    for device, size in value.items():
        known = _is_index(device) or device == "cpu"
        if not known or not (_is_index(size) or (isinstance(size, str) and re.fullmatch(SIZE, size.strip()))):
            raise ValueError("not a device and a size")
    return value


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _worker_range(value: object) -> object:
    """A number of workers, or the least and the most of them."""
    value = _listed(value)
    if isinstance(value, list | tuple):
        numbers = [int(part) if isinstance(part, str) and part.strip().isdecimal() else part for part in value]
        if len(numbers) != 2 or not all(_is_index(number) and number for number in numbers) or numbers[0] > numbers[1]:
            raise ValueError("not the least and the most")
        return tuple(numbers)
    return _not_a_truth_value(value)


def _share_or_whole(value: float | str) -> float | str:
    if isinstance(value, float) and value > 1 and not value.is_integer():
        raise ValueError("more than one, and not whole")
    return value


def _share(value: object) -> object:
    """`i/n`, as the command line has it, as a pair of numbers."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", value) if isinstance(value, str) else None
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError("not a share")
    return int(match[1]), int(match[2])


_number = BeforeValidator(_not_a_truth_value)

PositiveCount = Annotated[int, _number, Field(ge=1, le=10**9), Expected("a whole number from 1 to 1,000,000,000")]
AutoOrCount = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=10**9)],
    _number,
    Expected("auto or a whole number from 1 to 1,000,000,000"),
]
CountFromZero = Annotated[int, _number, Field(ge=0, le=10**6), Expected("a whole number from 0 to 1,000,000")]
AutoOrCountFromZero = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=0, le=10**6)],
    _number,
    Expected("auto or a whole number from 0 to 1,000,000"),
]
AllOrCount = Annotated[
    Literal["all"] | Annotated[int, Field(ge=1, le=10**12)],
    _number,
    Expected("all or a whole number from 1 to 1,000,000,000,000"),
]
Offset = Annotated[int, _number, Field(ge=0, le=10**12), Expected("a whole number from 0 to 1,000,000,000,000")]
Seed = Annotated[
    Annotated[int, Field(ge=0, le=2**32 - 1)] | None,
    _number,
    BeforeValidator(_none_word),
    Expected(f"none or a whole number from 0 to {2**32 - 1:,}"),
]
Name = Annotated[str, AfterValidator(_one_line), Expected("a text of one line (a number or date goes in quotes)")]
PathName = Annotated[str, AfterValidator(_one_line), AfterValidator(os.path.expanduser), Expected("a text of one line")]
OptionalName = Annotated[
    str | None,
    BeforeValidator(_none_word),
    AfterValidator(_one_line),
    Expected("none or a text of one line (a number or date goes in quotes)"),
]
OptionalPathName = Annotated[
    str | None,
    BeforeValidator(_none_word),
    AfterValidator(_one_line),
    AfterValidator(lambda value: None if value is None else os.path.expanduser(value)),
    Expected("none or a text of one line"),
]
OptionalPassage = Annotated[
    str | None, BeforeValidator(_none_word), AfterValidator(_encodable), Expected("none or a text")
]
TrueOrFalse = Annotated[bool, Expected("true or false")]
AutoOrTruth = Annotated[Literal["auto"] | bool, Expected("auto, true or false")]
Layers = Annotated[
    int | str | tuple[int | str, ...],
    BeforeValidator(_layer_names),
    Expected("a module's name, a layer's number (negative from the top), a list of different ones such as 3,5, or all"),
]
Columns = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(_column_names),
    Expected("none, a column's name, or a list such as [id, language]"),
]
Device = Annotated[
    str,
    Field(pattern=r"^(auto|cpu|mps|(cuda|xpu|hpu|npu|mtia)(:[0-9]{1,4})?)$"),
    Expected("auto, cpu, cuda, cuda:1, mps or another torch device"),
]
DeviceMap = Annotated[
    str | dict[str, int | str] | None,
    BeforeValidator(_device_map),
    Expected("none, auto, balanced, balanced_low_0, sequential, or a mapping such as {model.embed_tokens: 0, ...}"),
]
MaxMemory = Annotated[
    dict[int | str, int | str] | None,
    BeforeValidator(_max_memory),
    Expected("none or a mapping such as {0: 20GiB, 1: 20GiB, cpu: 60GiB}"),
]
RayWorkers = Annotated[
    Literal["auto"] | Annotated[int, Field(ge=1, le=10**6)] | tuple[int, int],
    BeforeValidator(_worker_range),
    Expected("auto, a whole number from 1, or the least and the most such as [2, 64]"),
]
AutoOrGpus = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0, le=1024)],
    _number,
    AfterValidator(_share_or_whole),
    Expected("auto, 0, a part of a GPU such as 0.5, or a whole number"),
]
Share = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_share),
    Expected("i/n with i from 1 to n (3/8: the third of eight processes)"),
]
PlanRate = Annotated[
    Literal["measure"] | Annotated[float, Field(gt=0, le=1e12)] | None,
    _number,
    Expected("measure, or how many tokens one worker computes in a second"),
]
