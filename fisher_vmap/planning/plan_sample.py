"""What the prompts of a run are like, from some of them: their tokens, and the rows that the table has of them."""

import io
import logging
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.config import Settings
from fisher_vmap.progress import bar, passing, step
from fisher_vmap.prompts.pieces import Pieces
from fisher_vmap.prompts.sources import PromptSource, SourcePrompt
from fisher_vmap.prompts.tokens import Renderer
from fisher_vmap.running.compute import PreparedShard, prepare
from fisher_vmap.storage.records import LayerResult, PromptResult, ShardLayout
from fisher_vmap.storage.table import common_schema, in_schema, rows_table

MOST_TOKENISED = 2048  # prompts; of more, so many are taken, evenly

log = logging.getLogger(__name__)


class Sample(NamedTuple):
    """Some of a run's prompts, or all.

    Attributes:
        total: prompts of the run.
        shards: the prompts that were tokenised, in shards of the run's size.
        exact: whether these are all of them.
        first_alone: whether they are the first ones, and not spread over the data.
    """

    total: int
    shards: list[PreparedShard]
    exact: bool
    first_alone: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt that has any."""
        return [len(prompt.ids) for shard in self.shards for prompt in shard.rendered.values()]

    @property
    def tokenised(self) -> int:
        """How many prompts were looked at."""
        return sum(len(shard.prompts) for shard in self.shards)


def sample_of(settings: Settings, source: PromptSource, renderer: Renderer) -> Sample:
    """Read the prompts and tokenise as many as are needed: all of a few thousand; of more, every n-th.

    Of a data set of the hub, which is a stream, the first ones.
    """
    if source.total is None:
        stream: Iterator[SourcePrompt] = islice(iter(source), MOST_TOKENISED + 1)
        with step("reading the prompts"):
            chosen = list(stream)
        more = len(chosen) > MOST_TOKENISED
        if settings.num_prompts == "all" and more:
            with step("counting the prompts"):
                total = sum(1 for _ in source)
        else:
            total = int(settings.num_prompts) if more and settings.num_prompts != "all" else len(chosen)
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
    return Sample(total, shards, exact, source.total is None and not exact)


class TableBytes(NamedTuple):
    """Bytes of the prompts table: as the shards have it, and joined."""

    in_shards: int
    joined: int


def table_bytes(sample: Sample, layout: ShardLayout, pieces: Pieces) -> TableBytes:
    """Bytes of all of a run's rows, from those of the sample with numbers drawn at random in them."""
    rng = np.random.default_rng(0)
    tables: list[pa.Table] = []
    in_shards = 0
    for shard in sample.shards:
        results = [_made_up(shard, prompt, layout, pieces, rng) for prompt in shard.prompts]
        numbers = rng.integers(2**32, size=len(results)).tolist()
        checksums = dict.fromkeys(("crc32", *(f"{layer}/crc32" for layer in layout.layers)), numbers)
        tables.append(rows_table(results, layout, checksums))
        in_shards += _written(tables[-1])
    schema = common_schema((table.schema for table in tables), layout)
    joined = _written(pa.concat_tables([in_schema(table, schema) for table in tables]))
    scale = sample.total / max(1, sample.tokenised)
    return TableBytes(int(in_shards * scale), int(joined * scale))


def _written(table: pa.Table) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.tell()


def _made_up(
    shard: PreparedShard, prompt: SourcePrompt, layout: ShardLayout, pieces: Pieces, rng: np.random.Generator
) -> PromptResult:
    rendered = shard.rendered.get(prompt.index)
    if rendered is None:
        reason = shard.skipped[prompt.index]
        return PromptResult(
            index=prompt.index, source_row=prompt.source_row, kept=prompt.kept, status="skipped", reason=reason
        )
    K, R = layout.outcomes, layout.rank
    token_ids = rng.choice(rendered.ids, K)
    empty = np.zeros((0,), np.float32)
    # The table holds numbers made of these, all of them different: that is what counts for its size.
    layers = {
        layer: LayerResult(rng.random(R), empty, empty, float(rng.random()), empty, float(rng.random()))
        for layer in layout.layers
    }
    return PromptResult(
        index=prompt.index,
        source_row=prompt.source_row,
        text=rendered.text,
        kept=prompt.kept,
        num_tokens=len(rendered.ids),
        truncated=rendered.truncated,
        token_ids=token_ids,
        log_probs=np.log(rng.dirichlet(np.ones(K))).astype(np.float32),
        layers=layers,
        top_tokens=[pieces.single(int(token)) for token in token_ids],
        prompt_tokens=pieces.each(rendered.ids),
    )
