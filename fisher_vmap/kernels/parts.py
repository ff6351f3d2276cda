"""What a block's rule is put together from: parts with a pullback, and what they need of the block's forward.

The forward is the block's own. Hooks keep what its modules receive and return, at the live rows, while there is room.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.func import vjp

from fisher_vmap.kernels.autograd import Scratch, pull_each
from fisher_vmap.kernels.hf_attention import AttentionCall, noting_calls
from fisher_vmap.model.recording import hidden_of, hooks, map_tensors, output_of, with_hidden

Pull = Callable[[Tensor, int, int], Tensor]
"""From cotangents [z - a, K, D] of a part's output at rows [a, z) to those of its input, in scratch memory."""


class Watched(NamedTuple):
    """The modules whose input, output, or other arguments a pullback needs."""

    inputs: tuple[nn.Module, ...] = ()
    outputs: tuple[nn.Module, ...] = ()
    calls: tuple[nn.Module, ...] = ()
    attention: tuple[nn.Module, ...] = ()

    @classmethod
    def all_of(cls, several: Iterable["Watched"]) -> "Watched":
        """What any of them watches, each module once."""
        fields = zip(*several, strict=True)
        return cls(*(tuple(dict.fromkeys(module for some in one for module in some)) for one in fields))


@dataclass
class Seen:
    """What modules received and returned in one call of a block; rows are those of the batch, or its live ones.

    Attributes:
        inputs: the first tensor that a module received, [N, ...].
        outputs: what it returned: a tensor [N, ...], or a tuple of them.
        calls: its positional and keyword arguments.
        attention: the calls of our attention by the module that made them.
        versions: how often each tensor had been written to when it was seen.
    """

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    attention: dict[nn.Module, AttentionCall] = field(default_factory=dict)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def note(self, tensor: Tensor) -> Tensor:
        """Remember how often a tensor has been written to."""
        self.versions.append((tensor, tensor._version))
        return tensor

    def unchanged(self) -> bool:
        """Whether no tensor has been written to since it was seen."""
        return all(tensor._version == version for tensor, version in self.versions)

    def only(self, watched: Watched) -> "Seen":
        """What is watched, without the rest."""
        return Seen(
            {module: self.inputs[module] for module in watched.inputs},
            {module: self.outputs[module] for module in watched.outputs},
            {module: self.calls[module] for module in watched.calls},
            {module: self.attention[module] for module in watched.attention},
        )

    def at(self, rows: Tensor | None, count: int) -> "Seen":
        """The same at some of `count` rows, which become the leading dimension; None: all. Keys stay those of all."""

        def narrow(tensor: Tensor) -> Tensor:
            flat = tensor.reshape(count, *tensor.shape[tensor.dim() - _inner(tensor, count) :])
            return flat if rows is None else flat[rows.to(flat.device)]

        def narrow_argument(tensor: Tensor) -> Tensor:
            has_rows = tensor.dim() > 1 and tensor.shape[:2] == (1, count)
            return tensor[:, rows.to(tensor.device)] if has_rows and rows is not None else tensor

        inputs = {module: narrow(x) for module, x in self.inputs.items()}
        outputs = {module: map_tensors(x, narrow) for module, x in self.outputs.items()}
        if rows is None:
            return Seen(inputs, outputs, self.calls, self.attention)
        calls = {module: map_tensors(call, narrow_argument) for module, call in self.calls.items()}
        attention = {m: call._replace(q=call.q[:, :, rows.to(call.q.device)]) for m, call in self.attention.items()}
        return Seen(inputs, outputs, calls, attention)

    def bytes(self) -> int:
        """The memory of these results."""
        found: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        map_tensors([*self.inputs.values(), *self.outputs.values()], count)
        map_tensors([[call.q, call.k, call.v] for call in self.attention.values()], count)
        return sum(found.values())


def _inner(tensor: Tensor, count: int) -> int:
    """How many of the last dimensions of a tensor are not rows: it is [1, N, ...], [B, T, ...], or [N, ...]."""
    if tensor.dim() > 2 and tensor.shape[0] * tensor.shape[1] == count:
        return tensor.dim() - 2
    if tensor.dim() > 0 and len(tensor) == count:
        return tensor.dim() - 1
    raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has no row for each of {count} positions")


class Part(Protocol):
    """A function of the rows of its input that is pulled back by hand, from results of its module's own forward."""

    @property
    def width(self) -> int:
        """The width of the widest row inside, for one cotangent: it decides how many go through at once."""

    def watched(self) -> Watched:
        """What the forward has to keep for `pull_from`."""

    def pull_from(self, seen: Seen, scratch: Scratch) -> Pull:
        """The pullback at the inputs of one forward."""


@contextmanager
def seeing(
    watched: Mapping[nn.Module, Watched],
    begin: Callable[[nn.Module], Seen | None],
    end: Callable[[nn.Module, Seen], None],
) -> Iterator[None]:
    """Within the context what is watched inside of blocks is noted, for each call that `begin` gives a `Seen` for."""
    now: Seen | None = None

    def opened(block: nn.Module, _args: Any) -> None:
        nonlocal now
        now = begin(block)

    def closed(block: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal now
        seen, now = now, None
        if seen is not None:
            end(block, seen)

    def received(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if now is not None and (x := hidden_of(args, kwargs)) is not None:
            now.inputs[module] = now.note(x)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if now is not None:
            now.calls[module] = args, kwargs

    def returned(module: nn.Module, _args: Any, output: Any) -> None:
        if now is not None:
            map_tensors(output, now.note)
            now.outputs[module] = output

    def attended(call: AttentionCall) -> None:
        if now is not None:
            for tensor in (call.q, call.k, call.v):
                now.note(tensor)
            now.attention[call.module] = call

    handles = []
    for block, parts in watched.items():
        handles.append(block.register_forward_pre_hook(opened))
        handles += [m.register_forward_pre_hook(received, with_kwargs=True) for m in parts.inputs]
        handles += [m.register_forward_pre_hook(called, with_kwargs=True) for m in parts.calls]
        handles += [m.register_forward_hook(returned) for m in parts.outputs]
        handles.append(block.register_forward_hook(closed))
    with ExitStack() as stack:
        stack.enter_context(hooks(*handles))
        if any(parts.attention for parts in watched.values()):
            stack.enter_context(noting_calls(attended))
        yield


@dataclass(frozen=True)
class ByAutograd:
    """A part without a rule: `vmap` over its `vjp`, all rows together.

    Attributes:
        module: the module.
        why: why it has no rule.
        mixes: whether positions interact in it, as in attention.
    """

    module: nn.Module
    why: str
    mixes: bool

    @property
    def width(self) -> int:
        """Of no meaning: all rows pass at once."""
        return 1

    def watched(self) -> Watched:
        """Its input and its other arguments."""
        return Watched(inputs=(self.module,), calls=(self.module,))

    def pull_from(self, seen: Seen, scratch: Scratch) -> Pull:
        """Pulls all rows."""
        args, kwargs = seen.calls[self.module]

        def run(x: Tensor) -> Tensor:
            inner_args, inner_kwargs = with_hidden(args, kwargs, x)
            output = output_of(self.module(*inner_args, **inner_kwargs))
            assert output is not None
            return output.reshape(x.shape)

        def pull(g_NKD: Tensor, a: int, z: int) -> Tensor:
            _, back = vjp(run, seen.inputs[self.module][None])  # type: ignore[misc]
            return pull_each(back, g_NKD[None], None)[0]

        return pull
