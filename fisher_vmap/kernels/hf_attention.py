"""Makes transformers' models call our attention during a computation, and tells it which prompts are packed.

A block that is replayed at some rows hands over the queries, keys and values of these alone. `attending_among` gives it
the keys and values of the other rows, which `keeping_keys` kept in the recorded forward, as constants.

A window that is shorter than a packed prompt reaches our attention as a mask without elements, of shape [1, 1, 0, W]:
models pass masks on from the function that makes them, here `_mask`, to their attention.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisher_vmap.kernels.attention import AttentionKind, attention_to_live
from fisher_vmap.model.groups import Group, group_prompts
from fisher_vmap.model.layout import Layout, NotPositionwise
from fisher_vmap.model.recording import KeptKeys

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
    """A call of our attention, with what it computes from.

    Attributes:
        module: the attention module.
        q: [B, H, T, E], rotated or not, as the module handed it over.
        k: [B, G, S, E], likewise.
        v: [B, G, S, Ev].
        kind: the scale, the soft-cap and the window, without groups.
        sinks: [H]; None: none.
    """

    module: torch.nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    kind: AttentionKind
    sinks: Tensor | None


@dataclass(frozen=True)
class Among:
    """The rows at which a block is replayed: its queries and live keys, among the keys of all rows.

    Attributes:
        columns: [n] int64, the live rows among all rows; None: all rows are live.
        groups: if prompts are packed, the prompts in groups, with these queries and live keys.
    """

    columns: Tensor | None
    groups: tuple[Group, ...] | None

    @staticmethod
    def of(every: Layout, live: Layout, columns: Tensor | None, queries: Layout, vectors: int | None = None) -> "Among":
        """The queries and live keys of these layouts.

        `columns` are those of the live one among all; `vectors` is how many will be pulled back, None: unknown.
        """
        if not every.packed:
            return Among(columns, None)
        # A prompt's keys end where its live rows do; later rows matter to no target.
        stops = [s + q + n for s, q, n in zip(every.first_row, _ahead(every, live), live.lengths, strict=True)]
        keys = list(zip(every.first_row, stops, strict=True))
        return Among(columns, group_prompts(keys, every.device, live.ranges(), queries.ranges(), vectors))


def _ahead(every: Layout, live: Layout) -> list[int]:
    """How many rows of each prompt are before its first live one."""
    return [later - start for later, start in zip(live.start, every.start, strict=True)]


@dataclass
class _Replay:
    """A replay of a block among other rows, and how many attention calls it has made."""

    among: Among
    kept: Sequence[KeptKeys]
    live: tuple[Tensor, Tensor] | None
    calls: int = 0

    def keys(
        self, module: torch.nn.Module, key: Tensor, value: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The live keys and values of the next call, and those of all rows."""
        name, number = type(module).__name__, self.calls
        self.calls += 1
        if self.live is not None and number > 0:
            raise NotPositionwise(f"the block of {name} attends more than once")
        live = (key, value) if self.live is None else self.live
        if self.among.columns is None:
            return live, live
        if number >= len(self.kept) or self.kept[number].module is not module:
            raise NotPositionwise(f"{name} attends in another order than in the forward")
        kept, columns = self.kept[number], self.among.columns.to(key.device)
        k, v = (
            every.to(t.dtype).index_copy(2, columns, t.detach())
            for every, t in zip((kept.keys, kept.values), live, strict=True)
        )
        return live, (k, v)


_EXCHANGING: list[int] = []  # the threads inside `attention_set_to`, once for each time they entered it
_PACKED: ContextVar[Packed | None] = ContextVar("packed prompts", default=None)
_CAPTURING: ContextVar[bool] = ContextVar("keys are captured", default=False)
_REPLAY: ContextVar[_Replay | None] = ContextVar("a replay at some rows", default=None)
_KEEPING: ContextVar[Callable[[KeptKeys], None] | None] = ContextVar("keys and values are kept", default=None)
_NOTING: ContextVar[Callable[[AttentionCall], None] | None] = ContextVar("calls are noted", default=None)
_ODD_MASKS: ContextVar[list[str] | None] = ContextVar("masks that are more than causal", default=None)
_WINDOWS: ContextVar[list[int] | None] = ContextVar("windows shorter than a packed prompt", default=None)


class UnsupportedAttention(Exception):
    """The model needs a feature that our attention does not have (learned position biases, chosen keys)."""


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
    for name in ("sinks", "position_bias", "indices", "sparse_indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"{type(module).__name__} uses {name}")
    if attention_mask is not None and attention_mask.requires_grad:
        raise UnsupportedAttention(f"{type(module).__name__} computes its mask from the residual stream")
    if _CAPTURING.get():
        raise KeysCaptured(module, key, value)
    if (keep := _KEEPING.get()) is not None:
        keep(KeptKeys(module, key, value))
    packed, replay, many = _PACKED.get(), _REPLAY.get(), query.shape[2] > 1
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)) and many
    mask, window = _window_apart(attention_mask)
    if packed is not None and not (
        (causal or (replay is not None and not many)) and mask is None and key.shape[2] == query.shape[2]
    ):
        raise UnsupportedAttention(f"{type(module).__name__} is not a plain causal attention")
    scale, softcap = scaling if scaling is not None else query.shape[-1] ** -0.5, kwargs.get("softcap")
    kind = AttentionKind(float(scale), causal, None, 0, None if softcap is None else float(softcap), window)
    if (sinks := kwargs.get("s_aux")) is not None:
        if sinks.numel() != query.shape[1]:
            raise UnsupportedAttention(f"{type(module).__name__} uses s_aux of shape {tuple(sinks.shape)}")
        sinks = sinks.detach().flatten()
    live = every = key, value
    if replay is not None:
        live, every = replay.keys(module, key, value)
        groups = replay.among.groups
        first_live = every[0].shape[2] - live[0].shape[2] if groups is None else 0
    else:
        groups, first_live = packed.groups if packed else None, 0
    if (note := _NOTING.get()) is not None:
        note(AttentionCall(module, query, *every, kind, sinks))
    groups = None if groups is None else tuple(group.on(query.device) for group in groups)
    kind = replace(kind, groups=groups, first_live=first_live)
    return attention_to_live((query, *live), every, mask, kind, sinks).transpose(1, 2).contiguous(), None


