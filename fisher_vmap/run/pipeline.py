"""Prompts -> batches -> kernel -> compression -> shard. One shard at a time; what is stored is not computed again.

Items computed in this process: all of them, or every n-th, where other processes compute the others.

What goes on in the background while the model computes: the next shard's tokens, and the last shard's files.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fisher_vmap.progress import step
from fisher_vmap.results.index import TABLE_NAME
from fisher_vmap.results.outputs import wants_npz
from fisher_vmap.results.record import PromptResult, was
from fisher_vmap.results.writer import ResultsWriter, ShardRange
from fisher_vmap.run.compute import Progress, compute_shard
from fisher_vmap.run.open import Run
from fisher_vmap.run.settings import Settings

T = TypeVar("T")
Result = TypeVar("Result")


class Share(NamedTuple):
    """The share of one of several processes: the `number`-th of `processes`, from 1."""

    number: int
    processes: int

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """Every n-th item, from this process's first on."""
        return islice(items, self.number - 1, None, self.processes)

    def has(self, place: int) -> bool:
        """Whether the item at this place, from 0, is this process's."""
        return place % self.processes == self.number - 1


def run_items(
    compute: Callable[[Iterator[T]], Iterator[Result]], items: Iterable[T], share: Share | None = None
) -> Iterator[Result]:
    """What `compute` gives for the items, or for this process's share of them, in their order."""
    yield from compute(iter(items) if share is None else share.of(items))


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; each is made in a background thread while the one before it is in use.

    Raises:
        Exception: whatever `items` raises, at the place of the item that it could not make.
    """
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming: Future[Any] = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


@contextmanager
def behind() -> Iterator[Callable[..., None]]:
    """Within the context, `later(function, *arguments)` calls it in a background thread, one call at a time.

    Before it begins a call it waits for the one before, and raises what that one raised; so does the end of the
    context. Where the context itself is left by an error or Ctrl-C, the call that has begun is still completed.
    """
    begun: Future[Any] | None = None
    with ThreadPoolExecutor(1, "behind") as thread:

        def later(function: Callable[..., Any], *arguments: Any) -> None:
            nonlocal begun
            if begun is not None:
                begun.result()
            begun = thread.submit(function, *arguments)

        yield later
        if begun is not None:
            begun.result()


REASONS = 5  # of prompts that failed, told at the end

log = logging.getLogger(__name__)


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
    without_results: str | None = None
    """Why the first prompt has no results, where no prompt of the folder has any."""
    finished: bool = True
    """Whether the folder is complete: False where other processes have shards to compute yet."""


class ShardDone(NamedTuple):
    """A shard that has been dealt with: its prompts and, where it was not stored before, what they came to."""

    number: int
    prompts: int
    stored_before: bool
    tokens: int = 0
    failed: tuple[str, ...] = ()
    """A line for each prompt that failed."""
    skipped: int = 0


def compute_shards(
    run: Run,
    store: Callable[[int, Sequence[PromptResult]], Any],
    report: Callable[[Progress], None],
    numbers: Iterator[int],
) -> Iterator[ShardDone]:
    """Compute and store the shards of these numbers, one line of account for each, up to the end of the data.

    While one is computed the next is tokenised and the one before is written: what has come out of here is stored when
    the next one comes out, or when nothing more does.

    Args:
        run: what `open_run` gave.
        store: takes a shard's number and results.
        report: called as `compute_shard` does, for what is computed.
        numbers: of the shards, in order.

    Raises:
        UserError: the folder cannot be written any more, or the data cannot be read to their end.
    """
    with behind() as later, closing(ahead(run.prepared(numbers))) as shards:
        for shard in shards:
            if not (shard.rendered or shard.skipped):
                yield ShardDone(shard.number, len(shard.prompts), True)
                continue
            results = compute_shard(run.fisher, shard, run.settings.num_singular_values, run.notes, report)
            later(store, shard.number, results)
            yield _account(shard.number, results)


def run_prompts(run: Run, report: Callable[[Progress], None], share: Share | None = None) -> Summary:
    """Compute what the results folder lacks, and finish it.

    Args:
        run: what `open_run` gave.
        report: called with each step forward.
        share: which shards are this process's, where several fill the folder: the last of them finishes it.

    Raises:
        UserError: as `compute_shards`.
    """
    writer, prompts = run.writer, run.prompts
    # A damaged shard leaves the index here: one that is listed is taken for stored.
    known = prompts.total is not None
    with step("checking what is stored"):
        missing = writer.missing_shards(prompts.total or writer.index.stop, None if share is None else share.has)
    # What is stored is told beforehand, so that only what is to be computed counts for the time left.
    numbers = shard_numbers(prompts.total, run.settings.shard_size)
    told = _stored(missing, prompts.total, run.settings.shard_size, share) if known else {}
    report(Progress(sum(told.values()), 0))
    summary, began = Summary(), time.perf_counter()
    compute = partial(compute_shards, run, writer.add, report)
    for done in run_items(compute, numbers, share):
        add_up(summary, done)
        if done.stored_before and done.number not in told:
            report(Progress(done.prompts, 0))
    summary.seconds = time.perf_counter() - began
    assert prompts.total is not None  # the end has been read
    if not known:
        writer.expect(prompts.total)
    if share is not None and not _is_last(writer, prompts.total):
        summary.finished = False
        return summary
    summary.prompts = prompts.total if share is None else summary.prompts
    finish(writer, run.settings, prompts.total)
    count_problems(summary, writer, prompts.total)
    return summary


def _stored(missing: Sequence[ShardRange], total: int | None, size: int, share: Share | None) -> dict[int, int]:
    """The prompts of each stored shard of this process, of a run of known length, by the shard's number."""
    assert total is not None
    lacking = {shard.number for shard in missing}
    numbers = shard_numbers(total, size)
    mine = numbers if share is None else share.of(numbers)
    return {number: min(size, total - number * size) for number in mine if number not in lacking}


