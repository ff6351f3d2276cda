"""What lies between a model's last block and its logits, found by watching one forward pass.

The head is taken apart only where the values prove it: the modules chain from the last block's output to the
unembedding's input, or the model's own code between them, run again on single tokens, gives what it gave; and planted
logits of every size come out of the model as a known function of themselves.
"""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.blocks import forward_inputs, output_embedding, output_of
from fisher_vmap.anatomy.layout import lay_out
from fisher_vmap.anatomy.memory import is_out_of_memory
from fisher_vmap.anatomy.placement import can_be_fetched, put_aside, weights_at_hand
from fisher_vmap.anatomy.recording import StructureChanged, hooks
from fisher_vmap.head import UnembeddingHead
from fisher_vmap.proofs.final_norm import Chain, Replay
from fisher_vmap.proofs.phi import find_phi
from fisher_vmap.pullbacks.quantized import has_matrix
from fisher_vmap.upper_network.whole import rows_from_logits


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
    finite: bool = True
    """Whether what was seen were numbers; from others nothing can be told."""


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
        logits: Tensor = model(**forward_inputs(model, input_ids)).logits
    with torch.no_grad():
        alone = rows_from_logits(model, lay_out(input_ids, None), gather=True)()
    gap = (alone.double() - logits[:, -1].double()).norm()
    gather = bool(gap <= 16 * torch.finfo(logits.dtype).eps * logits[:, -1].double().norm())
    head, why_not = None, "the blocks return no tensor"
    if top:
        replay = Replay(weakref.ref(model), blocks, call_order, above)
        head, why_not = _take_apart(model, top[0], events, logits, input_ids, replay)
    finite = not bool(logits.isnan().any()) and all(bool(x.isfinite().all()) for x in top)
    return Watched(call_order, head, why_not, logits.shape[-1], frozenset(above), gather, finite)


def _take_apart(
    model: nn.Module, top: Tensor, events: list[_Event], logits: Tensor, input_ids: Tensor, replay: Replay
) -> tuple[UnembeddingHead | None, str]:
    """The head, or None and the reason in words.

    Args:
        model: the causal LM.
        top: [B, T, D], what the last block returned.
        events: the calls of modules after that, as they returned.
        logits: [B, T, V], what the model returned.
        input_ids: [B, T], what it was given.
        replay: what may be between, where it is no chain of modules.
    """
    unembedding = output_embedding(model)
    if top.dim() != 3:
        return None, "what the blocks return is not [B, T, D]"
    if not bool(top.isfinite().all()):
        return None, "what the blocks return is not finite for these prompts"
    if unembedding is None or not has_matrix(unembedding) or not can_be_fetched(unembedding):
        return None, f"the output embedding is {_make_of(unembedding)}, not a plain Linear"
    assert isinstance(unembedding, nn.Linear)
    if unembedding._forward_hooks or unembedding._forward_pre_hooks:
        return None, "the output embedding has a hook, which may change single logits"
    calls = [event for event in events if event.module is unembedding]
    if len(calls) != 1:
        return None, f"the output embedding was called {len(calls)} times after the last block"
    _, entered, left = calls[0]
    chain = _chain(top, entered, events, unembedding)
    if chain is None and put_aside(model):
        return None, "no chain of modules leads from the last block to the output embedding"
    norm: Callable[[Tensor], Tensor] = replay if chain is None else Chain(tuple(chain))
    expected = entered[:, -1].double()
    if bool((expected.norm(dim=-1) == 0).any()):
        return None, "nothing reached the output embedding for some prompt, so that no head could be told"
    try:
        with torch.no_grad(), weights_at_hand(*(chain or ())):
            alone = norm(top[:, -1].to(torch.promote_types(top.dtype, torch.float32))).double()
    except (RuntimeError, TypeError, ValueError, IndexError, StructureChanged) as reason:
        if is_out_of_memory(reason):
            raise
        return None, "what follows the last block cannot be run on one position alone"
    budget = 16 * torch.finfo(top.dtype).eps * expected.norm()
    expected, budget = expected.to(alone.device), budget.to(alone.device)
    # NaN is not above the budget: it decides nothing.
    if alone.shape != expected.shape or bool((alone - expected).norm() > budget):
        return None, "what follows the last block needs more than one position of it"
    if left.shape != logits.shape:
        return None, "the model reshapes its logits"
    phi = find_phi(model, unembedding, input_ids)
    if phi is None:
        return None, "the model changes its logits in a way that is not a scale or a soft-cap"
    return UnembeddingHead(norm, unembedding, phi), ""


def _chain(top: Tensor, entered: Tensor, events: list[_Event], unembedding: nn.Module) -> list[nn.Module] | None:
    """The modules that lead from the last block's output to the unembedding's input; None if there is code between."""
    chain, at = [], top
    while not _same(at, entered):
        # The outermost module that takes what we hold; what encloses the unembedding does not count.
        steps = [e for e in events if _same(e.entered, at) and unembedding not in e.module.modules()]
        steps = [e for e in steps if not _same(e.left, at)]
        if not steps:
            return None
        chain.append(steps[-1].module)
        at = steps[-1].left
    return chain


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
