"""What a run leaves, for `--plan`: the bytes of its folder by use, and the memory that finishing the folder takes."""

import io
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fisher_vmap.data.files import Extent
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.prompts import SourcePrompt
from fisher_vmap.data.render import TokenizedPrompt
from fisher_vmap.data.sequences import TargetNumbers, Tokens, completions_of, target_columns
from fisher_vmap.progress import readable
from fisher_vmap.results.index import ShardLayout
from fisher_vmap.results.means import dense_layers
from fisher_vmap.results.outputs import finish_memory, npz_size, wants_npz
from fisher_vmap.results.record import LayerResult, PromptResult
from fisher_vmap.results.shard import TensorSpec, common_schema, in_schema, rows_table, size_of, tensor_specs
from fisher_vmap.run.open import PreparedShard, layout_of
from fisher_vmap.run.plan_model import Skeleton
from fisher_vmap.run.settings import Settings

INDEX_BYTES, METADATA_BYTES = 480, 4096  # of index.json for a shard; of metadata.yaml and the rest


class Sample(NamedTuple):
    """The tokenised prompts of a run, or a sample of them.

    Attributes:
        total: prompts of the run.
        extent: which part of the data set they are.
        shards: the sample, in shards of the run's size.
        exact: whether the sample is the whole run.
        first_alone: whether it is the first prompts, not spread over the data.
    """

    total: int
    extent: Extent
    shards: list[PreparedShard]
    exact: bool
    first_alone: bool

    @property
    def prompts(self) -> list[Tokens]:
        """The prompts that have tokens, with their completion if the data has it."""
        return [Tokens(prompt.ids, prompt.start) for shard in self.shards for prompt in shard.rendered.values()]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt that has any, with those of the data's completion."""
        return [len(prompt.ids) for prompt in self.prompts]

    @property
    def tokenised(self) -> int:
        """Prompts of the sample, skipped ones included."""
        return sum(len(shard.prompts) for shard in self.shards)


class Sequences(NamedTuple):
    """What the model writes to each prompt: `samples` completions of `written` tokens; of data: 1 of 0.

    Attributes:
        written: most tokens of a completion.
        samples: S.
        targets: as in the settings.
    """

    written: int
    samples: int
    targets: str | int

    @classmethod
    def of(cls, settings: Settings) -> "Sequences":
        """Those of a run."""
        written = settings.targets if isinstance(settings.targets, int) else 0
        return cls(written, settings.samples, settings.targets)

    def lengths(self, prompt: Tokens) -> list[int]:
        """The tokens of each sequence of a prompt."""
        return [len(prompt.ids) + self.written] * self.samples

    def asked(self, prompt: Tokens) -> int:
        """The targets of each sequence of a prompt."""
        return self.written or prompt.targets(self.targets)


def table_bytes(sample: Sample, layout: ShardLayout, pieces: Pieces, sequences: Sequences) -> int:
    """Bytes of a run's tables, in the shards and joined, from the sample's rows with random numbers in them."""
    rng = np.random.default_rng(0)
    tables: list[pa.Table] = []
    in_shards = 0
    for shard in sample.shards:
        results = [_random_result(shard, prompt, layout, pieces, rng, sequences) for prompt in shard.prompts]
        numbers = rng.integers(2**32, size=len(results)).tolist()
        checksums = dict.fromkeys(("crc32", *(f"{layer}/crc32" for layer in layout.layers)), numbers)
        tables.append(rows_table(results, layout, checksums))
        in_shards += _written(tables[-1])
    schema = common_schema((table.schema for table in tables), layout)
    joined = _written(pa.concat_tables([in_schema(table, schema) for table in tables]))
    scale = sample.total / max(1, sample.tokenised)
    return int(in_shards * scale) + int(joined * scale)


def _written(table: pa.Table) -> int:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.tell()


