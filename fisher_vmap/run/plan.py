"""`fisher-vmap run --plan`: what a run will take, without loading the model's weights.

Prompts are counted and a sample of them is tokenised; operations and memory follow from the shapes of the model, bytes
from those of the results.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Literal, NamedTuple

import numpy as np
import torch

from fisher_vmap.data.batching import CPU_BATCH_TOKENS, GPU_MEMORY_SHARE, pack, rows_apart
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.prompts import PromptSource
from fisher_vmap.data.render import Renderer
from fisher_vmap.data.sequences import Tokens, tokens_of
from fisher_vmap.linearize.scores import targets_together
from fisher_vmap.load.model import Loaded, choose_device
from fisher_vmap.model.precision import Precision, faster_precision, product_rates, product_widths
from fisher_vmap.model.validation import most_positions
from fisher_vmap.model.widening import NARROW
from fisher_vmap.progress import bar, passing, readable, step
from fisher_vmap.results.means import check_means_only
from fisher_vmap.run.open import check_save, layout_of, make_renderer, model_of, open_model, prepare, source_of
from fisher_vmap.run.plan_folder import Sample, Sequences, Storage, finishing, storage_of, table_bytes
from fisher_vmap.run.plan_model import BatchMemory, Skeleton, batch_memory, skeleton_of, unavoidable, work_of
from fisher_vmap.run.settings import Settings

MOST_TOKENISED = 2048  # prompts of the sample
MEASURED_S, WORKERS = 10.0, (1, 8, 64)
COUNTED_PROMPTS = 256  # whose lengths the operations are counted for


def sample_of(settings: Settings, source: PromptSource, renderer: Renderer) -> Sample:
    """Tokenise up to `MOST_TOKENISED` prompts: every n-th of a local data set, the first ones of a stream."""
    if source.total is None:
        with step("reading the prompts"):
            chosen = list(islice(iter(source), MOST_TOKENISED + 1))
        total = len(chosen)
        if total > MOST_TOKENISED:
            with step("counting the prompts"):
                total = sum(1 for _ in source) if settings.num_prompts == "all" else settings.num_prompts
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
    return Sample(total, source.extent(total), shards, exact, source.total is None and not exact)


class Plan(NamedTuple):
    """The numbers of a plan; bytes, floating-point operations, tokens a second."""

    sample: Sample
    tokens: float
    tokens_error: float
    """Standard error of `tokens`; 0 where all prompts were tokenised."""
    operations: dict[str, float]
    storage: Storage
    weights: int
    batch: BatchMemory
    """The sample's batch with the most tokens."""
    longest: BatchMemory
    """One prompt of the most tokens that the settings and the model allow."""
    rate: float | None
    precision: Precision
    """What a run on a machine like this one computes in."""
    product_rate: float | None
    """Operations a second of this machine's matrix products in that precision, if measured."""


def plan(settings: Settings, rate: float | Literal["measure"] | None = None) -> list[str]:
    """The lines of a plan.

    Args:
        settings: of the run.
        rate: tokens a second of one worker, for the time; "measure": load the model and try; None: no time.

    Raises:
        UserError: settings do not fit the model or the data.
    """
    with step("reading the model's configuration"):
        skeleton = skeleton_of(settings)
    found = planned(settings, skeleton, rate)
    return list(described(settings, skeleton, found))


def planned(settings: Settings, skeleton: Skeleton, rate: float | Literal["measure"] | None = None) -> Plan:
    """The numbers of a plan; arguments and errors as `plan`."""
    check_save(settings)
    check_means_only(layout_of(settings, skeleton.widths))
    with step("opening the data set"):
        source = source_of(settings)
    renderer = make_renderer(settings, Loaded(skeleton.model, skeleton.tokenizer, {}), source, None)
    sample = sample_of(settings, source, renderer)
    sequences = Sequences.of(settings)
    lengths = np.array([sum(sequences.lengths(prompt)) for prompt in sample.prompts], np.float64)
    share = sample.total / max(1, sample.tokenised)
    counted = np.linspace(0, len(lengths) - 1, min(len(lengths), COUNTED_PROMPTS)).astype(int).tolist()
    with step("counting operations"):
        operations = operations_of(settings, skeleton, sequences, [sample.prompts[i] for i in counted])
    # Attention's operations grow with the square of the length; the counted prompts have the same mix of lengths.
    scale = float(lengths.sum() * share / max(1.0, lengths[counted].sum()))
    with step("measuring the table"):
        rows = table_bytes(sample, layout_of(settings, skeleton.widths), Pieces(skeleton.tokenizer), sequences)
    precision, product_rate = chosen_here(settings, skeleton)
    itemsize = 4 if precision.name == "float32" else getattr(torch, settings.dtype).itemsize
    error = 0.0 if sample.exact else float(lengths.std() * sample.total / max(1, len(lengths)) ** 0.5)
    return Plan(
        sample,
        float(lengths.sum() * share),
        error,
        {kind: count * scale for kind, count in operations.items()},
        storage_of(settings, skeleton, sample, rows),
        skeleton.weight_bytes * itemsize // getattr(torch, settings.dtype).itemsize,
        *batches_of(settings, skeleton, sample, itemsize),
        measured_rate(settings, sample) if rate == "measure" else rate,
        precision,
        product_rate,
    )


