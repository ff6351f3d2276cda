"""The driver of a run whose shards are computed on other machines: it hands out numbers and keeps index.json."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from fisher_vmap.config import Settings
from fisher_vmap.engines.ray import Pool, RayEngine, connected
from fisher_vmap.errors import UserError, WorkerError
from fisher_vmap.pipeline import Summary, count_problems, finish
from fisher_vmap.progress import step
from fisher_vmap.prompts.sources import PromptSource
from fisher_vmap.running.progress import Progress
from fisher_vmap.storage.entries import ShardEntry
from fisher_vmap.storage.writer import ResultsWriter, ShardRange
from fisher_vmap.workers.member import ShardWorker, begin

MOST_FAILED = 10  # shards that may fail before the rest is not tried any more

Bar = Callable[[int | None, int], AbstractContextManager[Callable[[Progress], None]]]

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What computes items somewhere; `RayEngine` is one."""

    def run_items(
        self, worker: Callable[..., Any], arguments: Sequence[Any], items: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """The workers' results as they come."""
        ...


def run_on_ray(settings: Settings, source: PromptSource, bar: Bar, worker: Callable[..., Any] = ShardWorker) -> Summary:
    """Compute what the results folder lacks on the workers of a Ray cluster, and finish it.

    Args:
        settings: of the run.
        source: its prompts, which are counted here and read by the workers.
        bar: makes the progress bar over so many prompts, computed by so many workers.
        worker: makes a worker, from the settings and its share of the device.

    Raises:
        UserError: as `open_run`, or Ray cannot be reached.
        WorkerError: shards failed; all others are stored.
    """
    total = source.total
    if total is None:
        with step("counting the prompts"):
            total = sum(1 for _ in source)
    pool = Pool(settings.ray_address, settings.ray_workers, settings.ray_gpus_per_worker, settings.ray_cpus_per_worker)
    with connected(pool) as engine:
        share = engine.gpus if 0 < engine.gpus < 1 else 1.0
        with step("opening the run on a worker"):
            engine.call(begin, seen_from_anywhere(settings), share)
        writer = ResultsWriter.attach(settings.output_dir)
        with step("checking what is stored"):
            missing = [shard for shard in writer.missing_shards(total) if shard.start < total]
        log.info("%s", _workers(engine, len(missing)))
        arguments = (seen_from_anywhere(settings, overwrite=False), share)
        with bar(total, engine.most) as report:
            summary = drive(engine, worker, arguments, writer, missing, total, report)
    finish(writer, settings, total)
    count_problems(summary, writer, total)
    return summary


def drive(
    engine: Engine | RayEngine,
    worker: Callable[..., Any],
    arguments: Sequence[Any],
    writer: ResultsWriter,
    missing: Sequence[ShardRange],
    total: int,
    report: Callable[[Progress], None],
) -> Summary:
    """Have the missing shards computed, and list each as it comes.

    Raises:
        WorkerError: shards failed; the others have been computed, unless very many did.
    """
    began, summary = time.perf_counter(), Summary(prompts=total)
    lacking = {shard.number: shard.stop - shard.start for shard in missing}
    summary.stored_before = total - sum(lacking.values())
    report(Progress(summary.stored_before, 0))
    failed: list[dict[str, Any]] = []
    for account in engine.run_items(worker, arguments, list(lacking)):
        if "error" in account:
            failed.append(account)
            if len(failed) == MOST_FAILED:
                break
            continue
        writer.record([ShardEntry.model_validate(account["entry"])])
        notes = account.get("notes", [])
        if split := sum(name == "splits" for name, _ in notes):
            log.warning("out of memory on %d batches: they were computed in halves", split)
        for name, item in notes:
            writer.note(name, [item])
        summary.tokens += account["tokens"]
        report(Progress(lacking.pop(account["number"], 0), account["tokens"]))
    if failed:
        raise _failure(failed, len(lacking), writer)
    summary.seconds = time.perf_counter() - began
    return summary


def seen_from_anywhere(settings: Settings, **changes: Any) -> Settings:
    """The settings with whole paths: a worker's working folder is another."""
    names = ("model_path", "adapter_path", "dataset_name")
    here = {name: value for name in names if (value := getattr(settings, name)) is not None and os.path.exists(value)}
    here["output_dir"] = settings.output_dir
    return settings.model_copy(update={name: str(Path(value).absolute()) for name, value in here.items()} | changes)


def _failure(failed: list[dict[str, Any]], lacking: int, writer: ResultsWriter) -> Exception:
    first, size = failed[0], writer.index.shard_size
    others = f", and {len(failed) - 1} more shards failed" if len(failed) > 1 else ""
    where = f"shard {first['number']} (from prompt {first['number'] * size}) failed in {first['worker']}"
    line = (
        f"{where}: {first['error']}{others}; {len(writer.index.shards)} shards are stored in {writer.folder}, "
        f"{lacking} still lacking; the same command carries on"
    )
    return UserError(line) if all(account["user_error"] for account in failed) else WorkerError(line)


def _workers(engine: RayEngine, shards: int) -> str:
    count = f"{engine.most}" if engine.least == engine.most else f"{engine.least} to {engine.most}"
    cpus = f"{engine.cpus} CPU{'' if engine.cpus == 1 else 's'}"
    what = f"{engine.gpus:g} GPU{'' if engine.gpus <= 1 else 's'} and {cpus}" if engine.gpus else cpus
    return f"shards to compute: {shards}, on {count} workers with {what} each"
