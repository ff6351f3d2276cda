"""A model without its weights, for counting: its configuration and tokenizer are read, nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from fisher_vmap.anatomy.blocks import output_of
from fisher_vmap.anatomy.recording import hooks
from fisher_vmap.config import Settings
from fisher_vmap.errors import UserError
from fisher_vmap.loading.adapters import base_of, find_adapter
from fisher_vmap.loading.loader_errors import explained, quiet_progress


class Skeleton(NamedTuple):
    """A causal LM on the meta device.

    Attributes:
        model: it.
        tokenizer: its tokenizer.
        blocks: its decoder blocks by name.
        widths: D of each hooked layer.
        hooks: for each hooked layer, the number of the block that it is or is in; -1: below all blocks.
        quantized: whether its weights are stored packed.
    """

    model: Any
    tokenizer: Any
    blocks: dict[str, nn.Module]
    widths: dict[str, int]
    hooks: list[int]
    quantized: bool

    @property
    def weight_bytes(self) -> int:
        """What the weights take in the dtype of the run."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())


def skeleton_of(settings: Settings) -> Skeleton:
    """The model that the settings name, without its weights.

    Raises:
        UserError: the model is missing or gated, or has no such layer.
    """
    path, options = settings.model_path, {"trust_remote_code": settings.trust_remote_code}
    revision = settings.model_revision
    if settings.adapter_path is None:
        with quiet_progress():
            adapter = explained(path, "adapter", find_adapter, path, revision=revision)
        if adapter is not None:
            path, revision = base_of(adapter)
    where: dict[str, Any] = {"pretrained_model_name_or_path": path, "revision": revision}
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
    with quiet_progress():
        config = explained(path, "config", transformers.AutoConfig.from_pretrained, **where, **options)
        tokenizer = explained(path, "tokenizer", transformers.AutoTokenizer.from_pretrained, **where, **options)
        packed = getattr(config, "quantization_config", None) is not None
        if packed:
            del config.quantization_config
        model = explained(path, "model", _on_meta, config, getattr(torch, settings.dtype), options)
    stack, blocks = _blocks(path, model)
    names = _layers(model, stack, blocks, settings.hook_layer_name)
    numbers = {name: i for i, name in enumerate(blocks)}
    inside = [next((i for block, i in numbers.items() if f"{name}.".startswith(f"{block}.")), -1) for name in names]
    return Skeleton(model, tokenizer, blocks, _widths(model, names), inside, packed)


def _on_meta(config: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return model.to("meta").eval()


def _blocks(path: str, model: nn.Module) -> tuple[str, dict[str, nn.Module]]:
    """The largest list of modules that is not inside an entry of another: the model itself cannot be watched here."""
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UserError(f"{path}: no list of decoder blocks was found, and --plan cannot count; run without --plan")
    stack = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
    return stack, {f"{stack}.{i}": block for i, block in enumerate(outer[stack])}


def _layers(
    model: nn.Module, stack: str, blocks: dict[str, nn.Module], wanted: int | str | Sequence[int | str]
) -> list[str]:
    """Names of modules, as `fisher_vmap.anatomy.layers.resolve_layers` gives them."""
    if wanted == "all":
        return list(blocks)
    modules, names = dict(model.named_modules()), list(blocks)
    found = []
    for entry in [wanted] if isinstance(wanted, int | str) else wanted:
        if isinstance(entry, int) and -len(names) <= entry < len(names):
            entry = names[entry]
        if entry not in modules or entry == "":
            raise UserError(f"the model has no layer {entry!r}; its {len(names)} layers are {names[0]} to {names[-1]}")
        found.append(str(entry))
    return found


def _widths(model: Any, names: Sequence[str]) -> dict[str, int]:
    """D of each hooked module, by its shapes alone; the model's own width where it cannot be run without weights."""
    width = int(model.config.get_text_config().hidden_size)
    widths = dict.fromkeys(names, width)

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output_of(output)
            if hidden is not None and hidden.dim() == 3:
                widths[name] = int(hidden.shape[-1])

        return hook

    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    with torch.no_grad(), hooks(*(model.get_submodule(name).register_forward_hook(look(name)) for name in names)):
        try:
            model(input_ids=ids, use_cache=False)
        except (RuntimeError, NotImplementedError, ValueError, TypeError):
            return dict.fromkeys(names, width)  # it asks for numbers on its way
    return widths
