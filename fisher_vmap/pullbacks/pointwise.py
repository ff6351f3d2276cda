"""What is not a matrix product in the hand-written pullbacks: as torch runs it, or compiled into one pass each.

On a CPU such work in bfloat16 costs by the pass over memory, and by the conversion to float32 and back in each pass.
Within `compiled(True)` every function here is one kernel made by torch.compile: it reads its inputs once, computes in
float32 or wider, and rounds once. Sizes are symbolic: one compilation serves prompts of any length.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.pullbacks.scratch import Scratch

log = logging.getLogger(__name__)

# A dtype, a size of one, two sizes that happen to be the same: each is a compilation of its own.
RECOMPILE_LIMIT = 64

_compiled: ContextVar[bool] = ContextVar("compiled", default=False)
_given_up: set[Callable[..., None]] = set()


@contextmanager
def compiled(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within the context the functions of this module are compiled ones, or as torch runs them.

    Raises:
        ValueError: wanted, and torch cannot compile for this device.
    """
    if wanted:
        _try_compiler(device.type)
    token = _compiled.set(wanted)
    try:
        with _room_for_recompiling() if wanted else nullcontext():
            yield
    finally:
        _compiled.reset(token)


def _room_for_recompiling() -> AbstractContextManager[Any]:
    import torch._dynamo  # seconds, for those who compile

    return torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)  # type: ignore[no-any-return]


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _by_compiler(function: Callable[..., None], out: Tensor, *tensors: Tensor) -> bool:
    """Run a function compiled, in a context of compiled ones; False where that is not so, or torch cannot.

    All are given three dimensions, [n, K or 1, D], and one compilation serves any number of them. `out` is contiguous.
    """
    if not _compiled.get() or function in _given_up:
        return False
    try:
        _compile(function)(*(x.reshape(-1, *x.shape[-2:]) for x in tensors), out=out.view(-1, *out.shape[-2:]))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # Too many kinds of inputs in one process, or a compiler that was there and is no more.
        log.warning("%s goes on without torch.compile: %s", function.__name__, str(error).splitlines()[0][:160])
        _given_up.add(function)
        return False
    return True


@cache
def _try_compiler(device_type: str) -> None:
    """Compile one of the functions, so that what is missing shows before anything is computed."""
    dP, P = torch.rand(3, 4, 5, device=device_type), torch.rand(3, 1, 5, device=device_type)
    expected = dP.clone()
    _softmax(P, out=expected)
    try:
        _compile(_softmax)(P, out=dP)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"torch.compile does not work here ({str(error).splitlines()[0][:160]}); install a C++ compiler "
            "(for a GPU: triton), or leave compile false"
        ) from error
    torch.testing.assert_close(dP, expected)


def norm_pullback(
    g: Tensor, scale: Tensor, along: Tensor, back: Tensor, mean: Tensor | None, r: Tensor, scratch: Scratch, name: str
) -> Tensor:
    """The pullback of a norm, g * scale - back sum(g * along) - r sum(g * mean), in scratch memory of that name.

    Args:
        g: [..., D], the cotangents.
        scale: with as many dimensions as g, and broadcasts to it, as the next two do.
        along: see scale.
        back: see scale.
        mean: the same, for norms that take the mean off; else None.
        r: [..., 1], broadcasts to g.
        scratch: for the result and for what passes through.
        name: of the result's memory, which holds until that name is asked for again.
    """
    dx, rows = scratch(name, g.shape, g), (scale, along, back) if mean is None else (scale, along, back, mean, r)
    if _by_compiler(_norm_into if mean is None else _centred_into, dx, g, *rows):
        return dx
    product = torch.mul(g, along, out=scratch("product", g.shape, g))
    torch.mul(g, scale, out=dx)
    dx.addcmul_(product.sum(-1, keepdim=True), back, value=-1)
    if mean is not None:
        dx.addcmul_(torch.mul(g, mean, out=product).sum(-1, keepdim=True), r, value=-1)
    return dx


def add_norm_pullback(
    total: Tensor,
    g: Tensor,
    scale: Tensor,
    along: Tensor,
    back: Tensor,
    mean: Tensor | None,
    r: Tensor,
    scratch: Scratch,
) -> None:
    """Add the pullback of a norm, as `norm_pullback` has it, to `total`, [..., D], in place."""
    rows = (scale, along, back) if mean is None else (scale, along, back, mean, r)
    if not _by_compiler(_add_norm if mean is None else _add_centred, total, g, *rows):
        total += norm_pullback(g, scale, along, back, mean, r, scratch, "through")


def softmax_pullback(dP: Tensor, P: Tensor) -> Tensor:
    """The pullback of a softmax, P * (dP - sum(P * dP)) over the last dimension, in place of dP; P broadcasts to it."""
    if not _by_compiler(_softmax, dP, P):
        delta = dP.mul_(P).sum(-1, keepdim=True)
        dP.addcmul_(P, delta, value=-1)
    return dP


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(g: Tensor, scale: Tensor, along: Tensor, back: Tensor) -> Tensor:
    return g * _wide(scale) - _wide(back) * (g * _wide(along)).sum(-1, keepdim=True)


def _norm_into(g: Tensor, scale: Tensor, along: Tensor, back: Tensor, *, out: Tensor) -> None:
    out.copy_(_norm(_wide(g), scale, along, back))


def _centred_into(
    g: Tensor, scale: Tensor, along: Tensor, back: Tensor, mean: Tensor, r: Tensor, *, out: Tensor
) -> None:
    g = _wide(g)
    out.copy_(_norm(g, scale, along, back) - _wide(r) * (g * _wide(mean)).sum(-1, keepdim=True))


def _add_norm(g: Tensor, scale: Tensor, along: Tensor, back: Tensor, *, out: Tensor) -> None:
    out.copy_(_wide(out) + _norm(_wide(g), scale, along, back))


def _add_centred(
    g: Tensor, scale: Tensor, along: Tensor, back: Tensor, mean: Tensor, r: Tensor, *, out: Tensor
) -> None:
    g = _wide(g)
    out.copy_(_wide(out) + _norm(g, scale, along, back) - _wide(r) * (g * _wide(mean)).sum(-1, keepdim=True))


def _softmax(P: Tensor, *, out: Tensor) -> None:
    wide_P = _wide(P)
    product = _wide(out) * wide_P
    out.copy_(product - wide_P * product.sum(-1, keepdim=True))
