"""Prompts -> batches -> kernel -> compression -> shard. One shard at a time; what is stored is not computed again."""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fisher_vmap.compute import Progress, compute_shard
from fisher_vmap.opening import Run
from fisher_vmap.overlap import ahead, behind
from fisher_vmap.storage.index import TABLE_NAME

NPZ_PROMPTS = 10_000  # up to here `export_npz: auto` writes the npz


@dataclass
class Summary:
    """What a run did: prompts by status, tokens and seconds of what was computed, and how many were there already."""

    prompts: int = 0
    stored_before: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    """Of the first few prompts that failed."""


def run_prompts(run: Run, report: Callable[[Progress], None]) -> Summary:
    """Compute what the results folder lacks, and finish it.

    Args:
        run: what `open_run` gave.
        report: called after each batch.

    Raises:
        UserError: the folder cannot be written any more, or the data cannot be read to their end.
    """
    settings, fisher, writer = run.settings, run.fisher, run.writer
    summary, began = Summary(), time.perf_counter()
    with behind() as later, closing(ahead(run.shards)) as shards:
        for shard in shards:
            summary.prompts += len(shard.prompts)
            if not (shard.rendered or shard.skipped):
                summary.stored_before += len(shard.prompts)
                report(Progress(len(shard.prompts), 0))
                continue
            results = compute_shard(fisher, shard, settings.num_singular_values, run.splits, report)
            summary.tokens += sum(result.num_tokens for result in results)
            later(writer.add, shard.number, results)
    summary.seconds = time.perf_counter() - began
    if run.total is None:
        writer.missing_shards(summary.prompts)
    wanted = settings.save != "mean" and summary.prompts <= NPZ_PROMPTS
    npz = wanted if settings.export_npz == "auto" else settings.export_npz
    writer.finish(summary.prompts, settings=settings.model_dump(), save=settings.save, export_npz=npz)
    _count_problems(summary, writer.folder)
    return summary


def _count_problems(summary: Summary, folder: Path) -> None:
    """Failed and skipped prompts of the whole run, those of earlier goes included, from the table."""
    table = pq.read_table(folder / TABLE_NAME, columns=["prompt_index", "status", "reason"])
    table = table.filter((pc.field("prompt_index") < summary.prompts) & (pc.field("status") != "ok"))
    failed = table.filter(pc.field("status") == "failed")
    summary.failed, summary.skipped = failed.num_rows, table.num_rows - failed.num_rows
    summary.reasons = tuple(
        f"prompt {row['prompt_index']} failed: {row['reason']}" for row in failed.slice(0, 5).to_pylist()
    )
