"""One shard's prompts: to tokens, to batches, to numbers, and back into their order with what went wrong.

The bar of a run: prompts and tokens done, tokens a second, time left.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from fisher_vmap.data.batching import PromptNumbers, pack
from fisher_vmap.data.prompts import SourcePrompt
from fisher_vmap.data.tokenize import Pieces, Renderer, SkippedPrompt, TokenizedPrompt
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.audit import ShardForms
from fisher_vmap.linearize.select import NoFormAgrees
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.progress import Line, display, duration, meter, on_a_clock
from fisher_vmap.results.record import PromptResult


class Progress(NamedTuple):
    """A step forward.

    Attributes:
        prompts: finished.
        tokens: that were computed for them; 0 where they were stored before, or skipped.
        coming_prompts: that have been tokenised now, and are computed next.
        coming_tokens: of these.
    """

    prompts: int
    tokens: int
    coming_prompts: int = 0
    coming_tokens: int = 0


@dataclass
class Pace:
    """How fast a run goes, and for how long yet.

    The first batch, in which memory is claimed and code is loaded, does not count as soon as there is another one. What
    was stored before has cost nothing, and counts neither as tokens nor as time.

    Attributes:
        total: prompts of this process; None: not known.
        since: when the batch that is computed now began.
        warm_up: how many batches do not count: as many as there are workers.
    """

    total: int | None
    since: float
    warm_up: int = 1
    prompts: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    _computed: int = field(default=0, init=False)
    _coming: tuple[int, int] = field(default=(0, 0), init=False)
    _batches: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _warm_up: tuple[int, float] = field(default=(0, 0.0), init=False)

    def add(self, step: Progress, now: float) -> None:
        """Count a step."""
        self.prompts += step.prompts
        self.tokens += step.tokens
        prompts, tokens = self._coming
        if step.coming_prompts:
            self._coming = prompts + step.coming_prompts, tokens + step.coming_tokens
            if not self._batches:
                self.since = now
        elif step.tokens:
            self._coming = max(0, prompts - step.prompts), max(0, tokens - step.tokens)
            self._computed += step.prompts
            self._seconds += now - self.since
            self._batches += 1
            if self._batches == self.warm_up:
                self._warm_up = self.tokens, self._seconds
            self.since = now
        elif step.prompts:
            self.since = now

    @property
    def rate(self) -> float | None:
        """Tokens a second; None before the first batch."""
        tokens, seconds = self.tokens, self._seconds
        if self._batches > self.warm_up:
            tokens, seconds = tokens - self._warm_up[0], seconds - self._warm_up[1]
        return tokens / seconds if tokens and seconds > 0 else None

    @property
    def tokens_left(self) -> float | None:
        """Tokens still to be computed: of prompts that are not tokenised yet, as many as the others have on average."""
        prompts, tokens = self._coming
        if self.total is None or not self._computed + prompts:
            return None
        mean = (self.tokens + tokens) / (self._computed + prompts)
        return tokens + max(0, self.total - self.prompts - prompts) * mean

    @property
    def is_exact(self) -> bool:
        """Whether all prompts that are left have been tokenised."""
        return self.total is not None and self.total - self.prompts <= self._coming[0]

    def seconds_left(self, now: float) -> float | None:
        """Time left, as the rate has it; None where it cannot be known, or nothing is left."""
        rate, tokens = self.rate, self.tokens_left
        return None if not rate or not tokens else max(0.0, tokens / rate - (now - self.since))


@dataclass(eq=False)
class RunLine(Line):
    """The line of a run; it shows before the first batch."""

    pace: Pace = field(default_factory=lambda: Pace(None, 0.0))

    def plain(self, now: float) -> str:
        """For a log."""
        pace, left, rate = self.pace, self.pace.tokens_left, self.pace.rate
        parts = [f"{pace.prompts:,} prompts" if pace.total is None else f"{pace.prompts:,} of {pace.total:,} prompts"]
        if left is not None and (pace.tokens or left):
            about = "" if pace.is_exact else "about "
            parts.append(f"{pace.tokens:,} of {about}{_rounded(pace.tokens + left, pace.is_exact)} tokens")
        elif pace.tokens:
            parts.append(f"{pace.tokens:,} tokens")
        if rate is not None:
            parts.append(f"{_rate(rate)} tokens a second")
        if (seconds := pace.seconds_left(now)) is not None:
            parts.append(f"{duration(seconds)} left")
        elif self.told is not None:
            parts.append(f"{duration(now - self.began)} so far")
        return f"{self.what}: {', '.join(parts)}"

    def drawn(self, now: float, columns: int, ascii_only: bool) -> str:
        """For a terminal of this width."""
        pace, left, rate = self.pace, self.pace.tokens_left, self.pace.rate
        parts = [f"{pace.prompts:,} prompts" if pace.total is None else f"{pace.prompts:,}/{pace.total:,} prompts"]
        if left is not None:
            parts.append(f"{pace.tokens:,}/{_rounded(pace.tokens + left, pace.is_exact)} tokens")
        elif pace.tokens:
            parts.append(f"{pace.tokens:,} tokens")
        if rate is not None:
            parts.append(f"{_rate(rate)}/s")
        seconds = pace.seconds_left(now)
        times = on_a_clock(now - self.began) + ("" if seconds is None else f"<{on_a_clock(seconds)}")
        text = f"{', '.join(parts)} [{times}]"
        if pace.total is None:
            return f"{self.what}: {text}"[:columns]
        return meter(self.what, pace.prompts, pace.total, text, columns, ascii_only)


@contextmanager
def run_bar(total: int | None, warm_up: int = 1) -> Iterator[Callable[[Progress], None]]:
    """The bar of a run over `total` prompts (None: not known), there from the beginning.

    Args:
        total: prompts of this process.
        warm_up: how many batches do not count for the rate.

    Returns:
        A function that takes each step forward.
    """
    if (place := display()) is None:
        yield lambda step: None
        return
    now = place.clock()
    line = RunLine("computing", now, at_once=True, pace=Pace(total, now, warm_up))

    def report(step: Progress) -> None:
        line.pace.add(step, place.clock())
        place.moved()

    with place.showing(line):
        yield report


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _rounded(tokens: float, exact: bool) -> str:
    """A number of tokens: all of it where it is known, two digits where it is estimated."""
    if exact or tokens < 100:
        return f"{tokens:,.0f}"
    unit = 10.0 ** (len(str(int(tokens))) - 2)
    return f"{round(tokens / unit) * unit:,.0f}"


log = logging.getLogger(__name__)


class PreparedShard(NamedTuple):
    """A shard's prompts with what is known of them before the model has seen them, all by prompt index."""

    number: int
    prompts: Sequence[SourcePrompt]
    rendered: dict[int, TokenizedPrompt]
    """The prompts that became tokens."""
    skipped: dict[int, str]
    """Why the others did not."""


