"""Where a model's weights are: on several devices, or put aside by accelerate until their module runs.

accelerate moves inputs and fetches weights in hooks around every module. They are in the way of fused pullbacks, and
weights cannot be fetched under `torch.func`. So for the time of a computation ours take their place: where blocks begin
on another device the inputs are moved, and weights that are put aside are fetched outside of what is transformed, a
block at a time. Everything else follows the tensors: cotangents move to what they are multiplied with.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.model.cache import Remembered
from fisher_vmap.model.patches import innermost, is_of_class
from fisher_vmap.model.widening import saved_narrow, widened, widened_by_parts

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Forward = Callable[..., Any]
_FORWARDS: Remembered[dict[nn.Module, Forward]] = Remembered()  # by module


def model_dtype(model: nn.Module) -> torch.dtype:
    """The number format that a model computes in now: that of its first parameter that is not quantised."""
    if widened_by_parts(model):
        return torch.float32
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)


def input_device(model: Any) -> torch.device:
    """The device that tokens go to: that of the input embedding's weights, or where these are used when put aside.

    Raises:
        ValueError: no weight of the model is loaded.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for module in (embedding, model):
        if not isinstance(module, nn.Module):
            continue
        if (device := _device_of(module)) is not None:
            return device
        for tensor in chain(module.parameters(), module.buffers()):
            if not tensor.is_meta:
                return tensor.device
    raise ValueError(
        f"the weights of this {type(model).__name__} are not loaded (they are on the meta device); load them first "
        "(nnsight: dispatch=True)"
    )


def put_aside(module: nn.Module) -> bool:
    """Whether weights of a module or inside it are put aside: on the meta device until they are fetched."""
    return any(parameter.is_meta for parameter in module.parameters())


def can_be_fetched(module: nn.Module) -> bool:
    """Whether all weights of a module are there, or accelerate knows where they are."""
    aside = (part for part in module.modules() if any(p.is_meta for p in part.parameters(recurse=False)))
    return all((hook := _hook(part)) is not None and hook.offload for part in aside)


@contextmanager
def weights_at_hand(*modules: nn.Module) -> Iterator[None]:
    """Within the context the weights of the modules that are put aside are on the device that they run on."""
    with ExitStack() as stack:
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            hook = _hook(part)
            if hook is not None and hook.offload and _lacks_weights(part, hook):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


@contextmanager
def weights_ready(*modules: nn.Module) -> Iterator[None]:
    """Within the context the modules can be computed with: no weight is put aside, and none too narrow."""
    with weights_at_hand(*modules), widened(*modules):
        yield


def saved_aside(model: nn.Module) -> AbstractContextManager[Any]:
    """For plain autograd: its graph keeps every weight fetched, for which the CPU's memory has room, or narrow."""
    return torch.autograd.graph.save_on_cpu() if put_aside(model) else saved_narrow()


@contextmanager
def placed(model: nn.Module) -> Iterator[None]:
    """Within the context inputs are moved and weights fetched by us, not by accelerate's hooks; afterwards by those."""
    hooked = [module for module in model.modules() if _hook(module) is not None and "forward" in vars(module)]
    if not hooked:
        yield
        return
    forwards = _FORWARDS.setdefault(model, {})
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    before = {module: vars(module)["forward"] for module in hooked}
    try:
        for module in hooked:
            own = innermost(module, getattr(module, "_old_forward", None))
            if is_of_class(module, own):
                del module.forward
            elif own is not None:  # somebody had exchanged the forward before accelerate came
                module.forward = own
            hook, parent = _hook(module), parents.get(module)
            arrives = None if parent is None else _device_of(parent)
            if module is not model and (hook.offload or _device_of(module) != arrives):
                if module not in forwards:
                    forwards[module] = _placed_forward(module, hook, module.forward)
                module.forward = forwards[module]
        yield
    finally:
        for module, forward in before.items():
            module.forward = forward


def _placed_forward(module: nn.Module, hook: Any, own: Forward) -> Forward:
    """A module's own forward on inputs that are moved to its device, with its weights at hand."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(module)
        if device is not None:
            args, kwargs = moved(args, device), moved(kwargs, device)
        if not (hook.offload and _lacks_weights(module, hook)):
            return own(*args, **kwargs)
        hook.pre_forward(module)
        try:
            return own(*args, **kwargs)
        finally:
            hook.post_forward(module, None)

    return forward


def moved(inputs: Any, device: torch.device) -> Any:
    """The same inputs with every tensor on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: moved(value, device) for name, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(moved(value, device) for value in inputs)
    return inputs


def _lacks_weights(module: nn.Module, hook: Any) -> bool:
    return any(p.is_meta for p in module.parameters(recurse=bool(getattr(hook, "place_submodules", False))))


def _device_of(module: nn.Module) -> torch.device | None:
    """The device that accelerate runs a module on; a number means the accelerator of that number."""
    hook = _hook(module)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def _hook(module: nn.Module) -> Any:
    """The hook of accelerate that aligns a module's devices, or None."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return None
    for one in getattr(hook, "hooks", (hook,)):  # several hooks are chained in one
        if hasattr(one, "execution_device") and hasattr(one, "offload"):
            return one
    return None
