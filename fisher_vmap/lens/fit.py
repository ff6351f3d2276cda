"""A fit of a lens: prompts shard by shard into this process's sums."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

from fisher_vmap.data.batching import pack
from fisher_vmap.errors import UserError
from fisher_vmap.lens.finish import Counted, Summary, finish
from fisher_vmap.lens.matrices import PromptMatrices, prompt_matrices, valid_positions
from fisher_vmap.lens.opening import Fit
from fisher_vmap.lens.sums import Shard, Spread, Sums, part_files, part_path
from fisher_vmap.model.validation import in_halves, is_out_of_memory
from fisher_vmap.run.bar import Progress
from fisher_vmap.run.compute import Share, ahead, mine
from fisher_vmap.run.open import PreparedShard, prepare, with_unknown_tokens

Report = Callable[[Progress], None]

log = logging.getLogger("fisher_vmap")


def prepared(fit: Fit, numbers: Iterator[int]) -> Iterator[PreparedShard]:
    """The shards of these numbers that are not stored, up to the end of the data; of one that grew, the rest."""
    stored = fit.parts()
    for number in numbers:
        prompts = fit.prompts.of(number)
        have = stored[number][1].prompts if number in stored else 0
        if not prompts:
            return
        if have < len(prompts):
            yield prepare(fit.renderer, number, prompts[have:])


class Done(NamedTuple):
    """The account of a shard that was computed now."""

    number: int
    shard: Shard
    spread: dict[str, Spread]
    """Of this process's sums."""


def fit_shards(fit: Fit, part: str, report: Report, numbers: Iterator[int]) -> Iterator[Done]:
    """Compute the shards of these numbers that are not stored, and store each before its account is yielded.

    Args:
        fit: what `open_fit` gave.
        part: the name of this process's part.
        report: called with each step.
        numbers: of the shards, in order.

    Raises:
        UserError: the folder cannot be written, or the model or the data cannot be used.
    """
    path = part_path(fit.folder, part)
    sums = Sums.load(path) if path.exists() else Sums(fit.mark, fit.fisher.widths)
    with closing(ahead(prepared(fit, numbers))) as shards:
        for shard in shards:
            account = _add_shard(fit, shard, sums, report)
            before = sums.shards.get(shard.number)
            sums.shards[shard.number] = account if before is None else _together(before, account)
            sums.save(path)
            yield Done(shard.number, account, {layer: sums.spread(layer) for layer in fit.fisher.layers})


def _together(before: Shard, now: Shard) -> Shard:
    return Shard(
        prompts=before.prompts + now.prompts,
        used=before.used + now.used,
        tokens=before.tokens + now.tokens,
        skipped=before.skipped | now.skipped,
        failed=before.failed | now.failed,
    )


def _add_shard(fit: Fit, shard: PreparedShard, sums: Sums, report: Report) -> Shard:
    """Add a shard's prompts to the sums, in their order."""
    fisher, first = fit.fisher, fit.settings.skip_first
    skipped, failed = dict(shard.skipped), with_unknown_tokens(fisher, shard)
    for index, prompt in shard.rendered.items():
        if valid_positions(len(prompt.ids), first) < 1:
            skipped[index] = f"{len(prompt.ids)} tokens, and the first {first} and the last one are left out"
            failed.pop(index, None)
    ids = {i: prompt.ids for i, prompt in shard.rendered.items() if i not in skipped and i not in failed}
    report(Progress(len(shard.prompts) - len(ids), 0, len(ids), sum(map(len, ids.values()))))
    places, used = list(ids), 0
    waiting = list(ids)  # to be added, in order
    found: dict[int, PromptMatrices] = {}
    for batch in pack([len(ids[i]) for i in places], fisher.batch_size, fisher.max_batch_tokens):
        members = [places[j] for j in batch]
        for index, one in zip(members, _matrices(fit, [ids[i] for i in members]), strict=True):
            if isinstance(one, str):
                failed[index] = one
            else:
                found[index] = one
        report(Progress(len(members), sum(len(ids[i]) for i in members)))
        while waiting and (waiting[0] in found or waiting[0] in failed):  # none is held longer than needed
            if (index := waiting.pop(0)) in found:
                sums.add(index, found.pop(index))
                used += 1
    tokens = sum(len(ids[i]) for i in ids if i not in failed)
    return Shard(prompts=len(shard.prompts), used=used, tokens=tokens, skipped=skipped, failed=failed)


def _matrices(fit: Fit, prompts: list[list[int]]) -> list[PromptMatrices | str]:
    """The matrices of a batch, or why a prompt has none; out of memory the batch is halved."""
    chunk = fit.settings.cotangent_chunk
    together = None if chunk == "auto" else chunk

    def compute(some: Sequence[list[int]]) -> list[PromptMatrices | str]:
        try:
            found = prompt_matrices(fit.fisher, list(some), fit.settings.skip_first, together)
        except ValueError as error:
            raise UserError(str(error)) from error
        return [one if _is_finite(one) else "its numbers are not finite" for one in found]

    try:
        return in_halves(compute, prompts, lambda some: log.warning("out of memory on %d prompts", len(some)))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(prompts) > 1:
            raise
        return [f"out of memory on {len(prompts[0])} tokens"]


def _is_finite(found: PromptMatrices) -> bool:
    return all(bool(x.isfinite().all()) for x in (*found.jacobians.values(), found.metric))


def run_fit(fit: Fit, report: Report, share: Share | None = None) -> Summary:
    """Compute the shards that the folder lacks, and write the lens once all are there.

    Raises:
        UserError: as `fit_shards`, or no prompt has a matrix.
    """
    name = "1-of-1" if share is None else f"{share.number}-of-{share.processes}"
    before = [shard for _, shard in fit.parts().values()]
    stored = sum(shard.used for shard in before)
    report(Progress(sum(shard.prompts for shard in before), 0))
    began, used, stopped = time.perf_counter(), 0, False
    until, others = fit.settings.until, [path for path in part_files(fit.folder) if path != part_path(fit.folder, name)]
    if until is not None and stored and _worst(_spreads(fit)) <= until:
        return finish(fit, None, Counted(0, stored, 0.0, True))
    for done in fit_shards(fit, name, report, mine(fit.prompts.total, fit.settings.shard_size, share)):
        used += done.shard.used
        spread = done.spread if not others else _spreads(fit)
        worst = _worst(spread)
        if not math.isnan(worst):
            layer = max(spread, key=lambda one: spread[one].split_half)
            log.info("%d prompts: two halves differ by %.3g of |J| (%s)", stored + used, worst, layer)
        if until is not None and worst <= until:
            stopped = True
            break
    counted = Counted(used, stored, time.perf_counter() - began, stopped)
    return finish(fit, None if stopped else fit.prompts.total, counted)


def _spreads(fit: Fit) -> dict[str, Spread]:
    sums = fit.joined()
    return {layer: sums.spread(layer) for layer in sums.widths}


def _worst(spread: dict[str, Spread]) -> float:
    values = [one.split_half for one in spread.values()]
    return math.nan if any(map(math.isnan, values)) else max(values)
