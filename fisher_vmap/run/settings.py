"""Every setting of a run: its type, its default, its meaning and its check.

The descriptions are the one source of the documentation: `--help` and the comments of config.yaml are made from them.
Where settings are read from (flags, then a YAML file, then these defaults; never the environment) is in
`settings_input.py`.

What is said on the command line of one process alone, and in no file: it changes nothing in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from fisher_vmap.run.cli_args import load, written
from fisher_vmap.run.setting_types import (
    AllOrCount,
    AutoOrCount,
    AutoOrCountFromZero,
    AutoOrGpus,
    AutoOrTruth,
    Columns,
    CountFromZero,
    Device,
    DeviceMap,
    Layers,
    MaxMemory,
    Name,
    Offset,
    OptionalName,
    OptionalPassage,
    OptionalPathName,
    PathName,
    PlanRate,
    PositiveCount,
    RayWorkers,
    Seed,
    Share,
    TrueOrFalse,
)


class RunOptions(BaseModel):
    """The flags of `fisher-vmap run` that are no settings; the fields' descriptions say what each means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shards: Share = Field(
        None,
        description="i/n: compute every n-th shard from the i-th on; n such processes fill one folder (a job array).",
    )
    quiet: TrueOrFalse = Field(
        False,
        description="No bar and no lines about what is under way; what was done and what went wrong is still told.",
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


class Settings(BaseSettings):
    """The settings of a run; keyword only, unchangeable once made, read from nowhere but its arguments.

    The fields' descriptions say what each means. Raises `pydantic.ValidationError` (a `ValueError`) for a wrong value
    or an unknown name; `load_settings` turns that into one line.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # The model
    model_path: PathName = _setting(
        "FabienRoger/backdoor_250913_1B",
        "The model: a hub id, a folder, a .gguf file, or a PEFT adapter.",
    )
    model_revision: OptionalName = _setting(None, "Branch, tag or commit of the model on the hub; none: its main one.")
    adapter_path: OptionalPathName = _setting(
        None, "PEFT adapter to put on model_path, a hub id or a folder; not needed where model_path is the adapter."
    )
    adapter_revision: OptionalName = _setting(None, "Branch, tag or commit of the adapter_path on the hub.")
    trust_remote_code: TrueOrFalse = _setting(
        False, "Run the Python code that a model brings along; only if you trust it."
    )
    dtype: Literal["bfloat16", "float32", "float16", "float64"] = _setting(
        "bfloat16",
        "Number format of the model's weights; precision says what they are computed in.",
    )
    dequantize: TrueOrFalse = _setting(
        False, "Unpack quantised weights to dtype when loading; needed for formats that round the inputs as well."
    )
    precision: Literal["auto", "model", "mixed", "float32"] = _setting(
        "auto",
        "Computed in float32 from the same weights: all (float32), the forward (mixed), none (model); auto: by speed.",
    )
    device: Device = _setting("auto", "Where the model runs: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.")
    device_map: DeviceMap = _setting(
        None, "Spread a model too large for one device, as from_pretrained does: auto, balanced, ..., or a mapping."
    )
    max_memory: MaxMemory = _setting(
        None, "The most that device_map may put on each device, such as {0: 20GiB, cpu: 60GiB}; none: what is free."
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
    num_prompts: AllOrCount = _setting(100, "How many prompts are read, or all.")
    offset: Offset = _setting(0, "How many rows are passed over first (after the shuffling, if there is one).")
    shuffle_seed: Seed = _setting(
        None, "Seed of a random order of the rows; none: as they come; hub data shuffle in a window of 10,000 rows."
    )
    prompt_column: Name = _setting(
        "auto", "Column with the prompt; auto: conversation, messages, prompt, instruction, question or text."
    )
    keep_columns: Columns = _setting(None, "Further columns copied into prompts.parquet, as a list.")
    conversation: Literal["first_turn", "full"] = _setting(
        "first_turn", "Of a conversation: its first user turn, or the full course up to its last user turn."
    )
    chat_template: AutoOrTruth = _setting(
        "auto", "Render prompts as chat; auto: where the tokenizer's template can, but never for a column named text."
    )
    system_prompt: OptionalPassage = _setting(None, "System turn put before every prompt, in place of one it may have.")
    prefill: OptionalPassage = _setting(None, "Start of the answer, put after the chat template's generation prompt.")
    max_length: PositiveCount = _setting(
        2048, "Most tokens of a prompt; a longer one loses the end of the user's text and is recorded as truncated."
    )

    # The matrix
    hook_layer_name: Layers = _setting(
        "model.layers.15",
        "Where the bias is added: a module's name, a layer's number (negative from the top), a list, or all.",
    )
    estimator: Literal["topk", "full"] = _setting(
        "topk",
        "topk: the matrix of the likeliest tokens; full: nearly the best of its rank for the whole vocabulary.",
    )
    top_k_tokens: PositiveCount = _setting(10, "How many of the likeliest next tokens the matrix sums over.")
    include_rest: TrueOrFalse = _setting(False, "topk: take any other token for one more outcome, with token id -1.")
    oversampling: CountFromZero = _setting(
        6, "full: vectors beyond num_singular_values; more of them come nearer to the best matrix of that rank."
    )
    passes: PositiveCount = _setting(1, "full: rounds up and down the layers; each comes nearer to the best matrix.")
    trace_samples: AutoOrCountFromZero = _setting(
        "auto", "Random vectors that what a matrix lacks is estimated with; auto: 4 for full, none for topk."
    )
    num_singular_values: PositiveCount = _setting(
        10, "How many singular values and vectors are kept; beyond the matrix's rank they are zero."
    )
    bias_positions: Literal["all", "last"] = _setting("all", "Add the bias at all positions, or at the last one only.")

    # The computation
    batch_size: AutoOrCount = _setting(
        8, "Most prompts computed at once; auto: as many of a shard as max_batch_tokens has room for."
    )
    max_batch_tokens: AutoOrCount = _setting("auto", "Most tokens computed at once, padding included; auto: by memory.")
    kernel: Literal["auto", "layerwise", "whole", "loop"] = _setting(
        "auto", "Form of the gradient computation; auto: the fastest that proves exact on this model."
    )
    audit: Literal["auto", "always", "off"] = _setting(
        "auto", "How often what is computed is compared with the untouched model: auto costs about a fiftieth."
    )
    cotangent_chunk: AutoOrCount = _setting(
        "auto", "How many tokens' gradients are pulled back at once; auto: by memory."
    )

    # The results
    output_dir: PathName = _setting("fisher_results", "Folder of the results; the same command again carries on in it.")
    overwrite: TrueOrFalse = _setting(False, "Start anew in a folder that holds other results, which are lost.")
    shard_size: PositiveCount = _setting(32, "Prompts in one file of results: what a run that is killed can lose.")
    vectors_dtype: Literal["float32", "float16"] = _setting(
        "float32", "Number format of the stored vectors; float16 takes half the disk."
    )
    store_text: TrueOrFalse = _setting(True, "Store each prompt's text in prompts.parquet.")
    export_npz: AutoOrTruth = _setting(
        "auto", "Also write fisher_matrices_compressed.npz; auto: for up to 10,000 prompts."
    )
    save: Literal["both", "prompts", "mean"] = _setting(
        "both", "Keep each prompt's matrix and their mean (both), the prompts' alone, or the mean alone."
    )
    strict: TrueOrFalse = _setting(False, "End with exit code 3 when a prompt failed.")

    # The machines
    engine: Literal["local", "ray"] = _setting(
        "local", "local: in this process; ray: on all GPUs of this machine or of a Ray cluster."
    )
    ray_address: OptionalName = _setting(
        None, "auto, or host:port of a Ray cluster that runs; none: Ray is started on this machine, for this run."
    )
    ray_workers: RayWorkers = _setting(
        "auto",
        "How many workers hold the model, or [least, most] as there is room; auto: as many as there is room for.",
    )
    ray_gpus_per_worker: AutoOrGpus = _setting(
        "auto",
        "GPUs of a worker: a part such as 0.5, or several with device_map; auto: 1 where there are GPUs, else 0.",
    )
    ray_cpus_per_worker: PositiveCount = _setting(1, "CPU cores of a worker.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leave out the environment, .env files and secrets: a run must not depend on what is not written down."""
        return (init_settings,)


class Command(NamedTuple):
    """A command line: the settings of the run, and what is for this process alone."""

    settings: Settings
    options: RunOptions


def default_config_yaml() -> str:
    """Render config.yaml: every setting with its default, under one comment line that says what it means.

    Returns:
        The whole text of the file.
    """
    entries = []
    for name, field in Settings.model_fields.items():
        entries.append(f"# {field.description}\n{name}: {written(field.default)}\n")
    heading = (
        "# Settings of fisher_vmap, with their defaults. A flag of the same name overrides each: --top_k_tokens 5\n\n"
    )
    return heading + "\n".join(entries)


def load_settings(argv: Sequence[str], *, working_directory: str | Path = ".") -> Settings:
    """Make the settings of a run from its command line and its YAML file; flags beat the file, the file the defaults.

    Args:
        argv: the command line's arguments, without the program's name.
        working_directory: where `config.yaml` is looked for when there is no `--config`, and what a relative
            `--config` is relative to.

    Returns:
        The checked settings.

    Raises:
        UserError: an unknown setting, a wrong value, or a file that cannot be read; one line.
        SystemExit: with code 0, after `--help` was printed.
    """
    return load_command(argv, working_directory=working_directory).settings


def load_command(argv: Sequence[str], *, working_directory: str | Path = ".") -> Command:
    """`load_settings`, with the flags that are no settings; arguments and errors as there."""
    return Command(*load(Settings, RunOptions, argv, Path(working_directory)))