def _window_apart(mask: Tensor | None) -> tuple[Tensor | None, int | None]:
    """A mask without elements is a window, and no mask."""
    if mask is not None and mask.dim() == 4 and mask.shape[2] == 0:
        return None, mask.shape[3]
    return mask, None


def _mask(*args: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """The function that transformers' models build masks with; None if the mask is only causal."""
    packed = _PACKED.get()
    if packed is None:
        from transformers.masking_utils import sdpa_mask

        if not allow_is_causal_skip and (notes := _ODD_MASKS.get()) is not None:
            notes.append("a mask that is more than causal")
        return sdpa_mask(*args, local_size=local_size, allow_is_causal_skip=allow_is_causal_skip, **kwargs)
    first, stop = max(packed.ranges, key=lambda rows: rows[1] - rows[0])
    if local_size is None or local_size >= stop - first:
        return None
    device = torch.device(kwargs.get("device", "cpu"))
    if not _is_window(kwargs.get("mask_function"), local_size, first, stop, device):
        raise UnsupportedAttention(f"a mask of width {local_size} is shorter than a prompt, and not a sliding window")
    if (windows := _WINDOWS.get()) is not None:
        windows.append(local_size)
    return torch.empty(1, 1, 0, local_size, dtype=torch.bool, device=device)


def _is_window(function: Any, size: int, first: int, stop: int, device: torch.device) -> bool:
    """Whether a mask's function lets queries of a prompt, [first, stop), see their last `size` keys and no others."""
    if function is None:
        return False
    places = {0, size - 1, size, size + 1, 2 * size - 1, 2 * size, (stop - first) // 2, stop - first - 1}
    query = torch.tensor([first + p for p in sorted(places) if p < stop - first], device=device)[None, None, :, None]
    key, zero = torch.arange(first, stop, device=device)[None, None, None], query.new_zeros(1, 1, 1, 1)
    allowed = function(zero, zero, query, key)
    return bool(torch.equal(allowed, ((key <= query) & (key > query - size)).expand_as(allowed)))


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
    return _set(_PACKED, Packed(ranges, group_prompts(ranges, layout.device, alike=True)) if layout.packed else None)


def nothing_packed() -> AbstractContextManager[None]:
    """Within the context no prompts are packed: a module is run by itself."""
    return _set(_PACKED, None)


class KeysCaptured(Exception):
    """Ends a block's forward at its attention call, with the keys and values, [B, G, T, E] each."""

    def __init__(self, module: torch.nn.Module, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.module, self.keys, self.values = module, keys, values


def capturing_keys() -> AbstractContextManager[None]:
    """Within the context our attention raises `KeysCaptured` instead of computing."""
    return _set(_CAPTURING, True)


def keeping_keys(keep: Callable[[KeptKeys], None]) -> AbstractContextManager[None]:
    """Within the context `keep` is given the keys and values of every call of our attention."""
    return _set(_KEEPING, keep)


def noting_calls(note: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
    """Within the context `note` is given every call that our attention computes."""
    return _set(_NOTING, note)


def attending_among(
    among: Among, kept: Sequence[KeptKeys] = (), live: tuple[Tensor, Tensor] | None = None
) -> AbstractContextManager[None]:
    """Within the context a block is replayed at some rows.

    Args:
        among: the rows.
        kept: the keys and values of all rows, one entry for each attention call of the block.
        live: the live keys and values, [B, G, n, E] each; None: those of the rows that the block is replayed at.
    """
    return _set(_REPLAY, _Replay(among, kept, live))


def packed_now() -> Packed | None:
    """The packed prompts, if attention calls are now causal attention among all of their positions; else None."""
    return None if _CAPTURING.get() or _REPLAY.get() is not None else _PACKED.get()


@contextmanager
def noting_odd_masks() -> Iterator[list[str]]:
    """Yield a list that collects, within the context, the masks that are more than causal or windowed."""
    notes: list[str] = []
    with _set(_ODD_MASKS, notes):
        yield notes


@contextmanager
def noting_windows() -> Iterator[list[int]]:
    """Yield a list that collects, within the context, the windows that are shorter than a packed prompt."""
    windows: list[int] = []
    with _set(_WINDOWS, windows):
        yield windows


def register() -> None:
    """Register our attention with transformers under the name `fisher_vmap`; may be called repeatedly."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _mask)


def supports_ours(model: torch.nn.Module) -> bool:
    """Whether the model declares that its attention modules can call any registered function."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


def attention_of(model: torch.nn.Module) -> str:
    """The attention of transformers that a model is set to, or "its own"."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) or "its own"


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
