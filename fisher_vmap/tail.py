"""What lies between a model's last block and its logits, found by watching one forward pass.

The head is taken apart only where the values prove it: the modules chain from the last block's output to the
unembedding's input, and planted logits of every size come out of the model as a known function of themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisher_vmap.blocks import output_embedding, output_of
from fisher_vmap.head import Phi, UnembeddingHead
from fisher_vmap.layout import lay_out
from fisher_vmap.placement import can_be_fetched, placed, weights_at_hand
from fisher_vmap.quantized import has_matrix
from fisher_vmap.recording import hooks
from fisher_vmap.whole import rows_from_logits


class Watched(NamedTuple):
    """What one forward pass showed.

    Attributes:
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart, or None.
        why_not: where there is none, the reason in words.
        vocabulary: V, the number of logits.
        above: the ids of the modules that returned after the last block.
        gather: whether unembedding the last rows alone gives the model's own logits there.
    """

    call_order: list[str]
    head: UnembeddingHead | None
    why_not: str
    vocabulary: int
    above: frozenset[int]
    gather: bool


class _Event(NamedTuple):
    module: nn.Module
    entered: Tensor
    left: Tensor


def watch(model: nn.Module, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> Watched:
    """Run the model once on [B, T] tokens and read off the order of its blocks and the make of its head."""
    call_order: list[str] = []
    events: list[_Event] = []
    top: list[Tensor] = []
    above: set[int] = set()
    names = {id(block): name for name, block in blocks.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        left = output_of(output)
        if id(module) in names:
            call_order.append(names[id(module)])
            top[:] = [left] if left is not None else []
            events.clear()
            above.clear()
            return
        above.add(id(module))
        if left is not None and args and isinstance(args[0], Tensor):
            events.append(_Event(module, args[0], left))

    with torch.no_grad(), hooks(*(module.register_forward_hook(after) for module in model.modules())):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    with torch.no_grad():
        alone = rows_from_logits(model, lay_out(input_ids, None), gather=True)()
    gap = (alone.double() - logits[:, -1].double()).norm()
    gather = bool(gap <= 16 * torch.finfo(logits.dtype).eps * logits[:, -1].double().norm())
    if not top:
        return Watched(call_order, None, "the blocks return no tensor", logits.shape[-1], frozenset(above), gather)
    head, why_not = _take_apart(model, top[0], events, logits, input_ids)
    return Watched(call_order, head, why_not, logits.shape[-1], frozenset(above), gather)


def _take_apart(
    model: nn.Module, top: Tensor, events: list[_Event], logits: Tensor, input_ids: Tensor
) -> tuple[UnembeddingHead | None, str]:
    unembedding = output_embedding(model)
    if unembedding is None or not has_matrix(unembedding) or not can_be_fetched(unembedding):
        return None, f"the output embedding is {_make_of(unembedding)}, not a plain Linear"
    assert isinstance(unembedding, nn.Linear)
    calls = [event for event in events if event.module is unembedding]
    if len(calls) != 1:
        return None, f"the output embedding was called {len(calls)} times after the last block"
    chain, at = [], top
    while not _same(at, calls[0].entered):
        # The outermost module that takes what we hold; what encloses the unembedding does not count.
        steps = [e for e in events if _same(e.entered, at) and unembedding not in e.module.modules()]
        steps = [e for e in steps if not _same(e.left, at)]
        if not steps:
            return None, "no chain of modules leads from the last block to the output embedding"
        chain.append(steps[-1].module)
        at = steps[-1].left
    norm = Chain(tuple(chain))
    expected = calls[0].entered[:, -1].double()
    with weights_at_hand(*chain):
        alone = norm(top[:, -1].to(torch.promote_types(top.dtype, torch.float32))).double()
    if (alone - expected.to(alone.device)).norm() > 16 * torch.finfo(top.dtype).eps * expected.norm():
        return None, "what follows the last block mixes positions"
    if calls[0].left.shape != logits.shape:
        return None, "the model reshapes its logits"
    phi = _phi(model, unembedding, input_ids)
    if phi is None:
        return None, "the model changes its logits in a way that is not a scale or a soft-cap"
    return UnembeddingHead(norm, unembedding, phi), ""


def _phi(model: nn.Module, unembedding: nn.Module, input_ids: Tensor) -> Phi | None:
    """The function from the unembedding's output to the model's logits, proven on planted logits from 1e-3 to 1e3.

    Planted, because a soft-cap is the identity, to rounding, for the small logits that a short prompt may have.
    """
    planted: list[Tensor] = []

    def plant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        size = torch.logspace(-3, 3, output.numel(), dtype=torch.float64)
        sign = torch.where(torch.arange(output.numel()) % 2 == 0, 1.0, -1.0)
        planted.append((size * sign).view(output.shape).to(output))
        return planted[-1]

    with torch.no_grad(), hooks(unembedding.register_forward_hook(plant, prepend=True)):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    caps = {None, getattr(config, "final_logit_softcapping", None)}
    scales = {1.0}
    if getattr(config, "logit_scale", None):
        scales.add(float(config.logit_scale))
    if getattr(config, "logits_scaling", None):
        scales.add(1 / float(config.logits_scaling))
    candidates = [Phi(scale, cap) for scale in sorted(scales) for cap in sorted(caps, key=str)]
    x, z = planted[0].double(), logits.double().to(planted[0].device)
    eps = max(torch.finfo(planted[0].dtype).eps, torch.finfo(logits.dtype).eps)
    return next((phi for phi in candidates if bool(((phi(x) - z).abs() <= 8 * eps * z.abs()).all())), None)


@dataclass(frozen=True)
class Chain:
    """Modules as a function of float32 (or float64) rows, their few parameters upcast at each call."""

    chain: tuple[nn.Module, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [N, D] -> [N, D']; the modules' weights must be at hand."""
        rows = rows[:, None]  # as [B, 1, D], which is what a model gives them
        for module in self.chain:
            wide = {name: p.detach().to(rows.dtype) for name, p in module.named_parameters()}
            rows = rows.to(next((p.device for p in wide.values()), rows.device))
            with placed(module):
                rows = functional_call(module, wide, (rows,))
        return rows[:, 0]


def _make_of(module: nn.Module | None) -> str:
    weight = getattr(module, "weight", None)
    packed = isinstance(weight, Tensor) and type(weight) is not nn.Parameter
    return type(module).__name__ + (f" with {type(weight).__name__} weights" if packed else "")


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, by their values; NaN is the same as NaN."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    b = b.to(a.device)
    return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
