"""The completions that a run's model writes: those that are stored already, those that do not fit, and what they cost.

A completion is drawn once: where a stored shard is computed again, because the run has grown, its tokens are read.
"""

import logging
from collections.abc import Mapping, Sequence

import pyarrow.parquet as pq

from fisher_vmap.data.sequences import Tokens
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.model.validation import forget_freed, is_out_of_memory
from fisher_vmap.results.index import SHARD_FOLDER, shard_names
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.run.settings import Settings

log = logging.getLogger(__name__)

StoredIds = Mapping[int, list[list[int]]]
"""The token ids of each of a prompt's completions, by prompt index."""


def stored_completions(writer: ResultsWriter, number: int) -> StoredIds:
    """The completions in a shard that is stored intact, with fewer prompts than it has now; empty if there is none."""
    start = number * writer.index.shard_size
    if not writer.is_stored(number, start, start + 1):
        return {}
    with pq.ParquetFile(writer.folder / SHARD_FOLDER / shard_names(number)[1]) as file:
        rows = file.read(columns=["prompt_index", "completion_ids"]).to_pylist()
    return {row["prompt_index"]: row["completion_ids"] for row in rows if row["completion_ids"]}


def sequences_of(fisher: FisherModel, prompts: Mapping[int, Tokens], written: StoredIds) -> dict[int, list[Tokens]]:
    """The sequences of prompts by index, in their order; without those for whose completions there is no memory."""
    found = {i: [prompt.completed(ids) for ids in written[i]] for i, prompt in prompts.items() if i in written}
    found |= _made(fisher, {i: prompt for i, prompt in prompts.items() if i not in found})
    return {i: found[i] for i in prompts if i in found}


def _made(fisher: FisherModel, prompts: Mapping[int, Tokens]) -> dict[int, list[Tokens]]:
    try:
        return dict(zip(prompts, fisher.sequences(list(prompts.values())), strict=True))
    except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, whose traceback keeps the tensors alive.
    forget_freed()
    members = list(prompts)
    if len(members) == 1:
        return {}
    half = len(members) // 2
    parts = ({i: prompts[i] for i in part} for part in (members[:half], members[half:]))
    return {i: made for part in parts for i, made in _made(fisher, part).items()}


def tell_cost(settings: Settings, prompts: Sequence[Tokens]) -> None:
    """Say what estimator topk takes of several targets; `prompts` are the first ones of the run."""
    if settings.estimator != "topk" or settings.targets == "last" or not prompts:
        return
    if isinstance(settings.targets, int):
        most, whose = settings.targets * settings.samples, "a prompt"
    else:
        most = max(prompt.targets(settings.targets) for prompt in prompts)
        whose = f"one of the first {len(prompts)} prompts"
    log.info(
        "estimator topk pulls %d vectors for each target: up to %s for %s of %s targets; estimator full takes about "
        "the same time for any number of targets",
        settings.top_k_tokens,
        f"{settings.top_k_tokens * most:,}",
        whose,
        f"{most:,}",
    )