def operations_of(
    settings: Settings, skeleton: Skeleton, sequences: Sequences, prompts: Sequence[Tokens]
) -> Counter[str]:
    """The operations of some prompts, by kind; those of writing are a forward for every token, and its logits."""
    lengths = [length for prompt in prompts for length in sequences.lengths(prompt)]
    targets = [sequences.asked(prompt) for prompt in prompts for _ in range(sequences.samples)]
    work = work_of(settings)._replace(targets=targets)
    if settings.estimator == "topk" and targets:
        work = work._replace(shared=round(work.shared * sum(targets) / len(targets)))
    products = list(unavoidable(skeleton.model, list(skeleton.blocks.values()), lengths, skeleton.hooks, work))
    operations = Counter[str](dict.fromkeys(("forward", "writing"), 0) if sequences.written else {})
    for product in products:
        operations[product.kind.partition(",")[0]] += product.shape.flops
    if sequences.written:
        logits = next(product.shape.flops for product in products if product.kind.startswith("head"))
        operations["writing"] = operations["forward"] + logits
    return operations


def batches_of(
    settings: Settings, skeleton: Skeleton, sample: Sample, itemsize: int
) -> tuple[BatchMemory, BatchMemory]:
    """The memory of the sample's batch with the most tokens, and of one prompt of the most tokens that are allowed."""
    tokens = CPU_BATCH_TOKENS if settings.max_batch_tokens == "auto" else settings.max_batch_tokens
    size = sys.maxsize if settings.batch_size == "auto" else settings.batch_size
    limit, sequences = most_positions(skeleton.model), Sequences.of(settings)
    longest = settings.max_length if limit is None else min(limit - sequences.written, settings.max_length)
    chunk = None if settings.cotangent_chunk == "auto" else settings.cotangent_chunk
    device, V = choose_device(settings.device), int(skeleton.model.config.get_text_config().vocab_size)
    batches: list[list[Tokens]] = [[]]
    for shard in sample.shards:
        prompts = [Tokens(prompt.ids, prompt.start) for prompt in shard.rendered.values()]
        packed = pack([sum(sequences.lengths(prompt)) for prompt in prompts], size, tokens)
        batches += [[prompts[i] for i in batch] for batch in packed]

    def memory(prompts: Sequence[Tokens]) -> BatchMemory:
        lengths = [length for prompt in prompts for length in sequences.lengths(prompt)]
        targets = [sequences.asked(prompt) for prompt in prompts for _ in range(sequences.samples)]
        groups = rows_apart(targets, V, device)
        rows = max((sum(targets[b] for b in group) for group in groups), default=0)
        vectors = max(work_of(settings).shared, 1)
        if settings.estimator == "topk" and rows > len(lengths):
            vectors *= min(max(targets), targets_together(vectors, sum(lengths), max(skeleton.widths.values())))
        return batch_memory(skeleton, lengths, vectors, itemsize, device, chunk, rows)

    largest = max(batches, key=lambda batch: sum(sum(sequences.lengths(prompt)) for prompt in batch))
    found = memory(largest)
    return found._replace(prompts=len(largest)), memory([Tokens([0] * longest)])._replace(prompts=1)


def chosen_here(settings: Settings, skeleton: Skeleton) -> tuple[Precision, float | None]:
    """The precision of a run on this machine, and the rate of its matrix products if measured."""
    dtype, device = getattr(torch, settings.dtype), choose_device(settings.device)
    if device.type != "cpu" or settings.device_map is not None:
        return Precision(
            "model" if settings.precision == "auto" else settings.precision, "it is not measured here"
        ), None
    rates = product_rates(device, dtype, *product_widths(skeleton.model))
    if dtype not in NARROW or settings.precision != "auto":
        precision = Precision("model" if dtype not in NARROW else settings.precision, "it was asked for")
    elif skeleton.quantized and not settings.dequantize:
        precision = Precision("model", "its weights are quantised")
    else:
        precision = faster_precision(skeleton.model, device, dtype)
    used = rates.float32 if precision.name == "float32" else rates.narrow
    return precision, 2e9 / sum(1 / rate for rate in used)


def measured_rate(settings: Settings, sample: Sample) -> float:
    """Tokens a second of this machine on the run's own prompts, timed for ten seconds after the first batch.

    Raises:
        UserError: as a run's.
    """
    loaded = model_of(settings)
    with step("finding the layers"):
        fisher = open_model(settings, loaded)
    batches = []
    for shard in sample.shards:
        prompts = fisher.sequences([Tokens(prompt.ids, prompt.start) for prompt in shard.rendered.values()])
        packed = pack(list(map(tokens_of, prompts)), fisher.batch_size, fisher.max_batch_tokens)
        batches += [[prompts[i] for i in batch] for batch in packed]
    rank = settings.num_singular_values
    with step("computing a first batch"):
        fisher.numbers(batches[0], rank)
    tokens, began = 0, time.perf_counter()
    with step("measuring"):
        for batch in cycle(batches):
            fisher.numbers(batch, rank)
            tokens += sum(map(tokens_of, batch))
            if (seconds := time.perf_counter() - began) > MEASURED_S:
                return tokens / seconds
    raise AssertionError("no batch")


