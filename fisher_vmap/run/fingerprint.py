"""What the results of a run depend on, by which a folder is compared with the run that would go on in it."""

from typing import Any

from fisher_vmap.data.chat_template import content_mark
from fisher_vmap.data.prompts import PromptSource
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.load.model import Loaded
from fisher_vmap.load.options import kwargs_of_results
from fisher_vmap.run.settings import Settings

# Settings that do not change a prompt's results.
NOT_IN_FINGERPRINT = {
    *("model_path", "model_revision", "adapter_path", "adapter_revision", "trust_remote_code", "dequantize"),
    *("device", "device_map", "max_memory", "dataset_name", "dataset_revision"),
    *("num_prompts", "hook_layer_name", "output_dir", "overwrite", "export_npz", "strict", "shard_size"),
    *("vectors_dtype", "store_text", "keep_columns", "save"),  # part of the layout, which is compared as well
    *("prompt_column", "completion_column"),  # the columns that they led to are in the fingerprint
    "chat_template_file",  # its content is in the fingerprint
    *("engine", "ray_address", "ray_workers", "ray_gpus_per_worker", "ray_cpus_per_worker"),
}
# Settings that came later: at their defaults they are left out, so that folders from before are still resumed.
LATER = {
    *("prompt_template", "system_turns", "chat_template_kwargs", "special_tokens_in_text"),
    *("attn_implementation", "quantization", "model_kwargs"),
    *("targets", "samples", "temperature", "completion_seed", "score_samples"),
}


def fingerprint(settings: Settings, loaded: Loaded, source: PromptSource, fisher: FisherModel) -> dict[str, Any]:
    """Everything that a prompt's results depend on: settings, and what they led to."""
    later = {name for name in LATER if getattr(settings, name) == Settings.model_fields[name].default}
    left_out = NOT_IN_FINGERPRINT | later
    chosen = {name: value for name, value in settings.model_dump().items() if name not in left_out}
    if settings.chat_template_file is not None:
        chosen["chat_template_file"] = content_mark(settings.chat_template_file)
    if source.completions is not None:
        chosen["completions"] = source.completions
    chosen.pop("model_kwargs", None)
    if (overrides := kwargs_of_results(settings.model_kwargs)) is not None:
        chosen["model_kwargs"] = overrides
    return chosen | {
        "model": loaded.identity,
        "layers": fisher.layers,
        "data": source.fingerprint,
        "column": source.column,
        "device_type": fisher.device.type,
        "precision": fisher.precision,
    }
