"""Finds the head between a model's last block and its logits by watching one forward pass.

The head is a function of single rows (a final norm), the unembedding, and a function of each logit. It is taken apart
only where values prove it:

* The modules after the last block form a chain from its output to the unembedding's input (`Chain`). Or, where the
  model has code of its own in between, its forward run again on single tokens returns the same rows (`Replay`).
* Planted logits of every size leave the model as a known function of themselves: a scale, a soft-cap (`find_phi`). They
  are planted because a soft-cap equals the identity, to rounding, on the small logits that a short prompt may have.
"""

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisher_vmap.kernels.hf_attention import prompts_packed
from fisher_vmap.kernels.quantized import has_matrix
from fisher_vmap.linearize.whole import rows_from_logits
from fisher_vmap.model.head import Phi, UnembeddingHead
from fisher_vmap.model.layout import Layout, lay_out
from fisher_vmap.model.offload import can_be_fetched, is_offloaded, placed, weights_on_device
from fisher_vmap.model.recording import (
    StructureChanged,
    forward_inputs,
    hooks,
    output_embedding,
    output_of,
    with_output,
)
from fisher_vmap.model.validation import in_float64, is_out_of_memory


def find_phi(model: nn.Module, unembedding: nn.Module, input_ids: Tensor) -> Phi | None:
    """The function from the unembedding's output to the logits, proven on planted logits from 1e-3 to 1e3.

    None if no scale and soft-cap named in the model's configuration fits.
    """
    planted: list[Tensor] = []

    def plant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        size = torch.logspace(-3, 3, output.numel(), dtype=torch.float64, device="cpu")
        sign = 1 - 2 * (torch.arange(output.numel(), dtype=torch.float64, device="cpu") % 2)
        planted.append((size * sign).view(output.shape).to(output))
        return planted[-1]

    with torch.no_grad(), hooks(unembedding.register_forward_hook(plant, prepend=True)):
        logits: Tensor = model(**forward_inputs(model, input_ids)).logits
    x, z = in_float64(planted[0]), in_float64(logits.to(planted[0].device))
    eps = max(torch.finfo(planted[0].dtype).eps, torch.finfo(logits.dtype).eps)
    fits = (phi for phi in _candidates(model) if bool(((phi(x) - z).abs() <= 8 * eps * z.abs()).all()))
    return next(fits, None)


def _candidates(model: nn.Module) -> list[Phi]:
    """Every scale and soft-cap that the model's configuration has a number for, the simplest first."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {
        name: float(value)
        for name, value in (vars(config) if hasattr(config, "__dict__") else {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    }
    caps: list[float | None] = [None, *sorted({v for name, v in numbers.items() if "cap" in name})]
    named = {v for name, v in numbers.items() if "logit" in name or "lm_head" in name}
    scales = [1.0, *sorted({*named, *(1 / v for v in named)} - {1.0})]
    return [Phi(scale, cap) for scale in scales for cap in caps]


@dataclass(frozen=True)
class Chain:
    """Modules in a row as a function of float32 (or float64) rows; their few parameters are upcast at each call."""

    chain: tuple[nn.Module, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [N, D] -> [N, D']; the modules' weights must be on the device."""
        rows = rows[:, None]  # as [B, 1, D], the shape that the model gives them
        for module in self.chain:
            wide = {name: p.detach().to(rows.dtype) for name, p in module.named_parameters()}
            rows = rows.to(next((p.device for p in wide.values()), rows.device))
            with placed(module):
                rows = functional_call(module, wide, (rows,))
        return rows[:, 0]


