"""What the package needs to know of a model's shape: its decoder blocks, by structure and not by name.

A block takes the residual stream as its first positional argument or as `hidden_states`, and returns it as a tensor or
as the first entry of a tuple.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in their order: the largest `ModuleList` that is not inside another one's entry.

    Raises:
        ValueError: the model has no list of modules.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outermost = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists)}
    if not outermost:
        raise ValueError(
            f"{type(model).__name__} has no ModuleList of decoder blocks; expected a decoder-only causal LM"
        )
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in outermost.items()}
    name = max(sizes, key=lambda n: sizes[n])
    return {f"{name}.{i}": block for i, block in enumerate(outermost[name])}


def resolve_layers(model: nn.Module, wanted: str | int | Sequence[str | int]) -> list[str]:
    """Names of modules for what the user wrote: a name, a number (negative from the top), a list of these, or "all".

    Raises:
        ValueError: a name or number that the model does not have (the message names the nearest), or one given twice.
    """
    blocks = decoder_blocks(model)
    names = list(blocks)
    if wanted == "all":
        return names
    modules = dict(model.named_modules())
    resolved: list[str] = []
    for entry in [wanted] if isinstance(wanted, str | int) else wanted:
        if isinstance(entry, str) and entry.lstrip("-").isdigit():
            entry = int(entry)
        if isinstance(entry, int):
            if not -len(names) <= entry < len(names):
                raise ValueError(
                    f"layer {entry} was asked for; this model has layers 0 to {len(names) - 1} ({names[0]} ...)"
                )
            entry = names[entry]
        if entry not in modules or entry == "":
            nearest = difflib.get_close_matches(entry, modules, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"the model has no module named {entry!r}; the nearest is {nearest!r}, "
                f"and its {len(names)} layers are {names[0]} to {names[-1]}"
            )
        if entry in resolved:
            raise ValueError(f"layer {entry!r} was given twice; give each layer once")
        resolved.append(entry)
    if not resolved:
        raise ValueError("no layer was given; expected at least one name, number, or 'all'")
    return resolved


def output_embedding(model: Any) -> nn.Module | None:
    """The module that makes the logits, by the model's own word; None where it has none."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module if isinstance(module, nn.Module) else None


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's inputs."""
    candidate = args[0] if args else kwargs.get("hidden_states")
    return candidate if isinstance(candidate, Tensor) else None


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs with another residual stream."""
    return ((x, *args[1:]), dict(kwargs)) if args else (args, {**kwargs, "hidden_states": x})


def output_of(output: Any) -> Tensor | None:
    """The residual stream in a module's output: the tensor itself or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def with_output(output: Any, x: Tensor) -> Any:
    """The same output with another residual stream."""
    return x if isinstance(output, Tensor) else type(output)([x, *output[1:]])