def shard_numbers(total: int | None, shard_size: int) -> Iterable[int]:
    """The numbers of a run's shards; without end where the number of prompts is not known."""
    return count() if total is None else range(-(-total // shard_size))


def add_up(summary: Summary, done: ShardDone) -> None:
    """Add a shard to the account."""
    summary.prompts += done.prompts
    summary.stored_before += done.prompts if done.stored_before else 0
    summary.tokens += done.tokens
    summary.failed += len(done.failed)
    summary.skipped += done.skipped
    summary.reasons = (summary.reasons + done.failed)[:REASONS]


def finish(writer: ResultsWriter, settings: Settings, total: int) -> None:
    """Write the files made from all shards, as the settings have it.

    Raises:
        UserError: a shard is missing or damaged, or the folder cannot be written.
    """
    npz = wants_npz(settings.export_npz, settings.save, total)
    writer.finish(total, settings=settings.model_dump(), save=settings.save, export_npz=npz)


def count_problems(summary: Summary, writer: ResultsWriter, total: int) -> None:
    """Failed and skipped prompts of the whole run, those of earlier goes included, from the table."""
    table = pq.read_table(writer.folder / TABLE_NAME, columns=["prompt_index", "status", "reason"])
    table = table.filter((pc.field("prompt_index") < total) & (pc.field("status") != "ok"))
    if table.num_rows == total > 0:
        first = table.slice(0, 1).to_pylist()[0]
        summary.without_results = f"prompt {first['prompt_index']} {was(first['status'])}: {first['reason']}"
    failed = table.filter(pc.field("status") == "failed")
    summary.failed, summary.skipped = failed.num_rows, table.num_rows - failed.num_rows
    rows = failed.slice(0, REASONS).to_pylist()
    summary.reasons = tuple(_failure(row["prompt_index"], row["reason"]) for row in rows)


def _is_last(writer: ResultsWriter, total: int) -> bool:
    """Whether no other process has a shard to compute any more; index.json has all of this one's afterwards."""
    index = writer.refresh()
    wanted = max(total, index.num_prompts or 0)
    missing = len(index.missing(wanted))
    if missing:
        log.info("%d of %d shards are not there yet; whoever computes the last one finishes %s, or fisher-vmap finish",
                 missing, -(-wanted // index.shard_size), writer.folder)  # fmt: skip
    return not missing


def _account(number: int, results: Sequence[PromptResult]) -> ShardDone:
    failed = tuple(_failure(result.index, result.reason) for result in results if result.status == "failed")
    skipped = sum(result.status == "skipped" for result in results)
    return ShardDone(number, len(results), False, sum(result.num_tokens for result in results), failed, skipped)


def _failure(index: int, reason: str | None) -> str:
    return f"prompt {index} failed: {reason}"
