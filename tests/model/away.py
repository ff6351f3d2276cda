"""Further devices on a machine that has none: tensors that live on the CPU, but say that they are somewhere else.

An operation on tensors of different devices fails, as it does on GPUs; a copy between devices works. So what runs here
moves its tensors where it must. Only tests use it, in a process of their own: the devices cannot be taken back.
"""

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "away"


class AwayTensor(torch.Tensor):
    """A tensor on "away:0", "away:1" ...; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here: torch.Tensor, device: Any = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes parameters of the class of those that they replace
            return here if isinstance(here, AwayTensor) else torch.nn.Parameter(here, requires_grad)
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, here.size(), **layout, dtype=here.dtype, device=device)
        made.here = here
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """All is done."""

    def __repr__(self, **_: Any) -> str:
        return f"AwayTensor({self.here!r}, {self.device})"

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Away(TorchDispatchMode):
    """Within it tensors can be made on the devices that are not there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: on the CPU, with what it returns on the device of its arguments or the one that it asks for."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    name = func.overloadpacket.__name__
    copies = name in ("_to_copy", "copy_", "copy")
    asked = kwargs.get("device")
    # A number on the CPU may be combined with anything, and so may an index on the CPU.
    places = {t.device for t in tensors if t.dim() > 0 and not ("index" in name and t.device.type == "cpu")}
    if len(places) > 1 and not copies:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found {sorted(map(str, places))}"
        )
    away = [t.device for t in tensors if isinstance(t, AwayTensor)]
    place = torch.device(asked) if asked is not None else tensors[0].device if copies else away[0] if away else None
    if name == "_local_scalar_dense" or place is None:
        place = torch.device("cpu")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False

    def bring(leaf: Any) -> Any:
        return leaf.here if isinstance(leaf, AwayTensor) else leaf

    found = func(*pytree.tree_map(bring, args), **pytree.tree_map(bring, kwargs))
    mine = {id(t.here): t for t in tensors if isinstance(t, AwayTensor)}

    def send(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or place.type == "cpu":
            return leaf
        return mine.get(id(leaf)) if id(leaf) in mine else AwayTensor(leaf, place)

    return pytree.tree_map(send, found)


class _Module:
    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 4


_KERNELS: list[torch.library.Library] = []  # they last as long as this does


def set_up() -> None:
    """Make the device "away:0" known to torch, for good."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    _KERNELS.append(library)

    # What `torch.tensor(..., device=...)` calls out of every mode's sight.
    def empty_strided(size: Any, stride: Any, *, device: Any = None, dtype: Any = None, **_: Any) -> torch.Tensor:
        return AwayTensor(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        here, there = (t.here if isinstance(t, AwayTensor) else t for t in (source, target))
        there.copy_(here)
        return target

    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