def _random_result(
    shard: PreparedShard,
    prompt: SourcePrompt,
    layout: ShardLayout,
    pieces: Pieces,
    rng: np.random.Generator,
    sequences: Sequences,
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
    written = sequences.written if sequences.samples == 1 else 0
    T = len(rendered.ids) + written if layout.attribution else 0
    # All numbers differ, as in a real table: the compressed size depends on that.
    layers = {
        layer: LayerResult(rng.random(R), empty, empty, float(rng.random()), rng.random(T), float(rng.random()))
        for layer in layout.layers
    }
    own = rendered.ids[: rendered.start]
    return PromptResult(
        index=prompt.index,
        source_row=prompt.source_row,
        text=rendered.text,
        kept=prompt.kept,
        num_tokens=len(own),
        truncated=rendered.truncated,
        token_ids=token_ids,
        log_probs=np.log(rng.dirichlet(np.ones(K))).astype(np.float32),
        layers=layers,
        top_tokens=[pieces.single(int(token)) for token in token_ids],
        prompt_tokens=pieces.each(own),
        targets=_random_targets(rendered, layout, pieces, rng, sequences) if layout.pairs else {},
    )


def _random_targets(
    rendered: TokenizedPrompt, layout: ShardLayout, pieces: Pieces, rng: np.random.Generator, sequences: Sequences
) -> dict[str, Any]:
    """The columns of a prompt's targets and completions, with random numbers in them."""
    prompt, S = Tokens(rendered.ids, rendered.start), sequences.samples
    n, start = sequences.asked(prompt), len(prompt.ids if prompt.start is None else prompt.ids[: prompt.start])
    numbers = TargetNumbers(
        np.tile(np.arange(start - 1, start - 1 + n), S),
        np.repeat(np.arange(S), n),
        rng.random(S * n),
        rng.random(S * n),
        rng.integers(S * n, size=layout.pairs),
        {layer: rng.random(S * n).astype(np.float32) for layer in layout.layers},
        {layer: float(rng.random()) for layer in layout.layers},
    )
    own = rendered.ids[:start]
    made = [prompt]
    if sequences.written:
        made = [Tokens([*own, *rng.choice(own, n).tolist()], start) for _ in range(S)]
    written = completions_of(made, rendered, pieces)
    return target_columns(numbers) | ({} if written is None else written._asdict())


class Storage(NamedTuple):
    """Bytes of a results folder by use, and of the npz that it has or could have."""

    parts: dict[str, int]
    npz: int

    @property
    def total(self) -> int:
        """Of the finished folder."""
        return sum(self.parts.values())


def storage_of(settings: Settings, skeleton: Skeleton, sample: Sample, table: int) -> Storage:
    """Bytes of the finished folder."""
    n, size, layout = sample.total, settings.shard_size, layout_of(settings, skeleton.widths)
    full, rest = divmod(n, size)
    sequences = Sequences.of(settings)
    stored = sum(sum(sequences.lengths(prompt)[:1]) if sequences.samples == 1 else len(prompt.ids)
                 for prompt in sample.prompts)  # fmt: skip
    positions = stored / max(1, sample.tokenised)
    npz = sum(npz_size(n, layout.rank, width) for width in skeleton.widths.values())
    parts = {"tables": table, "index": INDEX_BYTES * (full + bool(rest)) + METADATA_BYTES}
    if settings.save == "mean":
        parts["sum"] = size_of(_matrices(layout, "float64")) if full else 0
        parts["shards"] = _shard_bytes(layout, rest, positions) if rest else 0
    else:
        parts["shards"] = full * _shard_bytes(layout, size, positions)
        parts["shards"] += _shard_bytes(layout, rest, positions) if rest else 0
    if settings.save != "prompts" and dense_layers(layout):
        parts["mean"] = size_of(_matrices(layout, "float32"))
    if wants_npz(settings.export_npz, settings.save, n):
        parts["npz"] = npz
    return Storage(parts, npz)


def _shard_bytes(layout: ShardLayout, prompts: int, positions: float) -> int:
    return size_of(tensor_specs(layout, prompts, round(prompts * positions)))


def _matrices(layout: ShardLayout, dtype: str) -> dict[str, TensorSpec]:
    return {layer: TensorSpec(dtype, (D, D)) for layer, D in dense_layers(layout).items()}


def finishing(settings: Settings, skeleton: Skeleton, prompts: int) -> str:
    """What the end of the run takes in memory, and which layers have no mean."""
    layout = layout_of(settings, skeleton.widths)
    npz = wants_npz(settings.export_npz, settings.save, prompts)
    parts = finish_memory(layout, settings.shard_size, prompts, settings.save, npz)
    shown = ", ".join(f"the {name} {readable(size)}" for name, size in parts.items()) or "no mean and no npz"
    wide = [layer for layer in layout.widths if layer not in dense_layers(layout)]
    without = f"; {wide[0]} is too wide for a mean" if wide and settings.save != "prompts" else ""
    return f"finishing, one file after another: {shown}{without}"
