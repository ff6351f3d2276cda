"""A model without its weights: its layers and the memory of a batch, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import nn

from fisher_vmap.errors import UserError
from fisher_vmap.linearize.blockwise import pull_memory, widths_of
from fisher_vmap.load.adapters import base_of, find_adapter
from fisher_vmap.load.source import explained, quiet_progress
from fisher_vmap.model.layers import block_numbers
from fisher_vmap.model.recording import hooks, output_of

if TYPE_CHECKING:
    from fisher_vmap.run.settings import Settings


class Skeleton(NamedTuple):
    """A causal LM on the meta device.

    Attributes:
        model: the model.
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
    with quiet_progress():
        if settings.adapter_path is None:
            adapter = explained(path, "adapter", find_adapter, path, revision=revision)
            path, revision = (path, revision) if adapter is None else base_of(adapter)
        where: dict[str, Any] = {"pretrained_model_name_or_path": path, "revision": revision}
        if Path(path).suffix == ".gguf" and Path(path).is_file():
            where = {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}
        config = explained(path, "config", transformers.AutoConfig.from_pretrained, **where, **options)
        tokenizer = explained(path, "tokenizer", transformers.AutoTokenizer.from_pretrained, **where, **options)
        packed = getattr(config, "quantization_config", None) is not None
        if packed:
            del config.quantization_config
        with torch.device("meta"):
            load = transformers.AutoModelForCausalLM.from_config
            model = explained(path, "model", load, config, dtype=getattr(torch, settings.dtype), **options)
        model = model.to("meta").eval()
    blocks = _blocks(path, model)
    names = _layers(model, blocks, settings.hook_layer_name)
    return Skeleton(model, tokenizer, blocks, _widths(model, names), block_numbers(blocks, names), packed)


def _blocks(path: str, model: nn.Module) -> dict[str, nn.Module]:
    """The largest list of modules that is not inside another list.

    `model.layers` finds the blocks by watching a forward pass, which needs weights.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UserError(f"{path}: no list of decoder blocks was found, and --plan cannot count; run without --plan")
    stack = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
    return {f"{stack}.{i}": block for i, block in enumerate(outer[stack])}


def _layers(model: nn.Module, blocks: dict[str, nn.Module], wanted: int | str | tuple[int | str, ...]) -> list[str]:
    """Names of modules, as `fisher_vmap.model.layers.resolve_layers` gives them for a model with weights."""
    if wanted == "all":
        return list(blocks)
    modules, names = dict(model.named_modules()), list(blocks)
    found = []
    for entry in wanted if isinstance(wanted, tuple) else [wanted]:
        if isinstance(entry, int) and -len(names) <= entry < len(names):
            entry = names[entry]
        if entry not in modules or entry == "":
            raise UserError(f"the model has no layer {entry!r}; its {len(names)} layers are {names[0]} to {names[-1]}")
        found.append(str(entry))
    return found


def _widths(model: Any, names: Sequence[str]) -> dict[str, int]:
    """D of each hooked module from its output's shape; the model's width if it cannot run without weights."""
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
        except (RuntimeError, NotImplementedError, ValueError, TypeError):  # it reads numbers in its forward pass
            return dict.fromkeys(names, width)
    return widths


class BatchMemory(NamedTuple):
    """The bytes of a batch at its peak, by use: those of `pull_memory`."""

    prompts: int
    tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def batch_memory(
    skeleton: Skeleton,
    lengths: Sequence[int],
    cotangents: int,
    itemsize: int,
    device: torch.device,
    chunk_size: int | None = None,
) -> BatchMemory:
    """The memory of a batch of prompts, besides the weights.

    Args:
        skeleton: of the model.
        lengths: tokens of each prompt.
        cotangents: K, the vectors that are pulled back together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on.
        chunk_size: how many vectors pass through a block at a time; None: as a run chooses.
    """
    D = int(skeleton.model.config.get_text_config().hidden_size)
    V = int(skeleton.model.config.get_text_config().vocab_size)
    above = len(skeleton.blocks) - 1 - min(skeleton.hooks)
    widths = widths_of(skeleton.model, skeleton.blocks.values(), D, V, above, len(skeleton.widths))
    return BatchMemory(
        len(lengths), sum(lengths), pull_memory(widths, lengths, cotangents, itemsize, device, chunk_size)
    )
