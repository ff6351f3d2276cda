"""What a batch takes in a worker's memory beside the weights, by the shapes of what its computation holds at once.

The peak is in the pullback through one block: what the forward has recorded stands by, all cotangents are there, and a
chunk of them passes through the block's layers.

What the prompts of a run are like, from some of them: their tokens, and the rows that the table has of them.

A model without its weights, for counting: its configuration and tokenizer are read, nothing else.
"""

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from torch import nn

from fisher_vmap.data.batching import CPU_BATCH_TOKENS, pack
from fisher_vmap.data.prompts import PromptSource, SourcePrompt
from fisher_vmap.data.tokenize import Pieces, Renderer
from fisher_vmap.errors import UserError
from fisher_vmap.kernels.decoder_block import KEPT_BYTES, WORTH_KEEPING
from fisher_vmap.linearize.block import cotangents_at_a_time
from fisher_vmap.load.adapters import base_of, find_adapter
from fisher_vmap.load.model import choose_device
from fisher_vmap.load.source import explained, quiet_progress
from fisher_vmap.model.head import MIN_ROWS, VOCABULARY_CHUNK_ELEMENTS
from fisher_vmap.model.recording import hooks, output_of
from fisher_vmap.model.validation import most_positions
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.results.index import ShardLayout
from fisher_vmap.results.record import LayerResult, PromptResult
from fisher_vmap.results.table import common_schema, in_schema, rows_table
from fisher_vmap.run.compute import PreparedShard, prepare
from fisher_vmap.run.settings import Settings

MOST_TOKENISED = 2048  # prompts; of more, so many are taken, evenly

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Some of a run's prompts, or all.

    Attributes:
        total: prompts of the run.
        shards: the prompts that were tokenised, in shards of the run's size.
        exact: whether these are all of them.
        first_alone: whether they are the first ones, and not spread over the data.
    """

    total: int
    shards: list[PreparedShard]
    exact: bool
    first_alone: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt that has any."""
        return [len(prompt.ids) for shard in self.shards for prompt in shard.rendered.values()]

    @property
    def tokenised(self) -> int:
        """How many prompts were looked at."""
        return sum(len(shard.prompts) for shard in self.shards)


def sample_of(settings: Settings, source: PromptSource, renderer: Renderer) -> Sample:
    """Read the prompts and tokenise as many as are needed: all of a few thousand; of more, every n-th.

    Of a data set of the hub, which is a stream, the first ones.
    """
    if source.total is None:
        stream: Iterator[SourcePrompt] = islice(iter(source), MOST_TOKENISED + 1)
        with step("reading the prompts"):
            chosen = list(stream)
        more = len(chosen) > MOST_TOKENISED
        if settings.num_prompts == "all" and more:
            with step("counting the prompts"):
                total = sum(1 for _ in source)
        else:
            total = int(settings.num_prompts) if more and settings.num_prompts != "all" else len(chosen)
        chosen = chosen[:MOST_TOKENISED]
    else:
        total = source.total
        wanted = set(np.linspace(0, total - 1, min(total, MOST_TOKENISED)).astype(int).tolist())
        with step("reading the prompts"):
            chosen = [prompt for prompt in source if prompt.index in wanted]
    size = settings.shard_size
    parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    with bar(len(parts), "shards", "tokenising a sample") as advance:
        shards = [prepare(renderer, number, part) for number, part in enumerate(passing(parts, advance))]
    exact = len(chosen) == total
    return Sample(total, shards, exact, source.total is None and not exact)


class TableBytes(NamedTuple):
    """Bytes of the prompts table: as the shards have it, and joined."""

    in_shards: int
    joined: int


def table_bytes(sample: Sample, layout: ShardLayout, pieces: Pieces) -> TableBytes:
    """Bytes of all of a run's rows, from those of the sample with numbers drawn at random in them."""
    rng = np.random.default_rng(0)
    tables: list[pa.Table] = []
    in_shards = 0
    for shard in sample.shards:
        results = [_made_up(shard, prompt, layout, pieces, rng) for prompt in shard.prompts]
        numbers = rng.integers(2**32, size=len(results)).tolist()
        checksums = dict.fromkeys(("crc32", *(f"{layer}/crc32" for layer in layout.layers)), numbers)
        tables.append(rows_table(results, layout, checksums))
        in_shards += _written(tables[-1])
    schema = common_schema((table.schema for table in tables), layout)
    joined = _written(pa.concat_tables([in_schema(table, schema) for table in tables]))
    scale = sample.total / max(1, sample.tokenised)
    return TableBytes(int(in_shards * scale), int(joined * scale))


