"""The settings of a run: the type, default, meaning and check of each.

`--help` and the comments of config.yaml are made from the descriptions. `cli_args.py` reads the values.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer

from fisher_vmap.run.setting_types import (
    AllOrCount,
    AutoOrCount,
    AutoOrCountFromZero,
    AutoOrGpus,
    AutoOrTruth,
    Columns,
    Count,
    CountFromZero,
    Device,
    DeviceMap,
    Layers,
    Mapping,
    MaxMemory,
    Name,
    Offset,
    OptionalName,
    OptionalPassage,
    OptionalPathName,
    PathName,
    PlanRate,
    Quantization,
    RayWorkers,
    ScoreSamples,
    Seed,
    SeedNumber,
    Share,
    Targets,
    Temperature,
    TrueOrFalse,
)

NOT_STORED = ("token", "cache_dir", "offload_folder")  # of model_kwargs


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
    attn_implementation: OptionalName = _setting(
        None, "How transformers computes attention (sdpa, eager, ...), which audits compare with; none: its default."
    )
    quantization: Quantization = _setting(
        None, "Quantise the weights when loading, by bitsandbytes: 4bit or 8bit; none: leave them as they are."
    )
    model_kwargs: Mapping = _setting(
        None, "Further arguments of from_pretrained, as a mapping such as {rope_theta: 500000.0}."
    )

    @field_serializer("model_kwargs")
    def _without_secrets(self, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """What a folder may keep: no password of the user and no path of this machine."""
        return {name: value for name, value in (given or {}).items() if name not in NOT_STORED} or None

    # The prompts
    dataset_name: PathName = _setting(
        "lmsys/lmsys-chat-1m",
        "The prompts: a hub id, a folder, or a file: .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt (or .gz, .zst).",
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
        "auto", "Column with the prompt; auto: by the columns, as Alpaca, ShareGPT, messages, prompt, question or text."
    )
    prompt_template: OptionalPassage = _setting(
        None, r'A prompt out of several columns, such as "{instruction}\n\n{input}"; none: by the form of the data.'
    )
    completion_column: OptionalName = _setting(
        None, "Column with the completion; none: the assistant turn after the prompt, or a column that is known for it."
    )
    keep_columns: Columns = _setting(None, "Further columns copied into prompts.parquet, as a list.")
    conversation: Literal["first_turn", "full"] = _setting(
        "first_turn", "What to take of a conversation: its first user turn, or all turns up to its last user turn."
    )
    chat_template: AutoOrTruth = _setting(
        "auto", "Render prompts as chat; auto: if the tokenizer's template can, but never for a column named text."
    )
    chat_template_file: OptionalPathName = _setting(None, "File with a chat template, in place of the tokenizer's own.")
    chat_template_kwargs: Mapping = _setting(
        None, "Variables of the chat template, as a mapping such as {enable_thinking: false}."
    )
    system_turns: Literal["keep", "merge", "drop"] = _setting(
        "keep", "System turns: keep them, merge them into the first user turn, or drop them."
    )
    special_tokens_in_text: Literal["parse", "literal"] = _setting(
        "parse", "Names of special tokens in a prompt's text: parse them as those tokens, or take them literally."
    )
    system_prompt: OptionalPassage = _setting(None, "System turn of every prompt; it replaces the prompt's own.")
    prefill: OptionalPassage = _setting(
        None, "Start of the answer, put after the chat template's generation prompt; white space counts."
    )
    max_length: Count = _setting(
        2048, "Most tokens of a prompt; of a longer one the end of the user's text is cut off, and truncated is true."
    )

    # The matrix
    hook_layer_name: Layers = _setting(
        "model.layers.15",
        "Where the bias is added: a module's name, a layer's number (negative from the top), a list, or all.",
    )
    targets: Targets = _setting(
        "last",
        "Whose next-token distribution is read: last, completion (positions that predict it), all, or N to write.",
    )
    samples: Count = _setting(
        1, "With N tokens to write: how many completions of each prompt; the matrix is their mean."
    )
    temperature: Temperature = _setting(
        None, "Of the completions that are written; none: the likeliest tokens for one, 1 for several."
    )
    completion_seed: SeedNumber = _setting(0, "Seed of the completions that are drawn.")
    estimator: Literal["topk", "full", "sampled"] = _setting(
        "topk",
        "topk: the matrix of the likeliest tokens; full: nearly the best of the whole vocabulary; sampled: unbiased.",
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
    score_samples: ScoreSamples = _setting(64, "sampled: how many scores are drawn.")
    num_singular_values: Count = _setting(
        10, "How many singular values and vectors to keep; beyond the matrix's rank they are zero."
    )
    bias_positions: Literal["all", "last", "prompt", "completion"] = _setting(
        "all", "Where the bias is added: all positions, the last one, those of the prompt, or of the completion."
    )

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
