"""Computes a model with weights in a narrow format (bfloat16, float16) in float32; widening weights is exact.

Either the weights are widened once, into copies that replace them within a context. Or, if memory has no room for a
second set of weights, each part of the model is widened when it is called and narrowed when it returns. Both restore
the model afterwards.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.model.patches import Remembered
from fisher_vmap.model.recording import hooks

NARROW = (torch.bfloat16, torch.float16)
# Files with a container's memory limit, and with the memory it uses.
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
ROOM = 0.75  # the share of the free memory that a second set of weights may take


class _Copy(NamedTuple):
    """A weight in float32, with what identifies the weight and its values when copied."""

    of: "weakref.ref[Tensor]"
    state: tuple[int, int, int]
    wide: Tensor


_COPIES: Remembered[dict[int, _Copy]] = Remembered()  # by the id of the weight


class _Parts:
    """The weights of a model that is widened part by part: which are wide now, and how many parts use each."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._wide: dict[int, tuple[Tensor, Tensor, int]] = {}  # the weight, its narrow data, users

    def widen(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self._wide:
                _, data, users = self._wide[id(tensor)]
                self._wide[id(tensor)] = tensor, data, users + 1
            elif tensor.dtype in NARROW and not tensor.is_meta and _is_plain(tensor):
                self._wide[id(tensor)] = tensor, tensor.data, 1
                tensor.data = tensor.data.float()

    def narrow(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in self._wide:
                _, data, users = self._wide.pop(id(tensor))
                if users > 1:
                    self._wide[id(tensor)] = tensor, data, users - 1
                else:
                    tensor.data = data

    def narrow_all(self) -> None:
        for tensor, data, _ in self._wide.values():
            tensor.data = data
        self._wide.clear()

    def pack(self, tensor: Tensor) -> Any:
        """What autograd saves for a tensor: for a widened weight, the narrow one.

        Other tensors are detached, because an operation that saves its own output would keep itself, and so the whole
        graph, alive.
        """
        for weight, data, _ in self._wide.values():
            if weight.data_ptr() == tensor.data_ptr() and tensor.numel():
                return data, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor.detach()

    @staticmethod
    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        data, size, stride, offset = kept
        return data.float().as_strided(size, stride, offset)  # type: ignore[no-any-return]


_PARTS: ContextVar[_Parts | None] = ContextVar("parts", default=None)


def narrow_tensors(model: nn.Module, recurse: bool = True) -> list[Tensor]:
    """The parameters and buffers of a model in a narrow format, each once; neither offloaded nor quantised ones."""
    found = {id(t): t for t in (*model.parameters(recurse), *model.buffers(recurse))}
    return [t for t in found.values() if t.dtype in NARROW and not t.is_meta and _is_plain(t)]


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is not quantised: quantised classes override `dequantize`."""
    return type(tensor).dequantize is Tensor.dequantize


@contextmanager
def in_float32(model: nn.Module, *, keep: bool = True) -> Iterator[None]:
    """Within the context the model computes in float32, in its forward and in every derivative.

    With `keep`, float32 copies of the weights may be made and kept; else each part is widened when it is called.
    """
    if widened_by_parts(model) or not (tensors := narrow_tensors(model)):
        yield
    elif keep and (model in _COPIES or has_room(tensors)):
        before = [(tensor, tensor.data) for tensor in tensors]
        try:
            for tensor, wide in zip(tensors, _copies(model, tensors), strict=True):
                tensor.data = wide
            yield
        finally:
            for tensor, data in before:
                tensor.data = data
    else:
        parts = _Parts(model)
        token = _PARTS.set(parts)
        try:
            with _forwards_widened(model, parts):
                yield
        finally:
            _PARTS.reset(token)


@contextmanager
def forward_in_float32(model: nn.Module) -> Iterator[None]:
    """Within the context a forward of the model runs in float32, one part at a time; replays of blocks do not."""
    with _forwards_widened(model, _Parts(model)):
        yield


def widen_for_good(model: nn.Module) -> bool:
    """Convert the weights to float32, in a model that no other code uses; False if memory has no room for them."""
    tensors = narrow_tensors(model)
    copies = _copies(model, tensors) if model in _COPIES else []
    if not copies and not has_room(tensors, 2):  # 2 bytes more each: the narrow weights are freed one by one
        return False
    for i, tensor in enumerate(tensors):
        tensor.data = copies[i] if copies else tensor.data.float()
    _COPIES.pop(model, None)
    return True


@contextmanager
def widened(*modules: nn.Module) -> Iterator[None]:
    """Within the context the weights of these modules are wide, if their model is widened part by part."""
    parts = _PARTS.get()
    if parts is None:
        yield
        return
    tensors = list({id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}.values())
    parts.widen(tensors)
    try:
        yield
    finally:
        parts.narrow(tensors)


def widened_by_parts(model: nn.Module) -> bool:
    """Whether the model computes in float32 now though its weights are narrow."""
    parts = _PARTS.get()
    return parts is not None and parts.model is model


def saved_narrow() -> AbstractContextManager[Any]:
    """A context in which autograd's graph saves narrow weights, and widens them for its backward pass."""
    parts = _PARTS.get()
    return nullcontext() if parts is None else torch.autograd.graph.saved_tensors_hooks(parts.pack, parts.unpack)


def has_room(tensors: Sequence[Tensor], bytes_each: int = 4) -> bool:
    """Whether the free memory has room for float32 copies of these tensors, or for this many bytes per element."""
    wanted: dict[torch.device, int] = {}
    for tensor in tensors:
        wanted[tensor.device] = wanted.get(tensor.device, 0) + bytes_each * tensor.numel()
    return all((free := free_bytes(device)) is None or size <= ROOM * free for device, size in wanted.items())


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device, in bytes; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
    for limit, used in CGROUP_FILES:
        try:
            most, now = (int(Path(name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such limit, or it is "max"
            continue
        free = min(free, most - now)
    return max(0, free)


def _copies(model: nn.Module, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Float32 copies of the weights: kept copies, or new ones of weights that have changed since."""
    before = _COPIES.get(model) or {}
    now: dict[int, _Copy] = {}
    for tensor in tensors:
        state, found = _state(tensor), before.get(id(tensor))
        if found is None or found.of() is not tensor or found.state != state:
            found = _Copy(weakref.ref(tensor), state, tensor.data.float())
        now[id(tensor)] = found
    _COPIES[model] = now
    return [now[id(tensor)].wide for tensor in tensors]


def _state(tensor: Tensor) -> tuple[int, int, int]:
    """Changes with the tensor's values: its version, its address, and the sum of its bits.

    The sum is there because `.data` can be changed without a new version. It costs a tenth of the copy.
    """
    bits = tensor.detach().reshape(-1).view(torch.int16)
    whole = len(bits) // 4 * 4 if bits.storage_offset() % 4 == 0 else 0
    total = int(bits[whole:].sum())
    if whole:
        total += int(bits[:whole].view(torch.int64).sum())
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr(), total


@contextmanager
def _forwards_widened(model: nn.Module, parts: _Parts) -> Iterator[None]:
    """Within the context a part of the model is wide from its call until it returns.

    A part is an entry of a list of modules, such as a decoder block, or a single module outside of such lists.
    Embeddings stay narrow and their output is widened, which is the same. The hooks are torch's global ones, because
    hooks on the modules themselves would look like the user's.
    """
    recurse, inside = _parts_of(model), dict[int, list[list[Tensor]]]()

    def before(module: nn.Module, _args: Any) -> None:
        if id(module) in recurse and type(module) is not nn.Embedding:
            tensors = narrow_tensors(module, recurse[id(module)])
            inside.setdefault(id(module), []).append(tensors)
            parts.widen(tensors)

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        if id(module) not in recurse:
            return None
        if type(module) is nn.Embedding:
            return output.float() if isinstance(output, Tensor) and output.dtype in NARROW else None
        if inside.get(id(module)):
            parts.narrow(inside[id(module)].pop())
        return None

    handles = (
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after, always_call=True),
    )
    try:
        with hooks(*handles):
            yield
    finally:
        parts.narrow_all()  # the parts that did not return, because of an error or because the forward was stopped


def _parts_of(model: nn.Module) -> dict[int, bool]:
    """The ids of the modules to widen when called, and whether with all modules inside them."""
    found: dict[int, bool] = {}
    inside: set[int] = set()
    for module in model.modules():  # outer modules come first
        if id(module) in inside:
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for entry in module:
                inside |= {id(part) for part in entry.modules()}
                found[id(entry)] = True
        elif narrow_tensors(module, recurse=False):
            found[id(module)] = False
    return found