@dataclass
class Notes:
    """What a run learns on its way, kept in its folder, so that a resumed one repeats it or tells it.

    Batches that ran out of memory are known as the indices of their prompts: a resumed run halves them without trying,
    since prompts computed in other company differ in their last bits. Forms that were given up in a shard are told.

    Attributes:
        splits: the batches that ran out of memory.
        store: takes the name of a list and an item for it.
    """

    splits: set[tuple[int, ...]] = field(default_factory=set)
    store: Callable[[str, list[Any]], None] = lambda name, item: None

    def split(self, members: Sequence[int]) -> None:
        """Remember a batch that ran out of memory."""
        self.splits.add(tuple(members))
        self.store("splits", list(members))


def prepare(renderer: Renderer, number: int, prompts: Sequence[SourcePrompt]) -> PreparedShard:
    """Render and tokenise the prompts of shard `number`."""
    shard = PreparedShard(number, prompts, {}, {})
    for prompt in prompts:
        try:
            if prompt.skipped is not None or prompt.messages_or_text is None:
                raise SkippedPrompt(prompt.skipped or "no prompt")
            shard.rendered[prompt.index] = renderer.render(prompt.messages_or_text)
        except SkippedPrompt as skip:
            shard.skipped[prompt.index] = str(skip)
    return shard


def compute_shard(
    fisher: FisherModel, shard: PreparedShard, rank: int, notes: Notes, report: Callable[[Progress], None]
) -> list[PromptResult]:
    """The results of a shard's prompts, in their order; a prompt that cannot be computed says why.

    Where the audit finds a batch wrong, the whole shard is computed by the form that takes over.

    Args:
        fisher: the model.
        shard: the prompts.
        rank: R.
        notes: what the run has learned; more is added.
        report: called when the work begins, and after each batch.
    """
    found = {i: reason for i, prompt in shard.rendered.items() if (reason := _not_in_vocabulary(fisher, prompt.ids))}
    numbers: dict[int, PromptNumbers | str] = dict(found)
    places = [i for i in shard.rendered if i not in found]
    lengths = [len(shard.rendered[i].ids) for i in places]
    report(Progress(len(shard.prompts) - len(places), 0, len(places), sum(lengths)))
    batches = pack(lengths, fisher.batch_size, fisher.max_batch_tokens)
    audited = None
    if batches:
        with fisher.one_shard(shard.number, [[lengths[j] for j in batch] for batch in batches]) as forms:
            numbers |= _compute_batches(fisher, shard, [[places[j] for j in batch] for batch in batches], rank, notes,
                                        report, forms)  # fmt: skip
            given_up = forms.given_up()
        for layer, (form, why) in given_up.items():
            notes.store("audits", [shard.number, layer, form, why])
        audited = "; ".join(f"{layer} by the {form} form: {why}" for layer, (form, why) in given_up.items()) or None
    return [_result(shard, prompt, numbers.get(prompt.index), fisher.pieces, audited) for prompt in shard.prompts]


