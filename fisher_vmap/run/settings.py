"""The settings of a run: the type, default, meaning and check of each.

`--help` and the comments of config.yaml are made from the descriptions. `cli_args.py` reads the values.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
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
_LINE, _QUOTES = "a text of one line", " (a number or date goes in quotes)"
Name = Annotated[str, Expected(_LINE + _QUOTES, check=_one_line)]
PathName = Annotated[str, Expected(_LINE, check=_path)]
OptionalName = Annotated[str | None, Expected(f"none or {_LINE}{_QUOTES}", _none_word, _one_line)]
OptionalPathName = Annotated[str | None, Expected(f"none or {_LINE}", _none_word, _path)]
OptionalPassage = Annotated[str | None, Expected("none or a text", _none_word, _encodable)]
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


class RunOptions(BaseModel):
    """The flags of `fisher-vmap run` that apply to one process and are not settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Share = Field(
        None,
        description="i/n: compute every n-th shard from the i-th on; n such processes fill one folder (a job array).",
    )
    quiet: TrueOrFalse = Field(
        False,
        description="No progress bar and no progress lines; results and warnings are still printed.",
    )
    plan: TrueOrFalse = Field(
        False,
        description="Compute nothing: print prompts, tokens, operations, storage and memory, without loading the "
        "weights.",
    )
    plan_rate: PlanRate = Field(
        None,
        description="With --plan, for its time: tokens a second of one worker; measure: load the model and try ten "
        "seconds.",
    )


def _setting(default: Any, description: str) -> Any:
    return Field(default=default, description=description)


