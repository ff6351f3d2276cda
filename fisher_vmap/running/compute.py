"""One shard's prompts: to tokens, to batches, to numbers, and back into their order with what went wrong."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.prompts.batches import pack
from fisher_vmap.prompts.conversations import SkippedPrompt
from fisher_vmap.prompts.pieces import Pieces
from fisher_vmap.prompts.prompt_numbers import PromptNumbers
from fisher_vmap.prompts.sources import SourcePrompt
from fisher_vmap.prompts.tokens import Renderer, TokenizedPrompt
from fisher_vmap.proofs.audit import ShardForms
from fisher_vmap.proofs.choice import NoFormAgrees
from fisher_vmap.running.progress import Progress
from fisher_vmap.storage.records import PromptResult

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
