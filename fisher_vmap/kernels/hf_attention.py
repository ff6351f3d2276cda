"""Makes transformers' models call our attention during a computation, and tells it which prompts are packed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_vmap.kernels.attention import AttentionKind, attention
from fisher_vmap.model.layout import Group, Layout, group_prompts

NAME = "fisher_vmap"


@dataclass(frozen=True)
class Packed:
    """The packed prompts: their rows [start, stop), and their groups for attention."""

    ranges: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]

    def groups_on(self, device: torch.device) -> tuple[Group, ...]:
        """The groups with their rows on the device of the queries, since blocks may be on several devices."""
        return tuple(group.on(device) for group in self.groups)


class AttentionCall(NamedTuple):
    """One call of our attention: the module that made it, q [1, H, N, E], k and v [1, G, N, E], and its settings."""

    module: torch.nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    kind: AttentionKind
    sinks: Tensor | None = None


_EXCHANGING: list[int] = []  # the threads inside `attention_set_to`, once for each time they entered it
_PACKED: ContextVar[Packed | None] = ContextVar("packed prompts", default=None)
_CAPTURING: ContextVar[bool] = ContextVar("keys are captured", default=False)
_KEYS: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("keys and values of all positions", default=None)
_NOTE: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("what is told of attention calls", default=None)
_ODD_MASKS: ContextVar[list[str] | None] = ContextVar("masks that are more than causal", default=None)


class UnsupportedAttention(Exception):
    """The model needs a feature that our attention does not have (sinks, soft-caps, learned position biases)."""


def _attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' attention modules call, from [B, H, T, E] each to [B, T, H, E].

    Raises:
        RuntimeError: the calling thread has not set the attention: it runs a model that another thread computes on.
    """
    if _EXCHANGING and threading.get_ident() not in _EXCHANGING:
        raise RuntimeError(
            "fisher_vmap is computing on this model in another thread, with its attention replaced; run the model when "
            "that call has returned, or use a copy of the model in one of the two threads"
        )
    for name in ("softcap", "s_aux", "sinks", "position_bias", "indices", "sparse_indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"{type(module).__name__} uses {name}")
    if attention_mask is not None and attention_mask.requires_grad:
        raise UnsupportedAttention(f"{type(module).__name__} computes its mask from the residual stream")
    if _CAPTURING.get():
        raise KeysCaptured(key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    packed, keys = _PACKED.get(), _KEYS.get()
    if packed is not None and keys is not None:
        kind = AttentionKind(float(scale), False, packed.groups_on(query.device), one_query=True)
        return attention(query, *keys, None, kind).transpose(1, 2).contiguous(), None
    groups = packed.groups_on(query.device) if packed else None
    kind = AttentionKind(float(scale), bool(causal) and query.shape[2] > 1, groups)
    if kind.groups is not None and not (kind.causal and attention_mask is None and key.shape[2] == query.shape[2]):
        raise UnsupportedAttention(f"{type(module).__name__} is not a plain causal attention")
    if (note := _NOTE.get()) is not None:
        note(AttentionCall(module, query, key, value, kind.alone()))
    return attention(query, key, value, attention_mask, kind).transpose(1, 2).contiguous(), None


def _mask(*args: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """The function that transformers' models build masks with; None if the mask is only causal."""
    packed = _PACKED.get()
    if packed is None:
        from transformers.masking_utils import sdpa_mask

        if not allow_is_causal_skip and (notes := _ODD_MASKS.get()) is not None:
            notes.append("a mask that is more than causal")
        return sdpa_mask(*args, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    longest = max(stop - start for start, stop in packed.ranges)
    if local_size is not None and local_size < longest:
        raise UnsupportedAttention(f"a window of {local_size} is shorter than a prompt of {longest} tokens")
    return None


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def prompts_packed(layout: Layout) -> AbstractContextManager[None]:
    """Within the context our attention keeps the layout's prompts apart, if they are packed end to end."""
    ranges = tuple(layout.ranges())
    return _set(_PACKED, Packed(ranges, group_prompts(ranges, layout.device)) if layout.packed else None)


def nothing_packed() -> AbstractContextManager[None]:
    """Within the context no prompts are packed: a module is run by itself."""
    return _set(_PACKED, None)


class KeysCaptured(Exception):
    """Ends a block's forward at its attention call, with the keys and values, [1, G, N, E] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


def capturing_keys() -> AbstractContextManager[None]:
    """Within the context our attention raises `KeysCaptured` instead of computing."""
    return _set(_CAPTURING, True)


def against_keys(keys: tuple[Tensor, Tensor]) -> AbstractContextManager[None]:
    """Within the context each prompt has one query, its last, against these keys and values of all positions."""
    return _set(_KEYS, keys)


def noting_calls(note: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
    """Within the context each call of our attention on packed or padded prompts is told to `note`."""
    return _set(_NOTE, note)


def packed_now() -> Packed | None:
    """The packed prompts, if attention calls are now causal attention among all of their positions; else None."""
    return None if _CAPTURING.get() or _KEYS.get() is not None else _PACKED.get()


@contextmanager
def noting_odd_masks() -> Iterator[list[str]]:
    """Yield a list that collects, within the context, the masks that are more than causal or windowed."""
    notes: list[str] = []
    with _set(_ODD_MASKS, notes):
        yield notes


def register() -> None:
    """Register our attention with transformers under the name `fisher_vmap`; may be called repeatedly."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def supports_ours(model: torch.nn.Module) -> bool:
    """Whether the model declares that its attention modules can call any registered function."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


@contextmanager
def attention_set_to(model: torch.nn.Module, implementation: str | None) -> Iterator[None]:
    """Within the context the model's attention is `implementation`; None leaves it as it is."""
    if implementation is None:
        yield
        return
    if implementation == NAME:
        register()
    configs = {id(config): config for module in model.modules() if (config := _config_of(module)) is not None}
    before = [(config, config._attn_implementation) for config in configs.values()]
    _EXCHANGING.append(threading.get_ident())
    try:
        for config in configs.values():
            config._attn_implementation = implementation
        yield
    finally:
        _EXCHANGING.remove(threading.get_ident())
        for config, name in before:  # in the order of model.modules(): an inner config's own value comes last
            config._attn_implementation = name


def _config_of(module: torch.nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation") else None
