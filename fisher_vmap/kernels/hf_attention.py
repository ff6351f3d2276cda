"""The bridge to transformers: its models call our attention, for the time of one computation only."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_vmap.kernels.attention import AttentionKind, attention
from fisher_vmap.model.layout import Group, Layout, group_prompts

NAME = "fisher_vmap"


@dataclass(frozen=True)
class Packed:
    """The prompts that are packed: their rows [start, stop), and their groups for attention."""

    ranges: tuple[tuple[int, int], ...]
    groups: tuple[Group, ...]

    def groups_on(self, device: torch.device) -> tuple[Group, ...]:
        """The groups with their rows where the queries are: blocks may stand on several devices."""
        return tuple(group.on(device) for group in self.groups)


_EXCHANGING: list[int] = []  # the threads that have exchanged a model's attention, once for each time
_PACKED: ContextVar[Packed | None] = ContextVar("packed prompts", default=None)
_CAPTURING: ContextVar[bool] = ContextVar("keys are captured", default=False)
_KEYS: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("keys and values of all positions", default=None)
_ODD_MASKS: ContextVar[list[str] | None] = ContextVar("masks that are more than causal", default=None)


class UnsupportedAttention(Exception):
    """The model asks of attention what ours does not do (sinks, soft-caps, learned position biases)."""


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
    """The function that transformers' attention modules call: [B, H, T, E] each, out comes [B, T, H, E].

    Raises:
        RuntimeError: called by a thread that has not exchanged the attention: it runs a model that another computes on.
    """
    if _EXCHANGING and threading.get_ident() not in _EXCHANGING:
        raise RuntimeError(
            "fisher_vmap computes on this model in another thread, and has exchanged its attention meanwhile; run the "
            "model when that call has returned, or give one of the two a copy of the model"
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
    return attention(query, key, value, attention_mask, kind).transpose(1, 2).contiguous(), None


def _mask(*args: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """The function that transformers' models build masks with: none where causality is all there is to it."""
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
def prompts_packed(layout: Layout) -> Iterator[None]:
    """Within the context our attention keeps the layout's prompts apart, if they are packed end to end."""
    ranges = tuple(layout.ranges())
    token = _PACKED.set(Packed(ranges, group_prompts(ranges, layout.device)) if layout.packed else None)
    try:
        yield
    finally:
        _PACKED.reset(token)


class KeysCaptured(Exception):
    """Leaves a block where it calls attention, with the keys and values, [1, G, N, E] each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values


@contextmanager
def capturing_keys() -> Iterator[None]:
    """Within the context our attention raises `KeysCaptured` instead of computing."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


@contextmanager
def against_keys(keys: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Within the context queries are one a prompt, its last, and attend to these keys and values of all positions."""
    token = _KEYS.set(keys)
    try:
        yield
    finally:
        _KEYS.reset(token)


def packed_now() -> Packed | None:
    """The packed prompts of a call of attention, where that is causal attention among all of their positions."""
    return None if _CAPTURING.get() or _KEYS.get() is not None else _PACKED.get()


@contextmanager
def noting_odd_masks() -> Iterator[list[str]]:
    """Gives a list that fills, within the context, with masks that are more than causal or windowed."""
    notes: list[str] = []
    token = _ODD_MASKS.set(notes)
    try:
        yield notes
    finally:
        _ODD_MASKS.reset(token)


def register() -> None:
    """Make our attention known to transformers under the name `fisher_vmap`; twice is as good as once."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def supports_ours(model: torch.nn.Module) -> bool:
    """Whether the model's attention modules take any registered function, by their own declaration."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


@contextmanager
def attention_set_to(model: torch.nn.Module, implementation: str | None) -> Iterator[None]:
    """Within the context the model's attention is `implementation`, whatever it was before; None leaves it alone."""
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
