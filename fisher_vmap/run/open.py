"""Open what a run needs: prompts, model, renderer and results folder, with all checks before anything is written."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fisher_vmap.completions import Completions
from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.prompts import PromptSource, ShardPrompts, SourcePrompt, read_prompts
from fisher_vmap.data.render import Renderer, TokenizedPrompt
from fisher_vmap.data.sequences import Tokens
from fisher_vmap.errors import UserError
from fisher_vmap.fisher_model import PAIRS_A_TOKEN, FisherModel
from fisher_vmap.load.model import Loaded, load_model
from fisher_vmap.load.options import LoadOptions
from fisher_vmap.model.validation import most_positions
from fisher_vmap.progress import step
from fisher_vmap.results.folder import inspect_folder
from fisher_vmap.results.index import ShardLayout, stored_precision
from fisher_vmap.results.local_paths import RECORD, found_here
from fisher_vmap.results.means import check_means_only
from fisher_vmap.results.writer import ResultsWriter
from fisher_vmap.run.fingerprint import fingerprint
from fisher_vmap.run.proof import compare_forms, excerpts_of, prove
from fisher_vmap.run.settings import Settings
from fisher_vmap.run.written import stored_completions, tell_cost

log = logging.getLogger(__name__)


def source_of(settings: Settings) -> PromptSource:
    """The prompts of the settings.

    Raises:
        UserError: as `read_prompts`, or a column of completions without use.
    """
    if settings.completion_column is not None and settings.targets != "completion":
        raise UserError(
            f"completion_column is for targets: completion, and targets is {settings.targets}; set targets, or leave "
            "completion_column out"
        )
    return read_prompts(
        settings.dataset_name,
        dataset_config=settings.dataset_config,
        dataset_split=settings.dataset_split,
        dataset_revision=settings.dataset_revision,
        num_prompts=settings.num_prompts,
        offset=settings.offset,
        shuffle_seed=settings.shuffle_seed,
        prompt_column=settings.prompt_column,
        prompt_template=settings.prompt_template,
        keep_columns=settings.keep_columns,
        conversation=settings.conversation,
        completions=settings.targets == "completion",
        completion_column=settings.completion_column,
    )


def loading_of(settings: Settings) -> dict[str, Any]:
    """The arguments of `load_model` and `LoadOptions` that settings hold."""
    same = {field.name for field in fields(LoadOptions)} & set(Settings.model_fields)
    return {name: getattr(settings, name) for name in same} | {"revision": settings.model_revision}


def model_of(settings: Settings) -> Loaded:
    """Load the model of the settings; errors as `load_model`.

    With precision auto, a resumed run keeps the precision of its folder.
    """
    precision: str = settings.precision
    if precision == "auto" and not settings.overwrite and (stored := stored_precision(Path(settings.output_dir))):
        log.info("precision: %s, as in %s", stored, settings.output_dir)
        precision = stored
    return load_model(settings.model_path, **loading_of(settings) | {"precision": precision})


def layout_of(settings: Settings, widths: dict[str, int]) -> ShardLayout:
    """The contents of a run's shards, for hooked layers of these widths."""
    return ShardLayout(
        widths=widths,
        top_k=settings.top_k_tokens,
        include_rest=settings.include_rest,
        pairs=PAIRS_A_TOKEN * settings.top_k_tokens if settings.targets != "last" else 0,
        rank=settings.num_singular_values,
        vectors_dtype=settings.vectors_dtype,
        store_text=settings.store_text,
        keep_columns=tuple(settings.keep_columns or ()),
        means_only=settings.save == "mean",
        attribution=settings.save != "mean",  # as long as the prompt: most of the disk where only means are kept
        median_norm=True,
    )


def check_save(settings: Settings) -> None:
    """Raise UserError if the settings ask for files that exclude each other."""
    if settings.save == "mean" and settings.export_npz is True:
        raise UserError("export_npz is true, but save: mean keeps no prompt's matrix; leave one of the two out")


