"""Prompts -> batches -> kernel -> compression -> shard. One shard at a time; what is stored is not computed again."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch

from fisher_vmap.batches import batch_tokens_for, pack
from fisher_vmap.config import Settings
from fisher_vmap.conversations import SkippedPrompt
from fisher_vmap.errors import UserError
from fisher_vmap.fisher_model import FisherModel, PromptNumbers
from fisher_vmap.models import Loaded
from fisher_vmap.sources import PromptSource, SourcePrompt
from fisher_vmap.storage.records import PromptResult, ShardLayout
from fisher_vmap.storage.writer import ResultsWriter
from fisher_vmap.tokens import Renderer, TokenizedPrompt

log = logging.getLogger(__name__)

NPZ_PROMPTS = 10_000  # up to here `export_npz: auto` writes the npz
# Settings that do not change a prompt's results: where and how many, but not what.
NOT_IN_FINGERPRINT = {
    *("model_path", "model_revision", "trust_remote_code", "device", "dataset_name", "dataset_revision"),
    *("num_prompts", "hook_layer_name", "output_dir", "overwrite", "export_npz", "strict", "shard_size"),
    *("vectors_dtype", "store_text", "keep_columns"),  # in the layout, which is compared as well
}


@dataclass
class Summary:
    """What a run did: prompts by status, tokens and seconds of what was computed, and how many were there already."""

    prompts: int = 0
    stored_before: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    skipped: int = 0


class Progress(NamedTuple):
    """A step forward: prompts finished and the tokens computed for them (0 where they were stored before)."""

    prompts: int
    tokens: int


def run_prompts(
    settings: Settings, loaded: Loaded, source: PromptSource, report: Callable[[Progress], None]
) -> Summary:
    """Compute what the results folder lacks, and finish it.

    Args:
        settings: of the run.
        loaded: the model and its tokenizer.
        source: the prompts.
        report: called after each batch.

    Raises:
        UserError: settings do not fit the model, the data or the folder.
    """
    fisher, writer, renderer = _open(settings, loaded, source)
    summary, began = Summary(), time.perf_counter()
    total = source.total
    if total is not None:
        writer.missing_shards(total)
    count = 0
    for number, prompts in enumerate(_groups(source, settings.shard_size)):
        start, stop = prompts[0].index, prompts[-1].index + 1
        count = stop
        if writer.is_stored(number, start, stop):
            summary.stored_before += len(prompts)
            report(Progress(len(prompts), 0))
            continue
        results = list(compute_shard(fisher, renderer, prompts, settings.num_singular_values, report))
        writer.add(number, results)
        _tally(summary, results)
    if total is None:
        writer.missing_shards(count)
    summary.seconds = time.perf_counter() - began
    summary.prompts = count
    npz = settings.export_npz is True or (settings.export_npz == "auto" and count <= NPZ_PROMPTS)
    writer.note({"forms": fisher.forms})
    writer.finish(count, settings=settings.model_dump(), export_npz=npz)
    return summary


def compute_shard(
    fisher: FisherModel,
    renderer: Renderer,
    prompts: Sequence[SourcePrompt],
    rank: int,
    report: Callable[[Progress], None],
) -> Iterator[PromptResult]:
    """The results of a shard's prompts, in their order; a prompt that cannot be computed says why."""
    rendered: dict[int, TokenizedPrompt] = {}
    skipped: dict[int, str] = {}
    for i, prompt in enumerate(prompts):
        try:
            if prompt.skipped is not None or prompt.messages_or_text is None:
                raise SkippedPrompt(prompt.skipped or "no prompt")
            rendered[i] = renderer.render(prompt.messages_or_text)
        except SkippedPrompt as skip:
            skipped[i] = str(skip)
    report(Progress(len(skipped), 0))
    numbers: dict[int, PromptNumbers | str] = {}
    places = list(rendered)
    for batch in pack([len(rendered[i].ids) for i in places], fisher.batch_size, fisher.max_batch_tokens):
        members = [places[j] for j in batch]
        found = compute_batch(fisher, [rendered[i].ids for i in members], rank)
        numbers.update(zip(members, found, strict=True))
        report(Progress(len(members), sum(len(rendered[i].ids) for i in members)))
    for i, prompt in enumerate(prompts):
        common: dict[str, Any] = {"index": prompt.index, "source_row": prompt.source_row, "kept": prompt.kept}
        if i in skipped:
            yield PromptResult(**common, status="skipped", reason=skipped[i])
            continue
        token_info: dict[str, Any] = {
            "text": rendered[i].text,
            "num_tokens": len(rendered[i].ids),
            "truncated": rendered[i].truncated,
        }
        result = numbers[i]
        if isinstance(result, str) or result.reason is not None:
            reason = result if isinstance(result, str) else result.reason
            yield PromptResult(**common, **token_info, status="failed", reason=reason)
        else:
            yield PromptResult(
                **common,
                **token_info,
                token_ids=result.token_ids,
                log_probs=result.log_probs,
                layers=result.layers,
            )


