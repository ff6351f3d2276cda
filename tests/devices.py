"""Models and tensors moved to the device of `--device`, and results moved back to where the oracles are."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def placed(given: Any, device: torch.device) -> Any:
    """Models and tensors on the device. On the CPU all stays as it is; elsewhere models are copies, since tests share
    them, and the oracles go on with those on the CPU."""
    if device.type == "cpu":
        return given

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nn.Module):
            return copy.deepcopy(leaf).to(device)
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    return tree_map(place, given)


def on_cpu(found: Any) -> Any:
    """A result with all of its tensors on the CPU."""
    return tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, found)


def on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function on a device: what it is given is moved there, and what it returns is moved to the CPU."""

    @wraps(function)
    def there(*args: Any, **kwargs: Any) -> Any:
        return on_cpu(function(*placed(args, device), **placed(kwargs, device)))

    return function if device.type == "cpu" else there