def open_model(settings: Settings, loaded: Loaded, renderer: Renderer | None = None) -> FisherModel:
    """The model with the settings' layers and estimator; with a renderer it takes texts as the run does.

    Raises:
        UserError: settings do not fit the model.
    """
    try:
        fisher = FisherModel(
            loaded.model,
            loaded.tokenizer,
            layers=settings.hook_layer_name,
            top_k=settings.top_k_tokens,
            positions=settings.bias_positions,
            kernel=settings.kernel,
            chunk_size=None if settings.cotangent_chunk == "auto" else settings.cotangent_chunk,
            batch_size=None if settings.batch_size == "auto" else settings.batch_size,
            max_batch_tokens=None if settings.max_batch_tokens == "auto" else settings.max_batch_tokens,
            estimator=settings.estimator,
            include_rest=settings.include_rest,
            oversampling=settings.oversampling,
            passes=settings.passes,
            trace_samples=None if settings.trace_samples == "auto" else settings.trace_samples,
            score_samples=settings.score_samples,
            targets=settings.targets,
            samples=settings.samples,
            temperature=settings.temperature,
            seed=settings.completion_seed,
            precision=loaded.precision.name,
            audit=settings.audit,
            renderer=renderer,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if settings.max_batch_tokens == "auto" and settings.estimator == "full":
        fisher.max_batch_tokens = fisher.batch_tokens(settings.num_singular_values)
    least = min(fisher.widths.values())
    if settings.num_singular_values > least:
        raise UserError(
            f"num_singular_values is {settings.num_singular_values}, but a matrix of width {least} has no more than "
            f"that (and estimator topk at most top_k_tokens, {settings.top_k_tokens}, that are not zero); lower it"
        )
    return fisher


def make_renderer(settings: Settings, loaded: Loaded, source: PromptSource | None, date: str | None) -> Renderer:
    """The renderer of a run; source None: of texts of no data set. `date` is for its chat template, None: today's."""
    if settings.prefill and settings.targets == "completion":
        raise UserError("prefill is the start of an answer, and targets: completion reads whole ones; leave one out")
    max_length, limit = settings.max_length, most_positions(loaded.model)
    beside, advice = "", "raise max_length"
    if isinstance(settings.targets, int) and limit is not None:
        try:
            limit = Completions(settings.targets).room(limit)
        except ValueError as error:
            raise UserError(str(error)) from error
        beside = f" for a prompt, beside the {settings.targets} tokens to write"
    if limit is not None and limit < max_length:
        line = "max_length is %d, but this model has %d positions%s: that is the most here"
        log.info(line, max_length, limit, beside)
        max_length, advice = limit, "lower targets" if beside else advice
    return Renderer(
        loaded.tokenizer,
        max_length=max_length,
        chat_template=settings.chat_template,
        column=None if source is None else source.column,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
        date=date,
        chat_template_file=settings.chat_template_file,
        chat_template_kwargs=settings.chat_template_kwargs,
        system_turns=settings.system_turns,
        special_tokens_in_text=settings.special_tokens_in_text,
        advice=advice,
    )


class PreparedShard(NamedTuple):
    """A shard's prompts before they are computed, by prompt index."""

    number: int
    prompts: Sequence[SourcePrompt]
    rendered: dict[int, TokenizedPrompt]
    """The prompts that became tokens."""
    skipped: dict[int, str]
    """Why the others did not."""
    written: Mapping[int, list[list[int]]] = {}
    """The completions that the model has written before, as token ids: a shard that was stored has grown."""


def prepare(renderer: Renderer, number: int, prompts: Sequence[SourcePrompt]) -> PreparedShard:
    """Render and tokenise the prompts of a shard."""
    shard = PreparedShard(number, prompts, {}, {})
    for prompt in prompts:
        try:
            if prompt.skipped is not None or prompt.messages_or_text is None:
                raise SkippedPrompt(prompt.skipped or "no prompt")
            shard.rendered[prompt.index] = renderer.render(prompt.messages_or_text, prompt.completion)
        except SkippedPrompt as skip:
            shard.skipped[prompt.index] = str(skip)
    return shard


def with_unknown_tokens(fisher: FisherModel, shard: PreparedShard) -> dict[int, str]:
    """The prompts of a shard with tokens that the model does not know: index -> why they fail."""
    size = fisher.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return {
        i: f"the tokenizer gives token {max(prompt.ids)}, but the model knows {size}: is the tokenizer another model's?"
        for i, prompt in shard.rendered.items()
        if max(prompt.ids) >= size
    }


@dataclass
class Notes:
    """What a run learns on the way and keeps in its folder, for resumed runs.

    Prompts computed in another batch differ in their last bits, so a resumed run must split the same batches.

    Attributes:
        splits: the batches that ran out of memory and were halved, as prompt indices.
        store: takes the name of a list and an item for it.
    """

    splits: set[tuple[int, ...]] = field(default_factory=set)
    store: Callable[[str, list[Any]], None] = lambda name, item: None

    def split(self, members: Sequence[int]) -> None:
        """Remember a batch that ran out of memory."""
        self.splits.add(tuple(members))
        self.store("splits", list(members))


class Run(NamedTuple):
    """An opened run."""

    settings: Settings
    fisher: FisherModel
    writer: ResultsWriter
    prompts: ShardPrompts
    renderer: Renderer
    notes: Notes

    def prepared(self, numbers: Iterator[int]) -> Iterator[PreparedShard]:
        """The shards of these numbers up to the end of the data; stored ones without rendered prompts."""
        for number in numbers:
            prompts = self.prompts.of(number)
            if not prompts:
                return
            if self.writer.is_stored(number, prompts[0].index, prompts[-1].index + 1):
                yield PreparedShard(number, prompts, {}, {})
            else:
                shard = prepare(self.renderer, number, prompts)
                writes = isinstance(self.settings.targets, int)
                yield shard._replace(written=stored_completions(self.writer, number)) if writes else shard


def open_run(settings: Settings, loaded: Loaded, source: PromptSource, *, device_share: float = 1.0) -> Run:
    """Open a run: find the layers, prove the kernel and compare the folder, then write index.json.

    Automatic choices come from the folder if it has them, else they are stored there. So they are the same for a
    resumed run and for all processes that fill the folder together.

    Args:
        settings: of the run.
        loaded: the model and its tokenizer.
        source: the prompts.
        device_share: the part of its device's memory that this process may use.

    Raises:
        UserError: settings do not fit the model, the data or the folder.
    """
    check_save(settings)
    with step("finding the layers"):
        fisher = open_model(settings, loaded)
    check_means_only(layout_of(settings, fisher.widths))
    if settings.max_batch_tokens == "auto" and device_share < 1:
        fisher.max_batch_tokens = max(256, int(device_share * fisher.max_batch_tokens))
    marks = fingerprint(settings, loaded, source, fisher)
    found = inspect_folder(Path(settings.output_dir), marks, settings.overwrite)
    stored = (found.resolved or {}) if found else {}
    _set_threads(stored.get("threads", torch.get_num_threads()))
    renderer = make_renderer(settings, loaded, source, stored.get("template_date"))

    prompts = ShardPrompts(source, settings.shard_size)
    with step("reading the first prompts"):
        first_shard = prepare(renderer, 0, prompts.of(0))
    tell_cost(settings, [Tokens(prompt.ids, prompt.start) for prompt in first_shard.rendered.values()])
    excerpts = excerpts_of(settings, fisher, list(first_shard.rendered.values()), renderer)
    with step("proving the kernel"):
        forms = prove(fisher, excerpts)
    compare_forms(settings.output_dir, stored.get("forms"), forms)
    local_paths = found_here(settings.model_dump())
    writer = ResultsWriter.open(
        settings.output_dir,
        layout=layout_of(settings, fisher.widths),
        shard_size=settings.shard_size,
        fingerprint=marks,
        resolved={
            "max_batch_tokens": fisher.max_batch_tokens,
            "template_date": renderer.template_date,
            "device": str(fisher.device),
            "model_type": getattr(loaded.model.config, "model_type", None),
            "threads": torch.get_num_threads(),
            "forms": forms,
            "precision": loaded.precision.stored(),
            "data_rows": stored.get("data_rows") if found else source.extent().stored(),
            RECORD: local_paths,
        },
        settings=settings.model_dump(),
        overwrite=settings.overwrite,
    )
    resolved = writer.resolved or {}
    if not set(local_paths) <= set(resolved.get(RECORD, [])):  # a resumed run, of files that lie elsewhere now
        writer.note(RECORD, local_paths)
    # Another process may have opened the run in the meantime: its choices hold.
    compare_forms(settings.output_dir, resolved.get("forms"), forms)
    fisher.max_batch_tokens = resolved["max_batch_tokens"]
    _set_threads(resolved.get("threads", torch.get_num_threads()))
    if resolved.get("template_date") != renderer.template_date:
        renderer = make_renderer(settings, loaded, source, resolved.get("template_date"))
    known = {tuple(batch) for batch in resolved.get("splits", [])}
    notes = Notes(known, lambda name, item: writer.note(name, [item]))
    return Run(settings, fisher, writer, prompts, renderer, notes)


def _set_threads(threads: int) -> None:
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)  # sums split over threads differ in their last bits