def _written(table: pa.Table) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.tell()


def _made_up(
    shard: PreparedShard, prompt: SourcePrompt, layout: ShardLayout, pieces: Pieces, rng: np.random.Generator
) -> PromptResult:
    rendered = shard.rendered.get(prompt.index)
    if rendered is None:
        reason = shard.skipped[prompt.index]
        return PromptResult(
            index=prompt.index, source_row=prompt.source_row, kept=prompt.kept, status="skipped", reason=reason
        )
    K, R = layout.outcomes, layout.rank
    token_ids = rng.choice(rendered.ids, K)
    empty = np.zeros((0,), np.float32)
    # The table holds numbers made of these, all of them different: that is what counts for its size.
    layers = {
        layer: LayerResult(rng.random(R), empty, empty, float(rng.random()), empty, float(rng.random()))
        for layer in layout.layers
    }
    return PromptResult(
        index=prompt.index,
        source_row=prompt.source_row,
        text=rendered.text,
        kept=prompt.kept,
        num_tokens=len(rendered.ids),
        truncated=rendered.truncated,
        token_ids=token_ids,
        log_probs=np.log(rng.dirichlet(np.ones(K))).astype(np.float32),
        layers=layers,
        top_tokens=[pieces.single(int(token)) for token in token_ids],
        prompt_tokens=pieces.each(rendered.ids),
    )


