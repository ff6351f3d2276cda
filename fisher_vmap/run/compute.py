"""Compute a run shard by shard: batches, the kernel, compression, storage, and the account of what was done.

In the background the next shard is tokenised and the last one is written.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch

from fisher_vmap.data.batching import PromptNumbers, pack
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.prompts import SourcePrompt
from fisher_vmap.data.sequences import Tokens, completions_of, target_columns, tokens_of
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.audit import ShardForms, due_batch, one_shard
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.probe import known_of, probe
from fisher_vmap.linearize.residual_norms import mean_norms
from fisher_vmap.linearize.select import NoFormAgrees
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.validation import forget_freed, is_out_of_memory
from fisher_vmap.progress import step
from fisher_vmap.results.outputs import columns_of, note_on_targets, wants_npz
from fisher_vmap.results.record import PromptResult, was
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.run.bar import Progress
from fisher_vmap.run.open import Notes, PreparedShard, Run, with_unknown_tokens
from fisher_vmap.run.settings import Settings
from fisher_vmap.run.written import sequences_of

T = TypeVar("T")
Report = Callable[[Progress], None]

REASONS = 5  # of failed prompts, shown at the end

log = logging.getLogger(__name__)


class Share(NamedTuple):
    """The share of one of several processes: the `number`-th of `processes`, counted from 1."""

    number: int
    processes: int

    def of(self, items: Iterable[T]) -> Iterator[T]:
        """Every n-th item, starting with this process's first."""
        return islice(items, self.number - 1, None, self.processes)

    def has(self, place: int) -> bool:
        """Whether the item at this place, counted from 0, belongs to this process."""
        return place % self.processes == self.number - 1


@dataclass
class Summary:
    """What a run did: prompts by status, tokens and seconds of what was computed, and how many were stored before."""

    prompts: int = 0
    stored_before: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failed: int = 0
    skipped: int = 0
    reasons: tuple[str, ...] = ()
    """Of the first few failed prompts."""
    without_results: str | None = None
    """Why the first prompt has no results, if no prompt of the folder has any."""
    note: str | None = None
    """What to know of the folder's targets: that the next token is certain in most prompts."""
    finished: bool = True
    """Whether the folder is complete; False while other processes have shards to compute."""


class ShardDone(NamedTuple):
    """The account of one shard."""

    number: int
    prompts: int
    stored_before: bool
    tokens: int = 0
    failed: tuple[str, ...] = ()
    """A line for each failed prompt."""
    skipped: int = 0


def run_prompts(run: Run, report: Report, share: Share | None = None) -> Summary:
    """Compute the prompts that the results folder lacks, and finish the folder.

    Args:
        run: what `open_run` gave.
        report: called with each step.
        share: this process's shards, if several processes fill the folder; the last of them finishes it.

    Raises:
        UserError: as `compute_shards`.
    """
    writer, prompts, size = run.writer, run.prompts, run.settings.shard_size
    known = prompts.total is not None
    with step("checking what is stored"):  # this drops damaged shards from the index
        missing = writer.missing_shards(prompts.total or writer.index.stop, None if share is None else share.has)
    stored: dict[int, int] = {}
    if prompts.total is not None:  # stored prompts are reported first, so that the time left is that of the others
        lacking = {shard.number for shard in missing}
        stored = {i: min(size, prompts.total - i * size) for i in mine(prompts.total, size, share) if i not in lacking}
    report(Progress(sum(stored.values()), 0))
    summary, began = Summary(), time.perf_counter()
    for done in compute_shards(run, writer.add, report, mine(prompts.total, size, share)):
        summary.prompts += done.prompts
        summary.stored_before += done.prompts if done.stored_before else 0
        summary.tokens += done.tokens
        summary.failed += len(done.failed)
        summary.skipped += done.skipped
        summary.reasons = (summary.reasons + done.failed)[:REASONS]
        if done.stored_before and done.number not in stored:
            report(Progress(done.prompts, 0))
    summary.seconds = time.perf_counter() - began
    assert prompts.total is not None  # the end has been read
    if not known:
        writer.expect(prompts.total)
    if share is not None and not _is_last(writer, prompts.total):
        summary.finished = False
        return summary
    summary.prompts = prompts.total if share is None else summary.prompts
    finish(summary, writer, run.settings, prompts.total)
    return summary


