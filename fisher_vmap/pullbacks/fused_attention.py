"""Which attention modules get the derivatives of `rotary_attention`, for packed prompts.

A module is taken for a rotary attention only if, on the run's own tokens, it returns what the formula does.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.placement import weights_ready
from fisher_vmap.anatomy.recording import hooks
from fisher_vmap.pullbacks.attention_interface import packed_now
from fisher_vmap.pullbacks.quantized import has_matrix, runs_as_made
from fisher_vmap.pullbacks.rotary_attention import AttentionParts, RotaryCall, rotary_attention

Forwards = dict[nn.Module, Callable[..., Any]]


def parts_of(module: nn.Module) -> AttentionParts | None:
    """The parts of a module that may be a rotary attention; None where they are not all there, or there are more."""
    q, k, v, o = (getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    head = getattr(module, "head_dim", None)
    if not all(has_matrix(part) and runs_as_made(part) for part in (q, k, v, o)) or not isinstance(head, int):
        return None
    if len(list(module.children())) != 4 or "forward" in vars(module):
        return None  # norms of queries and keys, gates, sinks
    assert (
        isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    )
    return AttentionParts(q, k, v, o, head)


def attention_scale(module: nn.Module) -> float | None:
    """What a module multiplies the scores of its attention with, by its own word; None where it has none."""
    scale = getattr(module, "scaling", None)
    return scale if isinstance(scale, float) else None


def rotary_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], head: int) -> RotaryCall | None:
    """The call of an attention module or of a block, taken apart; None where it is given anything more that matters.

    Args:
        args: the residual stream, unless that is `hidden_states` among the keyword arguments.
        kwargs: `position_embeddings`, the pair of cos and sin; no mask, no cache.
        head: the width E of a head.
    """
    packed, rotary = packed_now(), kwargs.get("position_embeddings")
    x = args[0] if args else kwargs.get("hidden_states")
    if packed is None or rotary is None or len(rotary) != 2 or len(args) > 1 or not isinstance(x, Tensor):
        return None
    if any(not isinstance(t, Tensor) or t.shape != (1, x.shape[1], head) for t in rotary):
        return None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    cos, sin = rotary
    return RotaryCall(x, cos, sin, packed)


def fused_attention_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention module with the fused pullback for packed prompts; None for other modules."""
    parts, scale = parts_of(module), attention_scale(module)
    if parts is None or scale is None:
        return None
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = rotary_call(args, kwargs, parts.head)
        return own(*args, **kwargs) if call is None else (rotary_attention(call, parts, scale), None)

    return forward


def proven_attentions(forwards: Forwards, run: Callable[[], object]) -> Forwards:
    """Those of the forwards that give what their modules do, to rounding, on what these see while the model runs."""
    right: Forwards = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("attention_mask") is not None:
            return
        with weights_ready(module):
            expected, found = output[0], forwards[module](*args, **kwargs)[0]
        if (found - expected).norm() <= 4 * torch.finfo(expected.dtype).eps * expected.norm():
            right[module] = forwards[module]

    with hooks(*(module.register_forward_hook(compare, with_kwargs=True) for module in forwards)):
        run()
    return right