class Settings(BaseModel):
    """The settings of a run: keyword only and immutable.

    Raises `pydantic.ValidationError` (a `ValueError`) for a wrong value or an unknown name; `load_settings` turns that
    into one line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # The model
    model_path: PathName = _setting(
        "FabienRoger/backdoor_250913_1B",
        "The model: a hub id, a folder, a .gguf file, or a PEFT adapter.",
    )
    model_revision: OptionalName = _setting(None, "Branch, tag or commit of the model on the hub; none: its main one.")
    adapter_path: OptionalPathName = _setting(None, "PEFT adapter to merge into model_path: a hub id or a folder.")
    adapter_revision: OptionalName = _setting(None, "Branch, tag or commit of the adapter_path on the hub.")
    trust_remote_code: TrueOrFalse = _setting(False, "Run Python code that comes with the model; only if you trust it.")
    dtype: Literal["bfloat16", "float32", "float16", "float64"] = _setting(
        "bfloat16", "Number format of the model's weights; precision says what they are computed in."
    )
    dequantize: TrueOrFalse = _setting(
        False, "Unpack quantised weights to dtype when loading; needed for formats that also round the inputs."
    )
    precision: Literal["auto", "model", "mixed", "float32"] = _setting(
        "auto", "What is computed in float32: all (float32), the forward (mixed), nothing (model); auto: by speed."
    )
    device: Device = _setting("auto", "Where the model runs: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")
    device_map: DeviceMap = _setting(
        None, "Spread a model over several devices, as from_pretrained does: auto, balanced, ..., or a mapping."
    )
    max_memory: MaxMemory = _setting(
        None, "Most memory that device_map may use of each device, such as {0: 20GiB, cpu: 60GiB}; none: all."
    )

    # The prompts
    dataset_name: PathName = _setting(
        "lmsys/lmsys-chat-1m", "The prompts: a hub id, a folder, or a .jsonl, .json, .csv, .parquet or .txt file."
    )
    dataset_config: OptionalName = _setting(None, "Configuration (subset) of the data set; none: its default one.")
    dataset_split: Name = _setting("train", "Split of the data set.")
    dataset_revision: OptionalName = _setting(
        None, "Branch, tag or commit of the data set on the hub; none: its main one."
    )
    num_prompts: AllOrCount = _setting(100, "How many prompts to read, or all.")
    offset: Offset = _setting(0, "How many rows to skip first (after shuffling).")
    shuffle_seed: Seed = _setting(
        None, "Seed of a random order of the rows; none: in order; hub data are shuffled in a window of 10,000 rows."
    )
    prompt_column: Name = _setting(
        "auto", "Column with the prompt; auto: conversation, messages, prompt, instruction, question or text."
    )
    keep_columns: Columns = _setting(None, "Further columns copied into prompts.parquet, as a list.")
    conversation: Literal["first_turn", "full"] = _setting(
        "first_turn", "What to take of a conversation: its first user turn, or all turns up to its last user turn."
    )
    chat_template: AutoOrTruth = _setting(
        "auto", "Render prompts as chat; auto: if the tokenizer's template can, but never for a column named text."
    )
    system_prompt: OptionalPassage = _setting(None, "System turn of every prompt; it replaces the prompt's own.")
    prefill: OptionalPassage = _setting(None, "Start of the answer, put after the chat template's generation prompt.")
    max_length: Count = _setting(
        2048, "Most tokens of a prompt; of a longer one the end of the user's text is cut off, and truncated is true."
    )

    # The matrix
    hook_layer_name: Layers = _setting(
        "model.layers.15",
        "Where the bias is added: a module's name, a layer's number (negative from the top), a list, or all.",
    )
    estimator: Literal["topk", "full"] = _setting(
        "topk", "topk: the matrix of the likeliest tokens; full: nearly the best of its rank for the whole vocabulary."
    )
    top_k_tokens: Count = _setting(10, "How many of the likeliest next tokens the matrix sums over.")
    include_rest: TrueOrFalse = _setting(False, "topk: count all other tokens as one more outcome, with token id -1.")
    oversampling: CountFromZero = _setting(
        6, "full: extra vectors beyond num_singular_values; more of them give a better matrix."
    )
    passes: Count = _setting(1, "full: rounds up and down the layers; each gives a better matrix.")
    trace_samples: AutoOrCountFromZero = _setting(
        "auto", "Random vectors that estimate what a matrix leaves out; auto: 4 for full, none for topk."
    )
    num_singular_values: Count = _setting(
        10, "How many singular values and vectors to keep; beyond the matrix's rank they are zero."
    )
    bias_positions: Literal["all", "last"] = _setting("all", "Add the bias at all positions, or at the last one only.")

    # The computation
    batch_size: AutoOrCount = _setting(
        8, "Most prompts computed at once; auto: as many of a shard as max_batch_tokens allows."
    )
    max_batch_tokens: AutoOrCount = _setting("auto", "Most tokens computed at once, padding included; auto: by memory.")
    kernel: Literal["auto", "layerwise", "whole", "loop"] = _setting(
        "auto", "Form of the gradient computation; auto: the fastest that proves exact on this model."
    )
    audit: Literal["auto", "always", "off"] = _setting(
        "auto", "How often results are checked against the unmodified model; auto adds about 2% to the time."
    )
    cotangent_chunk: AutoOrCount = _setting(
        "auto", "How many tokens' gradients are pulled back at once; auto: by memory."
    )

    # The results
    output_dir: PathName = _setting("fisher_results", "Folder of the results; the same command again continues in it.")
    overwrite: TrueOrFalse = _setting(False, "Delete the results that the folder holds, and start again.")
    shard_size: Count = _setting(
        32, "Prompts in one file of results; a run that is killed loses at most the unfinished files."
    )
    vectors_dtype: Literal["float32", "float16"] = _setting(
        "float32", "Number format of the stored vectors; float16 takes half the disk."
    )
    store_text: TrueOrFalse = _setting(True, "Store each prompt's text in prompts.parquet.")
    export_npz: AutoOrTruth = _setting("auto", "Also write fisher_matrices_compressed.npz; auto: up to 10,000 prompts.")
    save: Literal["both", "prompts", "mean"] = _setting(
        "both", "Keep each prompt's matrix and their mean (both), the prompts' alone, or the mean alone."
    )
    strict: TrueOrFalse = _setting(False, "End with exit code 3 when a prompt failed.")

    # The machines
    engine: Literal["local", "ray"] = _setting(
        "local", "local: in this process; ray: on all GPUs of this machine or of a Ray cluster."
    )
    ray_address: OptionalName = _setting(
        None, "auto, or host:port of a running Ray cluster; none: start Ray on this machine for this run."
    )
    ray_workers: RayWorkers = _setting(
        "auto", "How many workers hold the model, or [least, most]; auto: as many as there is room for."
    )
    ray_gpus_per_worker: AutoOrGpus = _setting(
        "auto", "GPUs of a worker: a part such as 0.5, or several with device_map; auto: 1 if there are GPUs, else 0."
    )
    ray_cpus_per_worker: Count = _setting(1, "CPU cores of a worker.")