def _compute_batches(
    fisher: FisherModel,
    shard: PreparedShard,
    batches: Sequence[Sequence[int]],
    rank: int,
    notes: Notes,
    report: Callable[[Progress], None],
    forms: ShardForms,
) -> dict[int, PromptNumbers | str]:
    """The batches, given as indices of prompts; anew from the first one on where a form is given up on the way."""
    reported = 0
    while True:
        forms.begin()
        numbers: dict[int, PromptNumbers | str] = {}
        for number, batch in enumerate(batches):
            ids = {i: shard.rendered[i].ids for i in batch}
            numbers.update(compute_batch(fisher, ids, rank, notes))
            if number >= reported:
                report(Progress(len(ids), sum(map(len, ids.values()))))
                reported += 1
            if forms.changed():
                break
        else:
            return numbers


def compute_batch(
    fisher: FisherModel, prompts_ids: dict[int, list[int]], rank: int, notes: Notes
) -> dict[int, PromptNumbers | str]:
    """One batch, by prompt index; out of memory it is halved, and a single prompt that does not fit gets a reason."""
    members = list(prompts_ids)
    if tuple(members) not in notes.splits:
        try:
            return dict(zip(members, fisher.numbers(list(prompts_ids.values()), rank), strict=True))
        except NoFormAgrees as error:
            return dict.fromkeys(members, str(error))
        except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds on to the tensors that were in the way.
        longest = max(map(len, prompts_ids.values()))
        log.warning("out of memory on %d prompts of up to %d tokens", len(members), longest)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(members) == 1:
            return {members[0]: f"out of memory on {longest} tokens"}
        notes.split(members)
    half = (len(members) + 1) // 2
    halves = ({i: prompts_ids[i] for i in part} for part in (members[:half], members[half:]))
    return {i: numbers for part in halves for i, numbers in compute_batch(fisher, part, rank, notes).items()}


def _not_in_vocabulary(fisher: FisherModel, ids: Sequence[int]) -> str | None:
    size = fisher.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    if max(ids) < size:
        return None
    return f"the tokenizer gives token {max(ids)}, but the model knows {size}: is the tokenizer another model's?"


def _result(
    shard: PreparedShard,
    prompt: SourcePrompt,
    numbers: PromptNumbers | str | None,
    pieces: Pieces | None,
    audited: str | None,
) -> PromptResult:
    common: dict[str, Any] = {"index": prompt.index, "source_row": prompt.source_row, "kept": prompt.kept}
    if numbers is None:
        return PromptResult(**common, status="skipped", reason=shard.skipped[prompt.index])
    rendered = shard.rendered[prompt.index]
    common |= {
        "audit": audited,
        "text": rendered.text,
        "num_tokens": len(rendered.ids),
        "truncated": rendered.truncated,
    }
    if pieces is not None:
        common["prompt_tokens"] = pieces.each(rendered.ids)
    if isinstance(numbers, str):
        return PromptResult(**common, status="failed", reason=numbers)
    if reason := numbers.reason or _not_finite(numbers):
        return PromptResult(**common, status="failed", reason=reason)
    if pieces is not None:
        common["top_tokens"] = [pieces.single(int(token)) for token in numbers.token_ids]
    return PromptResult(**common, token_ids=numbers.token_ids, log_probs=numbers.log_probs, layers=numbers.layers)


def _not_finite(numbers: PromptNumbers) -> str | None:
    """What is wrong with numbers that are stored beside S, V and the log probabilities."""
    for layer, result in numbers.layers.items():
        for name in ("Q", "position_energy", "residual_norm", "trace"):
            if not np.isfinite(getattr(result, name)).all():
                return f"the {name.replace('_', ' ')} at {layer} is not finite"
    return None