class _Entered(Exception):
    """Ends the model's forward at the unembedding."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class Replay:
    """The model's code between last block and unembedding as a function of float32 (or float64) rows.

    It runs the model's own forward on prompts of one token, one for each row, and replaces the output of the last block
    by the rows. The few parameters above the blocks are upcast at each call. The model is held by a weak reference,
    because what is remembered of a model must not keep it alive.
    """

    model: "weakref.ref[nn.Module]"
    blocks: Mapping[str, nn.Module]
    call_order: Sequence[str]
    above: Collection[int]

    @property
    def runs(self) -> tuple[nn.Module, ...]:
        """The modules that are run: the whole model."""
        model = self.model()
        return () if model is None else (model,)

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, D] to [N, D']."""
        model = self.model()
        assert model is not None
        unembedding = output_embedding(model)
        assert unembedding is not None
        wide = {
            name: p.detach().to(rows.dtype)
            for name, p in model.named_parameters()
            if id(model.get_submodule(name.rpartition(".")[0])) in self.above
            and not any(p is own for own in unembedding.parameters())
        }
        seen = 0

        def put(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal seen
            seen += 1
            return with_output(output, rows[:, None]) if seen == len(self.call_order) else None

        def leave(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Entered(args[0])

        # Not made by `lay_out`: in torch 2.9 numbers cannot be read from tensors inside a transform.
        B, ids_B1 = len(rows), torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
        one_each = Layout(ids_B1, None, (1,) * B, tuple(range(B)), (0,) * B, 1)
        handles = [block.register_forward_hook(put) for block in self.blocks.values()]
        with hooks(*handles, unembedding.register_forward_pre_hook(leave)), prompts_packed(one_each):
            try:
                functional_call(model, wide, kwargs=forward_inputs(model, one_each.input_ids))
            except _Entered as entered:
                return entered.rows[:, 0]
        raise StructureChanged("the model did not reach its output embedding")


class Watched(NamedTuple):
    """The findings of one watched forward pass.

    Attributes:
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart, or None.
        why_not: why there is no head; empty if there is one.
        vocabulary: V, the number of logits.
        above: the ids of the modules that returned after the last block.
        gather: whether unembedding the last rows alone gives the model's own logits there.
        finite: whether the values were finite; if not, they prove nothing.
    """

    call_order: list[str]
    head: UnembeddingHead | None
    why_not: str
    vocabulary: int
    above: frozenset[int]
    gather: bool
    finite: bool


class _Event(NamedTuple):
    module: nn.Module
    entered: Tensor
    left: Tensor


def watch(model: nn.Module, blocks: Mapping[str, nn.Module], input_ids: Tensor) -> Watched:
    """Run the model once on [B, T] tokens; find the order of its blocks and its head."""
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
    gap = (in_float64(alone) - in_float64(logits[:, -1])).norm()
    gather = bool(gap <= 16 * torch.finfo(logits.dtype).eps * in_float64(logits[:, -1]).norm())
    head, why_not = None, "the blocks return no tensor"
    if top:
        replay = Replay(weakref.ref(model), blocks, call_order, above)
        head, why_not = _take_apart(model, top[0], events, logits, input_ids, replay)
    finite = not bool(logits.isnan().any()) and all(bool(x.isfinite().all()) for x in top)
    return Watched(call_order, head, why_not, logits.shape[-1], frozenset(above), gather, finite)


def _take_apart(
    model: nn.Module, top: Tensor, events: list[_Event], logits: Tensor, input_ids: Tensor, replay: Replay
) -> tuple[UnembeddingHead | None, str]:
    """The head, or None and the reason.

    `top` [B, T, D] is the last block's output, `events` are the module calls after it, `logits` [B, T, V] the model's
    output, and `replay` stands in for the final norm where the modules form no chain.
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
    if chain is None and is_offloaded(model):
        return None, "no chain of modules leads from the last block to the output embedding"
    norm: Callable[[Tensor], Tensor] = replay if chain is None else Chain(tuple(chain))
    expected = in_float64(entered[:, -1])
    if bool((expected.norm(dim=-1) == 0).any()):
        return None, "the input of the output embedding is zero for some prompt, so the head cannot be identified"
    try:
        with torch.no_grad(), weights_on_device(*(chain or ())):
            alone = in_float64(norm(top[:, -1].to(torch.promote_types(top.dtype, torch.float32))))
    except (RuntimeError, TypeError, ValueError, IndexError, StructureChanged) as reason:
        if is_out_of_memory(reason):
            raise
        return None, "what follows the last block cannot be run on one position alone"
    budget = 16 * torch.finfo(top.dtype).eps * expected.norm()
    expected, budget = expected.to(alone.device), budget.to(alone.device)
    # A NaN is not above the budget, so it rejects nothing.
    if alone.shape != expected.shape or bool((alone - expected).norm() > budget):
        return None, "what follows the last block needs more than one position of it"
    if left.shape != logits.shape:
        return None, "the model reshapes its logits"
    phi = find_phi(model, unembedding, input_ids)
    if phi is None:
        return None, "the model changes its logits in a way that is not a scale or a soft-cap"
    return UnembeddingHead(norm, unembedding, phi), ""


def _chain(top: Tensor, entered: Tensor, events: list[_Event], unembedding: nn.Module) -> list[nn.Module] | None:
    """The modules that lead from the last block's output to the unembedding's input; None if other code intervenes."""
    chain, at = [], top
    while not _same(at, entered):
        # Take the outermost module with this input; modules that contain the unembedding do not count.
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
    """Whether two tensors have the same dtype, shape and values; NaN equals NaN."""
    if a is b or a.shape != b.shape or a.dtype != b.dtype:
        return a is b
    b = b.to(a.device)
    return torch.equal(a, b) or bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
