"""Rotary embeddings whose frequencies depend on the longest prompt of the batch.

"dynamic" and "longrope" scaling switch them for the whole batch if a sequence is longer than in the model's original
training. A prompt's scores must not depend on the rest of its batch, so such a prompt is computed alone.
"""

from typing import Any

from torch import nn

SCALED_BY_LENGTH = {"dynamic", "longrope"}


def batches_apart(model: nn.Module, lengths: tuple[int, ...]) -> list[list[int]]:
    """The prompts of a batch in groups that may share a forward pass; for most models a single group."""
    limit = min((_limit(module) for module in _length_dependent(model)), default=max(lengths))
    together = [b for b, length in enumerate(lengths) if length <= limit]
    return ([together] if together else []) + [[b] for b, length in enumerate(lengths) if length > limit]


def forget_lengths(model: nn.Module) -> None:
    """Reset rotary embeddings to the frequencies of training; they keep those of the longest sequence seen."""
    for module in _length_dependent(model):
        for name in [n for n in (*vars(module), *module._buffers) if n.endswith("original_inv_freq")]:
            kind = name.removesuffix("original_inv_freq")
            current = getattr(module, kind + "inv_freq")
            setattr(module, kind + "inv_freq", getattr(module, name).to(current.device))
            if hasattr(module, kind + "max_seq_len_cached"):
                setattr(module, kind + "max_seq_len_cached", _limit(module))


def _length_dependent(model: nn.Module) -> list[Any]:
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if kinds & SCALED_BY_LENGTH:
            found.append(module)
    return found


def _limit(module: Any) -> int:
    """The longest sequence that uses the frequencies of training."""
    parameters = getattr(module.config, "rope_parameters", None) or {}
    sets = [parameters, *(p for p in parameters.values() if isinstance(p, dict))]
    given = [p["original_max_position_embeddings"] for p in sets if p.get("original_max_position_embeddings")]
    return int(min(given, default=getattr(module, "original_max_seq_len", module.config.max_position_embeddings)))
