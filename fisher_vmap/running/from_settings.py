"""What the settings name, made: the prompts, the model, its hooked layers, the renderer, the layout of shards."""

import logging
from pathlib import Path

from fisher_vmap.anatomy.position_table import most_positions
from fisher_vmap.config import Settings
from fisher_vmap.errors import UserError
from fisher_vmap.fisher_model import TRACE_SAMPLES, FisherModel
from fisher_vmap.models import Loaded, load_model
from fisher_vmap.prompts.batches import batch_tokens_for
from fisher_vmap.prompts.sources import PromptSource, read_prompts
from fisher_vmap.prompts.tokens import Renderer
from fisher_vmap.storage.index import stored_precision
from fisher_vmap.storage.records import ShardLayout

log = logging.getLogger(__name__)


def source_of(settings: Settings) -> PromptSource:
    """The prompts that the settings name; errors as `read_prompts`."""
    return read_prompts(
        settings.dataset_name,
        dataset_config=settings.dataset_config,
        dataset_split=settings.dataset_split,
        dataset_revision=settings.dataset_revision,
        num_prompts=settings.num_prompts,
        offset=settings.offset,
        shuffle_seed=settings.shuffle_seed,
        prompt_column=settings.prompt_column,
        keep_columns=settings.keep_columns,
        conversation=settings.conversation,
    )


def model_of(settings: Settings) -> Loaded:
    """The model that the settings name, in the precision of the run that its folder holds; errors as `load_model`.

    What the folder has is no reason to refuse here: that is for `open_run`, which compares all of it.
    """
    precision: str = settings.precision
    if precision == "auto" and not settings.overwrite and (stored := stored_precision(Path(settings.output_dir))):
        log.info("precision: %s, as in %s", stored, settings.output_dir)
        precision = stored
    return load_model(
        settings.model_path,
        revision=settings.model_revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        max_memory=settings.max_memory,
        adapter_path=settings.adapter_path,
        adapter_revision=settings.adapter_revision,
        dequantize=settings.dequantize,
        precision=precision,
    )


def layout_of(settings: Settings, widths: dict[str, int]) -> ShardLayout:
    """What the shards of a run with hooked layers of these widths hold."""
    return ShardLayout(
        widths=widths,
        top_k=settings.top_k_tokens,
        include_rest=settings.include_rest,
        rank=settings.num_singular_values,
        vectors_dtype=settings.vectors_dtype,
        store_text=settings.store_text,
        keep_columns=tuple(settings.keep_columns or ()),
        means_only=settings.save == "mean",
    )


def check_save(settings: Settings) -> None:
    """Raise UserError where the files that are asked for cannot all be made."""
    if settings.save == "mean" and settings.export_npz is True:
        raise UserError("export_npz is true, but save: mean keeps no prompt's matrix; leave one of the two out")


def open_model(settings: Settings, loaded: Loaded) -> FisherModel:
    """The model with the settings' layers and estimator.

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
            max_batch_tokens=_batch_tokens(settings, loaded),
            estimator=settings.estimator,
            include_rest=settings.include_rest,
            oversampling=settings.oversampling,
            passes=settings.passes,
            trace_samples=None if settings.trace_samples == "auto" else settings.trace_samples,
            precision=loaded.precision.name,
            audit=settings.audit,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    least = min(fisher.widths.values())
    if settings.num_singular_values > least:
        raise UserError(
            f"num_singular_values is {settings.num_singular_values}, but a matrix of width {least} has no more than "
            f"that (and estimator topk at most top_k_tokens, {settings.top_k_tokens}, that are not zero); lower it"
        )
    return fisher


def _batch_tokens(settings: Settings, loaded: Loaded) -> int | None:
    """The limit that the settings name, or the one for as many vectors as estimator full takes; None: by top_k."""
    if settings.max_batch_tokens != "auto":
        return settings.max_batch_tokens
    if settings.estimator == "topk":
        return None
    samples = TRACE_SAMPLES if settings.trace_samples == "auto" else settings.trace_samples
    vectors = settings.num_singular_values + settings.oversampling + samples
    return batch_tokens_for(loaded.model, next(loaded.model.parameters()).device, vectors)


def make_renderer(settings: Settings, loaded: Loaded, source: PromptSource, date: str | None) -> Renderer:
    """The renderer of a run; `date` is what its template was told, None: today's."""
    max_length, limit = settings.max_length, most_positions(loaded.model)
    if limit is not None and limit < max_length:
        log.info("max_length is %d, but this model has %d positions: that is the most here", max_length, limit)
        max_length = limit
    return Renderer(
        loaded.tokenizer,
        max_length=max_length,
        chat_template=settings.chat_template,
        column=source.column,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
        date=date,
    )