def mine(total: int | None, shard_size: int, share: Share | None) -> Iterator[int]:
    """The numbers of this process's shards; endless if the number of prompts is not known."""
    numbers: Iterable[int] = count() if total is None else range(-(-total // shard_size))
    return iter(numbers) if share is None else share.of(numbers)


def prompts_of(asked: int | str, shard_size: int, share: Share | None) -> int | None:
    """How many prompts this process has, of so many asked for; None: not known."""
    if asked == "all":
        return None
    total = int(asked)
    return sum(min(shard_size, total - i * shard_size) for i in mine(total, shard_size, share))


def compute_shards(
    run: Run, store: Callable[[int, Sequence[PromptResult]], Any], report: Report, numbers: Iterator[int]
) -> Iterator[ShardDone]:
    """Compute and store the shards of these numbers up to the end of the data; yields an account of each.

    A shard is stored when the next account is yielded, or when the iterator ends.

    Args:
        run: what `open_run` gave.
        store: takes a shard's number and results.
        report: as for `compute_shard`.
        numbers: of the shards, in order.

    Raises:
        UserError: the folder cannot be written, or the data cannot be read to the end.
    """
    with_means = not run.writer.index.layout.median_norm
    with behind() as later, closing(ahead(run.prepared(numbers))) as shards:
        for shard in shards:
            if not (shard.rendered or shard.skipped):
                yield ShardDone(shard.number, len(shard.prompts), True)
                continue
            with mean_norms(with_means):
                results = compute_shard(run.fisher, shard, run.settings.num_singular_values, run.notes, report)
            later(store, shard.number, results)
            tokens, skipped = sum(r.num_tokens for r in results), sum(r.status == "skipped" for r in results)
            failed = tuple(_failure(r.index, r.reason) for r in results if r.status == "failed")
            yield ShardDone(shard.number, len(results), False, tokens, failed, skipped)


def finish(summary: Summary, writer: ResultsWriter, settings: Settings, total: int) -> None:
    """Write the files made from all shards, and count the failed and skipped prompts of the whole folder.

    Raises:
        UserError: a shard is missing or damaged, or the folder cannot be written.
    """
    npz = wants_npz(settings.export_npz, settings.save, total)
    index = writer.finish(total, settings=settings.model_dump(), save=settings.save, export_npz=npz)
    summary.note = note_on_targets(writer.folder, index)
    table = columns_of(writer.folder, index, ("prompt_index", "status", "reason"))
    table = table.filter((pc.field("prompt_index") < total) & (pc.field("status") != "ok"))
    if table.num_rows == total > 0:
        first = table.slice(0, 1).to_pylist()[0]
        summary.without_results = f"prompt {first['prompt_index']} {was(first['status'])}: {first['reason']}"
    failed = table.filter(pc.field("status") == "failed")
    summary.failed, summary.skipped = failed.num_rows, table.num_rows - failed.num_rows
    rows = failed.slice(0, REASONS).to_pylist()
    summary.reasons = tuple(_failure(row["prompt_index"], row["reason"]) for row in rows)


def _is_last(writer: ResultsWriter, total: int) -> bool:
    """Whether all shards of all processes are stored; index.json then lists them."""
    index = writer.refresh()
    wanted = max(total, index.num_prompts or 0)
    missing = len(index.missing(wanted))
    if missing:
        log.info("%d of %d shards are not there yet; the process that computes the last one finishes %s, or run "
                 "fisher-vmap finish", missing, -(-wanted // index.shard_size), writer.folder)  # fmt: skip
    return not missing


def _failure(index: int, reason: str | None) -> str:
    return f"prompt {index} failed: {reason}"


def ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; a background thread makes the next one while the current one is in use.

    Raises:
        Exception: whatever `items` raises, in place of the item.
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

    Each call, and the end of the context, waits for the previous call and raises its error. If the context is left by
    an error or Ctrl-C, a call that has begun is still completed.
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


def compute_shard(
    fisher: FisherModel, shard: PreparedShard, rank: int, notes: Notes, report: Report
) -> list[PromptResult]:
    """The results of a shard's prompts in their order; a failed prompt has a reason.

    If the audit finds a batch wrong, the whole shard is computed again by the form that takes over.

    Args:
        fisher: the model.
        shard: the prompts.
        rank: R.
        notes: what the run has learned; this adds to it.
        report: called before the first batch and after each.
    """
    numbers: dict[int, PromptNumbers | str] = {**with_unknown_tokens(fisher, shard)}
    places = [i for i in shard.rendered if i not in numbers]
    prompts = {i: Tokens(shard.rendered[i].ids, shard.rendered[i].start) for i in places}
    made = sequences_of(fisher, prompts, shard.written)
    numbers |= {i: "out of memory where the model writes its completions" for i in places if i not in made}
    places = list(made)
    lengths = [tokens_of(sequences) for sequences in made.values()]
    report(Progress(len(shard.prompts) - len(places), 0, len(places), sum(lengths)))
    batches = pack(lengths, fisher.batch_size, fisher.max_batch_tokens)
    audited = None
    if batches:
        with _one_shard(fisher, shard.number, [[lengths[j] for j in batch] for batch in batches]) as forms:
            each = [{places[j]: made[places[j]] for j in batch} for batch in batches]
            numbers |= _compute_batches(fisher, each, rank, notes, report, forms)
            given_up = forms.given_up()
        for layer, (form, why) in given_up.items():
            notes.store("audits", [shard.number, layer, form, why])
        audited = "; ".join(f"{layer} by the {form} form: {why}" for layer, (form, why) in given_up.items()) or None
    return [
        _result(shard, prompt, numbers.get(prompt.index), made.get(prompt.index, []), fisher.pieces, audited)
        for prompt in shard.prompts
    ]


@contextmanager
def _one_shard(fisher: FisherModel, number: int, batches: Sequence[Sequence[int]]) -> Iterator[ShardForms]:
    """Compute the batches of one shard within the context; `batches` are the lengths of each one's prompts."""
    model, device = fisher.model, fisher.device
    with torch.no_grad(), undisturbed(model, fisher.precision):
        # Nothing is known yet if all values at the opening of the run were not finite.
        known = known_of(model) or probe(model, lay_out(torch.arange(4, device=device)[None], None))
        vectors = fisher.top_k + fisher.trace_samples
        due = due_batch(model, known, fisher.layers, vectors, number, batches)
    with one_shard(known, due) as forms:
        yield forms


def _compute_batches(
    fisher: FisherModel,
    batches: Sequence[dict[int, list[Tokens]]],
    rank: int,
    notes: Notes,
    report: Report,
    forms: ShardForms,
) -> dict[int, PromptNumbers | str]:
    """Compute the batches, given as sequences by prompt index; again from the first one when a form is given up."""
    reported = 0
    while True:
        forms.begin()
        numbers: dict[int, PromptNumbers | str] = {}
        for number, prompts in enumerate(batches):
            numbers.update(compute_batch(fisher, prompts, rank, notes))
            if number >= reported:
                report(Progress(len(prompts), sum(map(tokens_of, prompts.values()))))
                reported += 1
            if forms.changed():
                break
        else:
            return numbers


def compute_batch(
    fisher: FisherModel, prompts: dict[int, list[Tokens]], rank: int, notes: Notes
) -> dict[int, PromptNumbers | str]:
    """Compute a batch; out of memory it is halved, and a single prompt that does not fit gets a reason."""
    members = list(prompts)
    if tuple(members) not in notes.splits:
        try:
            return dict(zip(members, fisher.numbers(list(prompts.values()), rank), strict=True))
        except NoFormAgrees as error:
            return dict.fromkeys(members, str(error))
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback keeps the tensors alive.
        longest = max(map(tokens_of, prompts.values()))
        log.warning("out of memory on %d prompts of up to %d tokens", len(members), longest)
        forget_freed()
        if len(members) == 1:
            return {members[0]: f"out of memory on {longest} tokens"}
        notes.split(members)
    half = (len(members) + 1) // 2
    halves = ({i: prompts[i] for i in part} for part in (members[:half], members[half:]))
    return {i: numbers for part in halves for i, numbers in compute_batch(fisher, part, rank, notes).items()}


def _result(
    shard: PreparedShard,
    prompt: SourcePrompt,
    numbers: PromptNumbers | str | None,
    sequences: Sequence[Tokens],
    pieces: Pieces | None,
    audited: str | None,
) -> PromptResult:
    common: dict[str, Any] = {"index": prompt.index, "source_row": prompt.source_row, "kept": prompt.kept}
    if numbers is None:
        return PromptResult(**common, status="skipped", reason=shard.skipped[prompt.index])
    rendered = shard.rendered[prompt.index]
    common |= {"audit": audited, "text": rendered.text, "truncated": rendered.truncated}
    own = rendered.ids[: rendered.start]
    common |= {"num_tokens": len(own)}
    if pieces is not None:
        common["prompt_tokens"] = pieces.each(own)
    if isinstance(numbers, str):
        return PromptResult(**common, status="failed", reason=numbers)
    if reason := numbers.reason or _not_finite(numbers):
        return PromptResult(**common, status="failed", reason=reason)
    if pieces is not None:
        common["top_tokens"] = [pieces.single(int(token)) for token in numbers.token_ids]
    if numbers.targets is not None:
        written = completions_of(sequences, rendered, pieces)
        common["targets"] = target_columns(numbers.targets) | ({} if written is None else written._asdict())
    return PromptResult(**common, token_ids=numbers.token_ids, log_probs=numbers.log_probs, layers=numbers.layers)


def _not_finite(numbers: PromptNumbers) -> str | None:
    """What is wrong with the numbers that `PromptNumbers.reason` does not cover."""
    for layer, result in numbers.layers.items():
        for name in ("Q", "position_energy", "residual_norm", "trace"):
            if not np.isfinite(getattr(result, name)).all():
                return f"the {name.replace('_', ' ')} at {layer} is not finite"
    return None