def described(settings: Settings, skeleton: Skeleton, found: Plan) -> Iterator[str]:
    """The lines that are printed."""
    sample, layers = found.sample, list(skeleton.widths)
    shards = -(-sample.total // settings.shard_size)
    part = f"{sample.total:,}" if sample.extent.is_whole else str(sample.extent)
    yield f"prompts     {part} in {shards:,} shards of {settings.shard_size}"
    shown = layers[0] if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
    widths = "/".join(f"{width:,}" for width in sorted(set(skeleton.widths.values())))
    yield f"matrices    {shown}, width {widths}, rank {settings.num_singular_values}, estimator {settings.estimator}"
    if sample.exact:
        how = "all prompts tokenised"
    else:
        which = "the first" if sample.first_alone else "every n-th,"
        how = f"{which} {sample.tokenised:,} prompts tokenised, standard error {found.tokens_error / found.tokens:.1%}"
    each = f"{found.tokens / max(1, sample.total):.1f} a prompt, the longest {max(sample.lengths, default=0):,}"
    yield f"tokens      {found.tokens:,.0f}, {each} ({how})"
    if (sequences := Sequences.of(settings)).written:
        count = sample.total * len(sample.lengths) / max(1, sample.tokenised) * sequences.samples
        what = f"{sequences.samples} completions" if sequences.samples > 1 else "a completion"
        yield f"            of these up to {count * sequences.written:,.0f} that the model writes: {what} of " + (
            f"{sequences.written} tokens to each prompt"
        )
    operations = ", ".join(f"{kind} {count:.2e}" for kind, count in found.operations.items())
    yield f"operations  {sum(found.operations.values()):.2e} floating-point, in matrix products ({operations})"
    parts = ", ".join(f"{name} {readable(size)}" for name, size in found.storage.parts.items() if size)
    yield f"storage     {readable(found.storage.total)} ({parts})"
    for change, storage in _otherwise(settings, skeleton, found):
        yield f"            {readable(storage.total):>8} with {change}"
    packed = skeleton.quantized and not settings.dequantize
    kept = f" ({skeleton.quantization or 'more than its packed weights take'})" if packed else ""
    which = f"the largest batch{'' if sample.exact else ' of those'} {readable(found.batch.total)}"
    size = f"{found.batch.prompts} prompts, {found.batch.tokens:,} tokens"
    yield f"memory      a worker: weights {readable(found.weights)}{kept}, {which} ({size})"
    allowed = f"a prompt of {found.longest.tokens:,} tokens, the most allowed, would take"
    yield f"            {allowed} {readable(found.longest.total)} (max_length, max_batch_tokens, cotangent_chunk)"
    yield f"            {finishing(settings, skeleton, sample.total)}"
    if settings.max_batch_tokens == "auto":
        yield f"            on a GPU batches grow to {GPU_MEMORY_SHARE:.0%} of what is free beside the weights"
    if getattr(torch, settings.dtype) in NARROW:
        yield f"precision   {found.precision.name}, because {found.precision.why}"
    if found.rate is None:
        yield "time        give --plan_rate TOKENS_A_SECOND, which a run tells at its end, or --plan_rate measure"
        if found.product_rate is not None:
            least = sum(found.operations.values()) / found.product_rate / 3600
            shown = f"{found.product_rate / 1e9:.0f} GFLOP/s"
            yield f"            at least {_duration(least)} on a machine like this one, whose products run at {shown}"
        return
    times = ", ".join(f"{_duration(found.tokens / found.rate / 3600 / count)} on {count}" for count in WORKERS)
    rate = sum(found.operations.values()) / found.tokens * found.rate
    yield f"time        at {found.rate:,.0f} tokens a second a worker ({rate:.2e} operations a second): {times}"


def _otherwise(settings: Settings, skeleton: Skeleton, found: Plan) -> Iterator[tuple[str, Storage]]:
    """Settings that would change the storage, and what it would be then."""
    table = found.storage.parts["tables"]

    def with_(**changes: object) -> Storage:
        changed, rows = settings.model_copy(update=changes), table
        if changed.save != settings.save:  # the table of means lacks attribution
            layout, pieces = layout_of(changed, skeleton.widths), Pieces(skeleton.tokenizer)
            rows = table_bytes(found.sample, layout, pieces, Sequences.of(changed))
        return storage_of(changed, skeleton, found.sample, rows)

    if settings.save != "mean":
        if settings.vectors_dtype == "float32":
            yield "vectors_dtype: float16", with_(vectors_dtype="float16")
        has = "npz" in found.storage.parts
        yield f"export_npz: {str(not has).lower()}", with_(export_npz=not has)
        yield "save: mean", with_(save="mean", export_npz=False)


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} s"
    if hours < 2:
        return f"{60 * hours:.3g} min"
    return f"{hours:.3g} h" if hours < 48 else f"{hours / 24:.3g} days"
