"""Models whose weights are on several devices, or offloaded by accelerate until their module runs.

accelerate moves inputs and fetches weights in a hook around every module. Its hooks prevent fused pullbacks, and
weights cannot be fetched under `torch.func`. So during a computation this package replaces them: inputs are moved where
the next module is on another device, and offloaded weights are fetched one block at a time, outside of `torch.func`
transforms. Everything else follows the tensors: cotangents move to the device of what they are multiplied with.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from fisher_vmap.model.patches import Remembered, innermost, is_of_class
from fisher_vmap.model.recording import map_tensors
from fisher_vmap.model.widening import saved_narrow, widened, widened_by_parts

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Forward = Callable[..., Any]
_FORWARDS: Remembered[dict[nn.Module, Forward]] = Remembered()  # by module


def model_dtype(model: nn.Module) -> torch.dtype:
    """The number format that a model computes in now: that of its first unquantised parameter, unless widened."""
    if widened_by_parts(model):
        return torch.float32
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATS), torch.float32)


def input_device(model: Any) -> torch.device:
    """The device that tokens go to: that of the input embedding, or where accelerate runs it if it is offloaded.

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


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights in a module are offloaded: on the meta device until they are fetched."""
    return any(parameter.is_meta for parameter in module.parameters())


def can_be_fetched(module: nn.Module) -> bool:
    """Whether all weights of a module are loaded, or offloaded by accelerate, which can fetch them."""
    missing = (part for part in module.modules() if any(p.is_meta for p in part.parameters(recurse=False)))
    return all((hook := _hook(part)) is not None and hook.offload for part in missing)


@contextmanager
def weights_on_device(*modules: nn.Module) -> Iterator[None]:
    """Within the context the offloaded weights of the modules are on the device that the modules run on."""
    with ExitStack() as stack:
        for part in dict.fromkeys(part for module in modules for part in module.modules()):
            hook = _hook(part)
            if hook is not None and hook.offload and _lacks_weights(part, hook):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield


@contextmanager
def weights_ready(*modules: nn.Module) -> Iterator[None]:
    """Within the context the modules can run: their weights are on the device, and widened if the model is."""
    with weights_on_device(*modules), widened(*modules):
        yield


def small_graph(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which autograd's graph keeps fetched weights in the CPU's memory, and widened weights narrow."""
    return torch.autograd.graph.save_on_cpu() if is_offloaded(model) else saved_narrow()


@contextmanager
def placed(model: nn.Module) -> Iterator[None]:
    """Within the context this package moves inputs and fetches weights, instead of accelerate's hooks."""
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
            elif own is not None:  # the forward was replaced before accelerate wrapped it
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
    """A module's own forward on inputs moved to its device, with its weights on the device."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        device = _device_of(module)
        if device is not None:
            args, kwargs = map_tensors((args, kwargs), lambda tensor: tensor.to(device))
        if not (hook.offload and _lacks_weights(module, hook)):
            return own(*args, **kwargs)
        hook.pre_forward(module)
        try:
            return own(*args, **kwargs)
        finally:
            hook.post_forward(module, None)

    return forward


def _lacks_weights(module: nn.Module, hook: Any) -> bool:
    return any(p.is_meta for p in module.parameters(recurse=bool(getattr(hook, "place_submodules", False))))


def _device_of(module: nn.Module) -> torch.device | None:
    """The device that accelerate runs a module on; accelerate may give it as a number of an accelerator."""
    hook = _hook(module)
    return None if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def _hook(module: nn.Module) -> Any:
    """The hook of accelerate that moves a module's inputs and weights, or None."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return None
    for one in getattr(hook, "hooks", (hook,)):  # one hook may chain several
        if hasattr(one, "execution_device") and hasattr(one, "offload"):
            return one
    return None
