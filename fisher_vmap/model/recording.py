"""Records every call of a decoder block in one forward without gradients, which stops after the last block.

A block takes the residual stream as its first positional argument or as `hidden_states` (or as the first argument that
can be one), and returns it as a tensor or as the first entry of a tuple. So it is found by structure, not by the name
of a class.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.model.layout import Layout


def output_embedding(model: Any) -> nn.Module | None:
    """The module that makes the logits, by the model's `get_output_embeddings`, or None."""
    module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return module if isinstance(module, nn.Module) else None


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The residual stream among a block's inputs."""
    place = _place_of_hidden(args, kwargs)
    return None if place is None else args[place] if isinstance(place, int) else kwargs[place]


def with_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs with another residual stream."""
    place = _place_of_hidden(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), dict(kwargs)
    return (args, {**kwargs, place: x}) if place is not None else (args, dict(kwargs))


def _place_of_hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    """Where the residual stream is: the first argument, `hidden_states`, or the first argument that can be one."""
    if args and _may_be_hidden(args[0]):
        return 0
    if _may_be_hidden(kwargs.get("hidden_states")):
        return "hidden_states"
    by_position: list[tuple[int | str, Any]] = list(enumerate(args))
    return next((place for place, value in [*by_position, *kwargs.items()] if _may_be_hidden(value)), None)


def _may_be_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def output_of(output: Any) -> Tensor | None:
    """The residual stream in a module's output: the tensor itself or the first entry of a tuple."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def with_output(output: Any, x: Tensor) -> Any:
    """The same output with another residual stream."""
    if isinstance(output, Tensor):
        return x
    if hasattr(output, "_fields"):  # a named tuple takes its entries as arguments
        return type(output)(x, *output[1:])
    return type(output)([x, *output[1:]])