def compute_batch(fisher: FisherModel, prompts_ids: Sequence[Sequence[int]], rank: int) -> list[PromptNumbers | str]:
    """One batch; out of memory it is halved, and a single prompt that does not fit is given its reason instead."""
    try:
        return list(fisher.numbers(prompts_ids, rank))
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        log.warning("out of memory on %d prompts of up to %d tokens", len(prompts_ids), max(map(len, prompts_ids)))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(prompts_ids) == 1:
        return [f"out of memory on {len(prompts_ids[0])} tokens"]
    half = (len(prompts_ids) + 1) // 2
    return compute_batch(fisher, prompts_ids[:half], rank) + compute_batch(fisher, prompts_ids[half:], rank)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _open(settings: Settings, loaded: Loaded, source: PromptSource) -> tuple[FisherModel, ResultsWriter, Renderer]:
    """Everything that can refuse, before anything is computed."""

    def renderer_for(date: str | None) -> Renderer:
        return Renderer(
            loaded.tokenizer,
            max_length=settings.max_length,
            chat_template=settings.chat_template,
            column=source.column,
            system_prompt=settings.system_prompt,
            prefill=settings.prefill,
            date=date,
        )

    renderer = renderer_for(None)
    try:
        fisher = FisherModel(
            loaded.model,
            loaded.tokenizer,
            layers=settings.hook_layer_name,
            top_k=settings.top_k_tokens,
            positions=settings.bias_positions,
            kernel=settings.kernel,
            chunk_size=None if settings.cotangent_chunk == "auto" else settings.cotangent_chunk,
            batch_size=settings.batch_size,
            max_batch_tokens=None if settings.max_batch_tokens == "auto" else settings.max_batch_tokens,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    layout = ShardLayout(
        widths=fisher.widths,
        top_k=settings.top_k_tokens,
        rank=settings.num_singular_values,
        vectors_dtype=settings.vectors_dtype,
        store_text=settings.store_text,
        keep_columns=tuple(settings.keep_columns or ()),
    )
    writer = ResultsWriter.open(
        settings.output_dir,
        layout=layout,
        shard_size=settings.shard_size,
        fingerprint=fingerprint(settings, loaded, source, fisher),
        resolved={
            "max_batch_tokens": fisher.max_batch_tokens,
            "template_date": renderer.template_date,
            "device": str(fisher.device),
            "threads": torch.get_num_threads(),
        },
        overwrite=settings.overwrite,
    )
    resolved = writer.resolved or {}
    fisher.max_batch_tokens = resolved.get("max_batch_tokens") or batch_tokens_for(
        fisher.model, fisher.device, fisher.top_k
    )
    if (date := resolved.get("template_date")) != renderer.template_date:
        renderer = renderer_for(date)
    if (threads := resolved.get("threads")) and threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # sums split over threads differ in their last bits
    return fisher, writer, renderer


def fingerprint(settings: Settings, loaded: Loaded, source: PromptSource, fisher: FisherModel) -> dict[str, Any]:
    """Everything that decides a prompt's results: the settings that do, and what model and data set they led to."""
    chosen = {name: value for name, value in settings.model_dump().items() if name not in NOT_IN_FINGERPRINT}
    return chosen | {
        "model": loaded.identity,
        "layers": fisher.layers,
        "data": source.fingerprint,
        "column": source.column,
        "device_type": fisher.device.type,
    }


def _groups(source: Iterable[SourcePrompt], size: int) -> Iterator[list[SourcePrompt]]:
    stream = iter(source)
    while group := list(islice(stream, size)):
        yield group


def _tally(summary: Summary, results: Sequence[PromptResult]) -> None:
    summary.tokens += sum(result.num_tokens for result in results)
    summary.failed += sum(result.status == "failed" for result in results)
    summary.skipped += sum(result.status == "skipped" for result in results)
