"""What the package needs to know of a model's modules, by structure and not by name.

A block takes the residual stream as its first positional argument or as `hidden_states` (or as the first argument that
can be one), and returns it as a tensor or as the first entry of a tuple.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def output_embedding(model: Any) -> nn.Module | None:
    """The module that makes the logits, by the model's own word; None where it has none."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module if isinstance(module, nn.Module) else None


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's inputs."""
    place = _place_of_hidden(args, kwargs)
    return None if place is None else args[place] if isinstance(place, int) else kwargs[place]


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs with another residual stream."""
    place = _place_of_hidden(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), dict(kwargs)
    return (args, {**kwargs, place: x}) if place is not None else (args, dict(kwargs))


def _place_of_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the residual stream is: the first argument, or `hidden_states`, or the first that can be one at all."""
    if args and _may_be_hidden(args[0]):
        return 0
    if _may_be_hidden(kwargs.get("hidden_states")):
        return "hidden_states"
    by_position: list[tuple[int | str, Any]] = list(enumerate(args))
    return next((place for place, value in [*by_position, *kwargs.items()] if _may_be_hidden(value)), None)


def _may_be_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def output_of(output: Any) -> Tensor | None:
    """The residual stream in a module's output: the tensor itself or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def with_output(output: Any, x: Tensor) -> Any:
    """The same output with another residual stream."""
    if isinstance(output, Tensor):
        return x
    if hasattr(output, "_fields"):  # a named tuple takes its entries one by one
        return type(output)(x, *output[1:])
    return type(output)([x, *output[1:]])


def forward_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> dict[str, Any]:
    """What a forward of the model is called with: tokens, no cache, and position ids where they are not its own.

    With an attention mask a prompt's positions count from its first real token, as in `generate`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids}
    taken = inspect.signature(model.forward).parameters
    if "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        inputs["use_cache"] = False
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        if "position_ids" in taken and bool((attention_mask == 0).any()):
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs if position_ids is None else inputs | {"position_ids": position_ids}