def map_tensors(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested inputs (dicts, tuples, lists) with every tensor changed."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, dict):
        return {name: map_tensors(value, change) for name, value in inputs.items()}
    if type(inputs) in (tuple, list):
        return type(inputs)(map_tensors(value, change) for value in inputs)
    return inputs


def forward_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> dict[str, Any]:
    """The arguments of a forward of the model: tokens, no cache, and if given position ids and attention mask.

    With an attention mask a prompt's positions count from its first real token, as in `generate`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids}
    taken = inspect.signature(model.forward).parameters
    if "use_cache" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        inputs["use_cache"] = False
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
        if "position_ids" in taken and bool((attention_mask == 0).any()):
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs if position_ids is None else inputs | {"position_ids": position_ids}


class StructureChanged(Exception):
    """The model behaved differently from when it was probed; another form of the kernel must be used."""


class KeptKeys(NamedTuple):
    """The keys and values, [B, G, T, E] each, that an attention module made of all rows."""

    module: nn.Module
    keys: Tensor
    values: Tensor


class BlockCall(NamedTuple):
    """One call of a decoder block: everything needed to replay it.

    Attributes:
        name: the block's name; a block may be called more than once.
        block: the module.
        hidden: [B, T, D], the input residual stream.
        args: the positional arguments.
        kwargs: the keyword arguments.
        kept: results of the block's forward kept for its pullback; empty if none.
        keys: those of each attention call of the block, kept if only some rows are pulled back; else empty.
    """

    name: str
    block: nn.Module
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    kept: list[Any]
    keys: list[KeptKeys]

    def replay(self, hidden: Tensor) -> Tensor:
        """The block's output residual stream for another input residual stream, with all else as recorded."""
        args, kwargs = with_hidden(self.args, self.kwargs, hidden)
        output = output_of(self.block(*args, **kwargs))
        if output is None:
            raise StructureChanged(f"{self.name} returned no tensor")
        return output


@dataclass
class Recording:
    """The calls above the lowest hooked block.

    Attributes:
        below: the name of the block called just before the first of them: the lowest hooked one.
        bottom: [B, T, D], the output of that block.
        calls: the recorded calls, in the order of the forward.
        top: [B, T, D], the output of the last call.
        dtype: the format of the replays; that of the forward and of `top` may be wider.
    """

    below: str
    bottom: Tensor
    calls: list[BlockCall]
    top: Tensor
    dtype: torch.dtype

    def copy(self) -> "Recording":
        """The same with its own list of calls, which may be consumed."""
        return replace(self, calls=list(self.calls))

    def below_has(self, name: str, count: int) -> bool:
        """Whether a block of that name returns before the call number `count`."""
        return name == self.below or any(call.name == name for call in self.calls[:count])

    def cut(self, hidden: Tensor) -> None:
        """Remove the last call, whose input was `hidden`."""
        self.calls.pop()
        self.top = hidden


class PrimalCheck(NamedTuple):
    """What was replayed, its distance from the recorded value, the norm of that, and how much of it is allowed."""

    what: str
    gap: Tensor
    size: Tensor
    tolerance: float


_PENDING: ContextVar[list[PrimalCheck] | None] = ContextVar("checks of primals that wait", default=None)
_RUNNING: ContextVar[Layout | None] = ContextVar("the layout of the forward that is running", default=None)


class _BlocksEnded(Exception):
    """Ends the model's forward after its last block, because norm and logits of all positions are not needed."""


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Remove the hooks at the end of the context."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def forwards_set(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within the context the modules run these forwards; afterwards their former ones."""
    before: list[tuple[nn.Module, Any]] = []
    try:
        for module, forward in forwards:
            before.append((module, vars(module).get("forward")))
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in before:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def run_model(model: nn.Module, layout: Layout) -> Any:
    """A forward of the model on a layout, without a cache; its hooks may ask for the layout (`running`)."""
    token = _RUNNING.set(layout)
    try:
        return model(**forward_inputs(model, layout.input_ids, layout.position_ids, layout.attention_mask))
    finally:
        _RUNNING.reset(token)


def running() -> Layout | None:
    """The layout of the forward that this package is running; None outside of one."""
    return _RUNNING.get()


def run_blocks(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    call_order: Sequence[str],
    layout: Layout,
    stop_before_last: bool = False,
) -> Tensor:
    """Run the model to the end of its last block call, and return that call's output residual stream, [B, T, D].

    With `stop_before_last`, run to the beginning of that call and return its input.
    """
    ended: list[Tensor] = []
    seen = 0

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if seen == len(call_order) - 1:
            hidden = hidden_of(args, kwargs)
            if hidden is None:
                raise StructureChanged(f"{call_order[-1]} was called without a residual stream")
            ended.append(hidden)
            raise _BlocksEnded

    def count(name: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            nonlocal seen
            if seen >= len(call_order) or call_order[seen] != name:
                raise StructureChanged(f"block {name} was called out of the order that the probe saw")
            seen += 1
            if seen == len(call_order):
                hidden = output_of(output)
                if hidden is None:
                    raise StructureChanged(f"{name} returned no tensor")
                ended.append(hidden)
                raise _BlocksEnded

        return after

    handles = [b.register_forward_hook(count(name), with_kwargs=True) for name, b in blocks.items()]
    if stop_before_last:
        handles.append(blocks[call_order[-1]].register_forward_pre_hook(stop, with_kwargs=True))
    with hooks(*handles):
        try:
            run_model(model, layout)
        except _BlocksEnded:
            return ended[0]
    raise StructureChanged(f"the model's forward made {seen} block calls where the probe saw {len(call_order)}")


def record(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    call_order: Sequence[str],
    first: int,
    layout: Layout,
    narrow_to: torch.dtype | None = None,
    around: Callable[[list[BlockCall]], AbstractContextManager[None]] = lambda calls: nullcontext(),
    stop_before_last: bool = False,
) -> Recording:
    """Run the blocks and record the calls from number `first` on.

    Args:
        model: the causal LM.
        blocks: its decoder blocks by name.
        call_order: the names of the blocks in the order of their calls, as the probe saw them.
        first: the number of the first call to record.
        layout: the batch.
        narrow_to: the format in which the calls of a forward in float32 are recorded; None: the forward's own.
        around: makes a context for the forward from the list that receives its calls.
        stop_before_last: record the last call without running it; its input is stored as `top`.

    Raises:
        StructureChanged: the calls were not those of `call_order`.
    """
    calls: list[BlockCall] = []
    narrowed: dict[int, tuple[Tensor, Tensor]] = {}
    seen = 0

    def narrow(tensor: Tensor) -> Tensor:
        if narrow_to is None or tensor.dtype != torch.float32:
            return tensor
        if id(tensor) not in narrowed:  # many calls share a tensor, such as the rotary embedding
            narrowed[id(tensor)] = tensor, tensor.to(narrow_to)
        return narrowed[id(tensor)][1]

    def remember(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if seen >= first:
                hidden = hidden_of(args, kwargs)
                if hidden is None:
                    raise StructureChanged(f"{name} was called without a residual stream")
                # A copy, because a block may write into its input, and the replay needs the original.
                args, kwargs = with_hidden(args, kwargs, hidden.new_empty(0, 0))  # replays insert their own
                copy = hidden.clone() if narrow_to is None else hidden.to(narrow_to)
                args, kwargs = map_tensors((args, kwargs), narrow)
                calls.append(BlockCall(name, module, copy, args, kwargs, [], []))
            seen += 1

        return before

    bottom: list[Tensor] = []

    def keep_bottom(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output_of(output)
        if seen == first and not bottom and hidden is not None:
            bottom.append(hidden.clone() if narrow_to is None else hidden.to(narrow_to))

    handles = [
        b.register_forward_pre_hook(remember(name), prepend=True, with_kwargs=True) for name, b in blocks.items()
    ]
    handles += [b.register_forward_hook(keep_bottom) for b in blocks.values()]
    with around(calls), hooks(*handles):
        top = run_blocks(model, blocks, call_order, layout, stop_before_last)
    return Recording(call_order[first - 1], bottom[0], calls, top, bottom[0].dtype)


def check_primal(what: str, primal: Tensor, expected: Tensor) -> None:
    """Raise StructureChanged unless a replayed block returned what the recorded forward passed on.

    On a CPU the same operations on the same values agree to the bit; kernels that add in no fixed order may differ by
    rounding. Values that are not finite prove nothing and pass; the scores will contain them. Inside
    `primals_checked_together` it is raised at the end of the context.
    """
    gap = (primal - expected.to(primal.device)).float().norm()
    check = PrimalCheck(what, gap, expected.float().norm().to(gap.device), 16 * torch.finfo(primal.dtype).eps)
    if (pending := _PENDING.get()) is not None:
        pending.append(check)
    else:
        _raise_first([check])


@contextmanager
def primals_checked_together() -> Iterator[None]:
    """Evaluate the checks of the context at its end: a GPU is waited for once, and not at every block."""
    pending: list[PrimalCheck] = []
    token = _PENDING.set(pending)
    try:
        yield
    finally:
        _PENDING.reset(token)
    _raise_first(pending)


def _raise_first(checks: list[PrimalCheck]) -> None:
    if not checks:
        return
    device = checks[0].gap.device
    norms = torch.stack([torch.stack((c.gap, c.size)).to(device) for c in checks]).tolist()
    for check, (gap, size) in zip(checks, norms, strict=True):
        if gap > check.tolerance * size:
            away = gap / size if size else math.inf
            raise StructureChanged(f"{check.what} is {away:.1e} away from the recorded value")
