"""Rotary embeddings whose frequencies depend on the longest prompt of the batch: such prompts are computed alone.

"dynamic" and "longrope" scaling switch frequencies where a sequence is longer than the model was first trained on, for
the whole batch. A prompt's scores must not depend on its neighbours, so one that is longer goes by itself.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Record = TypeVar("Record", bound=NamedTuple)
SCALED_BY_LENGTH = {"dynamic", "longrope"}


def batches_apart(model: nn.Module, lengths: tuple[int, ...]) -> list[list[int]]:
    """The prompts of a batch in groups that may share a forward pass; for most models one group."""
    limit = min((_limit(module) for module in _length_dependent(model)), default=max(lengths))
    together = [b for b, length in enumerate(lengths) if length <= limit]
    return ([together] if together else []) + [[b] for b, length in enumerate(lengths) if length > limit]


def forget_lengths(model: nn.Module) -> None:
    """Give the embeddings the frequencies of training again: they keep those of the longest sequence that they saw."""
    for module in _length_dependent(model):
        for name in [n for n in (*vars(module), *module._buffers) if n.endswith("original_inv_freq")]:
            kind = name.removesuffix("original_inv_freq")
            current = getattr(module, kind + "inv_freq")
            setattr(module, kind + "inv_freq", getattr(module, name).to(current.device))
            if hasattr(module, kind + "max_seq_len_cached"):
                setattr(module, kind + "max_seq_len_cached", _limit(module))


def join_prompts(parts: list[Record], groups: list[list[int]]) -> Record:
    """The record of a batch, tensors with a row a prompt, from those of its groups, in the batch's order."""
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([b for group in groups for b in group], device="cpu").argsort()

    def joined(pieces: Any) -> Any:
        if isinstance(pieces[0], dict):
            return {layer: joined([piece[layer] for piece in pieces]) for layer in pieces[0]}
        return torch.cat(pieces)[order.to(pieces[0].device)]

    return type(parts[0])(*(joined(pieces) for pieces in zip(*parts, strict=True)))


def _length_dependent(model: nn.Module) -> list[Any]:
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kinds & SCALED_BY_LENGTH:
            found.append(module)
    return found


def _limit(module: Any) -> int:
    """The longest sequence that has the frequencies of training."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    sets = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    given = [p["original_max_position_embeddings"] for p in sets if p.get("original_max_position_embeddings")]
    return int(min(given, default=getattr(module, "original_max_seq_len", module.config.max_position_embeddings)))
