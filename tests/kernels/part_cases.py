"""A part of a block pulled back from what its module's own forward leaves, against plain autograd of the module."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.parts import Part, Seen
from fisher_vmap.model.patches import experts_apart
from fisher_vmap.model.recording import hooks


class InFloat64(TorchFunctionMode):
    """Within the context what a model computes in float32 is computed in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float:
            return args[0].double()
        wide = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*(torch.float64 if value is torch.float32 else value for value in args), **wide)


def seen_by(part: Part, module: nn.Module, x: Tensor) -> tuple[Tensor, Seen]:
    """The module's output at x, [1, N, D], and what the part watches."""

    def rows(t: Any) -> Any:
        return tuple(rows(own) for own in t) if isinstance(t, tuple) else t.detach().reshape(-1, t.shape[-1])

    watched, seen = part.watched(), Seen({}, {})
    handles = [
        m.register_forward_pre_hook(lambda m, args: seen.inputs.__setitem__(m, rows(args[0]))) for m in watched.inputs
    ]
    handles += [
        m.register_forward_hook(lambda m, _, output: seen.outputs.__setitem__(m, rows(output))) for m in watched.outputs
    ]
    with torch.no_grad(), hooks(*handles), experts_apart(module):
        y = module(x)
    return (y[0] if isinstance(y, tuple) else y), seen


def pulled(part: Part, module: nn.Module, x: Tensor, G_NKD: Tensor, ends: list[int]) -> Tensor:
    """The cotangents of the module's input, [N, K, D], by the part's pullback, a range of rows after another."""
    _, seen = seen_by(part, module, x)
    with torch.no_grad():
        pull = part.pull_from(seen, Scratch())
        return torch.cat(
            [pull(G_NKD[a:z].clone(), a, z).clone() for a, z in zip([0, *ends], [*ends, len(G_NKD)], strict=True)]
        )


def by_autograd(module: nn.Module, x: Tensor, G_NKD: Tensor) -> Tensor:
    """The same, one cotangent at a time."""
    leaf = x.clone().requires_grad_()
    with experts_apart(module):
        y = module(leaf)
    y = y[0] if isinstance(y, tuple) else y
    grads = [torch.autograd.grad(y, leaf, g[None], retain_graph=True)[0][0] for g in G_NKD.unbind(1)]
    return torch.stack(grads, 1)