class Skeleton(NamedTuple):
    """A causal LM on the meta device.

    Attributes:
        model: it.
        tokenizer: its tokenizer.
        blocks: its decoder blocks by name.
        widths: D of each hooked layer.
        hooks: for each hooked layer, the number of the block that it is or is in; -1: below all blocks.
        quantized: whether its weights are stored packed.
    """

    model: Any
    tokenizer: Any
    blocks: dict[str, nn.Module]
    widths: dict[str, int]
    hooks: list[int]
    quantized: bool

    @property
    def weight_bytes(self) -> int:
        """What the weights take in the dtype of the run."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())


def skeleton_of(settings: Settings) -> Skeleton:
    """The model that the settings name, without its weights.

    Raises:
        UserError: the model is missing or gated, or has no such layer.
    """
    path, options = settings.model_path, {"trust_remote_code": settings.trust_remote_code}
    revision = settings.model_revision
    if settings.adapter_path is None:
        with quiet_progress():
            adapter = explained(path, "adapter", find_adapter, path, revision=revision)
        if adapter is not None:
            path, revision = base_of(adapter)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path, "revision": revision}
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    with quiet_progress():
        config = explained(path, "config", transformers.AutoConfig.from_pretrained, **where, **options)
        tokenizer = explained(path, "tokenizer", transformers.AutoTokenizer.from_pretrained, **where, **options)
        packed = getattr(config, "quantization_config", None) is not None
        if packed:
            del config.quantization_config
        model = explained(path, "model", _on_meta, config, getattr(torch, settings.dtype), options)
    stack, blocks = _blocks(path, model)
    names = _layers(model, stack, blocks, settings.hook_layer_name)
    numbers = {name: i for i, name in enumerate(blocks)}
    inside = [next((i for block, i in numbers.items() if f"{name}.".startswith(f"{block}.")), -1) for name in names]
    return Skeleton(model, tokenizer, blocks, _widths(model, names), inside, packed)


def _on_meta(config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model.to("meta").eval()


def _blocks(path: str, model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The largest list of modules that is not inside an entry of another: the model itself cannot be watched here."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UserError(f"{path}: no list of decoder blocks was found, and --plan cannot count; run without --plan")
    stack = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
    return stack, {f"{stack}.{i}": block for i, block in enumerate(outer[stack])}


def _layers(
    model: nn.Module, stack: str, blocks: dict[str, nn.Module], wanted: int | str | Sequence[int | str]
) -> list[str]:
    """Names of modules, as `fisher_vmap.anatomy.layers.resolve_layers` gives them."""
    if wanted == "all":
        return list(blocks)
    modules, names = dict(model.named_modules()), list(blocks)
    found = []
    for entry in [wanted] if isinstance(wanted, int | str) else wanted:
        if isinstance(entry, int) and -len(names) <= entry < len(names):
            entry = names[entry]
        if entry not in modules or entry == "":
            raise UserError(f"the model has no layer {entry!r}; its {len(names)} layers are {names[0]} to {names[-1]}")
        found.append(str(entry))
    return found


def _widths(model: Any, names: Sequence[str]) -> dict[str, int]:
    """D of each hooked module, by its shapes alone; the model's own width where it cannot be run without weights."""
    width = int(model.config.get_text_config().hidden_size)
    widths = dict.fromkeys(names, width)

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output_of(output)
            if hidden is not None and hidden.dim() == 3:
                widths[name] = int(hidden.shape[-1])

        return hook

    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with torch.no_grad(), hooks(*(model.get_submodule(name).register_forward_hook(look(name)) for name in names)):
        try:
            model(input_ids=ids, use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return dict.fromkeys(names, width)  # it asks for numbers on its way
    return widths


class BatchMemory(NamedTuple):
    """Bytes of one batch.

    Attributes:
        prompts: how many.
        tokens: of all of them, without padding.
        parts: bytes by what they are for.
    """

    prompts: int
    tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def largest_batch(sample: Sample, batch_size: int, max_batch_tokens: int) -> list[int]:
    """The lengths of the prompts of the batch with the most tokens, among those of the sample."""
    batches: list[list[int]] = [[]]
    for shard in sample.shards:
        lengths = [len(prompt.ids) for prompt in shard.rendered.values()]
        batches += [[lengths[i] for i in batch] for batch in pack(lengths, batch_size, max_batch_tokens)]
    return max(batches, key=sum)


def batches_of(
    settings: Settings, skeleton: Skeleton, sample: Sample, vectors: int, itemsize: int
) -> tuple[BatchMemory, BatchMemory]:
    """What the largest batch of a sample takes, and what a prompt of the most tokens that are allowed would.

    Args:
        settings: of the run.
        skeleton: of its model.
        sample: of its prompts.
        vectors: that are pulled down together.
        itemsize: bytes of a number of the pullback.
    """
    tokens = CPU_BATCH_TOKENS if settings.max_batch_tokens == "auto" else settings.max_batch_tokens
    size = sys.maxsize if settings.batch_size == "auto" else settings.batch_size
    limit = most_positions(skeleton.model)
    longest = settings.max_length if limit is None else min(limit, settings.max_length)
    chunk = None if settings.cotangent_chunk == "auto" else settings.cotangent_chunk
    device = choose_device(settings.device)
    batches = largest_batch(sample, size, tokens), [longest]
    largest, allowed = (batch_memory(skeleton, batch, vectors, itemsize, device, chunk) for batch in batches)
    return largest, allowed


def batch_memory(
    skeleton: Skeleton,
    lengths: Sequence[int],
    cotangents: int,
    itemsize: int,
    device: torch.device,
    chunk_size: int | None = None,
) -> BatchMemory:
    """What a batch of prompts takes.

    Args:
        skeleton: of the model.
        lengths: tokens of each prompt.
        cotangents: K, the vectors that are pulled down together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on.
        chunk_size: how many vectors pass through a block at a time; None: as many as a run takes.
    """
    B, N, K = len(lengths), sum(lengths), cotangents
    D = int(skeleton.model.config.get_text_config().hidden_size)
    block = next(iter(skeleton.blocks.values()))
    width = sum(m.out_features for m in block.modules() if isinstance(m, torch.nn.Linear))
    above = len(skeleton.blocks) - 1 - min(skeleton.hooks)
    chunk = min(K, chunk_size or cotangents_at_a_time(K, N, device) or K)
    numbers = {
        "recorded": N * D * (above + 2),  # each block's input, and what came in and went out
        "kept": _kept(N * (width - D), above - 1, itemsize, device),
        "cotangents": 3 * N * K * D,  # all of them, a block's below, and their squares
        "chunk": 2 * chunk * N * width,  # the outputs of a block's layers and their gradients
        "block": 2 * N * width,  # its forward, again
    }
    parts = {name: count * itemsize for name, count in numbers.items()}
    unembedding = skeleton.model.get_output_embeddings()
    V = int(skeleton.model.config.get_text_config().vocab_size)
    upcast = VOCABULARY_CHUNK_ELEMENTS.get(device.type, 2**22) if itemsize < 4 and unembedding is not None else 0
    parts["head"] = 4 * (min(upcast, V * D) + 3 * max(B, MIN_ROWS) * V)  # logits, and the rest's, in float32
    return BatchMemory(B, N, parts)


def _kept(each: int, calls: int, itemsize: int, device: torch.device) -> int:
    """How many numbers of the forwards of so many blocks are kept for the pullback, of `each` of them."""
    room = KEPT_BYTES.get(device.type, 0) // itemsize
    if calls < 1 or each * calls > WORTH_KEEPING * room:
        return 0
    return each * min(calls, room // max(each, 1))
