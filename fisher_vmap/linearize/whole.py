"""The linear map in one piece: the head's input as a function of a bias at every position of the hooked modules.

It works for any hooked module of any model. `Whole` takes its products by `vmap` over `vjp` and `jvp`. `Loop` runs one
backward pass of plain autograd for each cotangent, the last resort for models that `torch.func` cannot transform.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from fisher_vmap.linearize.block import Arrived
from fisher_vmap.linearize.linear_map import LinearMap
from fisher_vmap.model.head import Head, LogitsHead
from fisher_vmap.model.layers import Hooked, hooked
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.patches import OldFunction
from fisher_vmap.model.recording import (
    StructureChanged,
    hooks,
    output_embedding,
    output_of,
    run_blocks,
    run_model,
    with_output,
)

Biases = dict[str, Tensor]  # [B, T, D] for each hooked module


class Whole(LinearMap):
    """Everything above the hooked modules in one piece."""

    _at_once = True

    def _open(self) -> None:
        if self._precision == "mixed":
            raise ValueError(
                f"precision mixed needs the layerwise kernel, which {self.layers[0]} cannot have; use precision float32"
            )
        modules = hooked(self._model, self.layers)
        run, self.head = self._run_and_head(modules)
        self._outputs = hooked_outputs(run, modules, self.layout)
        self._zeros = zero_biases(self._outputs)
        self._function = with_biases(run, modules)
        rows, self._pullback = self._linearized()
        self.rows, self.dtype = rows.detach(), rows.dtype
        self._describe(self._outputs)

    def _run_and_head(self, modules: Mapping[str, Hooked]) -> tuple[Callable[[], Tensor], Head]:
        """The network up to the end of the blocks, or to the logits if necessary, and the head of its rows."""
        model, parts, layout = self._model, self._parts, self.layout
        if parts.head is None or any(id(hook.module) in parts.above for hook in modules.values()):
            unembedding = output_embedding(model)  # if it is hooked, it must see all positions
            gather = parts.gather and all(hook.module is not unembedding for hook in modules.values())
            return rows_from_logits(model, layout, gather=gather), LogitsHead()
        return lambda: layout.targets_of(run_blocks(model, parts.blocks, parts.call_order, layout)), parts.head

    def _linearized(self) -> tuple[Tensor, Callable[[Tensor], Biases]]:
        """The rows, [M, X], and the map from their cotangents, [K, M, X], to those of the biases, [B, T, K, D]."""
        rows, pull = vjp(self._function, self._zeros)  # type: ignore[misc]

        def pullback(cotangents_KMX: Tensor) -> Biases:
            (pulled,) = vmap(pull, out_dims=2, chunk_size=self._chunk_size)(cotangents_KMX)
            return pulled  # type: ignore[no-any-return]

        return rows, pullback

    def _pull(self, unit_KMX: Tensor) -> Generator[Arrived, None, None]:
        arrived = self._pullback(unit_KMX.to(self.dtype))
        for layer in self.layers:
            yield Arrived(layer, arrived.pop(layer).contiguous())  # autograd chooses the strides, and they the rounding

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        def push(tangent: Tensor) -> Tensor:
            moved = {other: torch.zeros_like(zero) for other, zero in self._zeros.items()}
            moved[layer] = tangent
            return jvp(self._function, (self._zeros,), (moved,))[1]  # type: ignore[no-any-return]

        moved: Tensor = vmap(push, in_dims=2, chunk_size=self._chunk_size)(tangents.to(self._zeros[layer]))
        return moved


class Loop(Whole):
    """The same by plain autograd and the model's own forward: K backward passes through one graph; no push."""

    def _run_and_head(self, modules: Mapping[str, Hooked]) -> tuple[Callable[[], Tensor], Head]:
        return rows_from_logits(self._model, self.layout, gather=False), LogitsHead()

    def _linearized(self) -> tuple[Tensor, Callable[[Tensor], Biases]]:
        with torch.enable_grad():
            leaves = {name: bias.detach().requires_grad_() for name, bias in self._zeros.items()}
            rows = self._function(leaves)

        def pullback(cotangents_KMX: Tensor) -> Biases:
            pulled = [
                torch.autograd.grad(rows, list(leaves.values()), cotangent, retain_graph=True)
                for cotangent in cotangents_KMX
            ]
            return {name: torch.stack([grads[i] for grads in pulled], 2) for i, name in enumerate(leaves)}

        return rows, pullback

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        raise NotImplementedError("the loop has no forward derivatives")

    def _old_functions(self) -> Sequence[OldFunction]:
        return ()


def rows_from_logits(model: nn.Module, layout: Layout, *, gather: bool) -> Callable[[], Tensor]:
    """A function that runs the whole model and returns the logits at the targets, [M, V]: the input of a `LogitsHead`.

    With `gather` the targets are selected before the output embedding, so that only they are unembedded. That is right
    if everything after the output embedding treats positions independently.
    """
    unembedding = output_embedding(model) if gather else None
    B, T = layout.input_ids.shape

    def gather_last(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == (B, T):
            return (layout.targets_of(args[0])[:, None], *args[1:])
        return None

    def run() -> Tensor:
        handles = [] if unembedding is None else [unembedding.register_forward_pre_hook(gather_last)]
        with hooks(*handles):
            logits: Tensor = run_model(model, layout).logits
        return logits[:, 0] if logits.shape[1] == 1 else layout.targets_of(logits)

    return run


def with_biases(run: Callable[[], Tensor], modules: Mapping[str, Hooked]) -> Callable[[Biases], Tensor]:
    """The same function with a bias added to the output of each hooked module."""

    def biased(biases: Biases) -> Tensor:
        used: set[str] = set()

        def add(name: str) -> Callable[..., Any]:
            def after(_module: nn.Module, _args: Any, output: Any) -> Any:
                hidden = output_of(output)
                assert hidden is not None  # checked by hooked_outputs
                used.add(name)
                bias = modules[name].place.spread(biases[name]).to(hidden.dtype)
                return with_output(output, hidden + bias)

            return after

        with hooks(*(hook.module.register_forward_hook(add(name)) for name, hook in modules.items())):
            rows = run()
        if missing := set(modules) - used:
            raise StructureChanged(f"{sorted(missing)[0]} was not called in the forward pass")
        return rows

    return biased


def hooked_outputs(run: Callable[[], Tensor], modules: Mapping[str, Hooked], layout: Layout) -> Biases:
    """The output, [B, T, D] or [B, T, S, D], of each hooked module in one run of the model without gradients.

    Raises:
        ValueError: a module was not called, or its output is not a tensor [B, T, D] nor a tuple that starts with one.
    """
    B, T = layout.input_ids.shape
    outputs: Biases = {}

    def look(name: str) -> Callable[..., None]:
        def after(module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output_of(output)
            place = modules[name].place
            if hidden is None or not place.fits(hidden.shape, B, T):
                shape = type(output).__name__ if hidden is None else tuple(hidden.shape)
                raise ValueError(
                    f"{name} ({type(module).__name__}) returns {shape} for {B} prompts of {T} tokens; "
                    "expected a tensor [B, T, D]: hook a decoder block or a module inside one"
                )
            outputs[name] = place.gathered(hidden).clone()  # a copy, because the next module may write into it

        return after

    with torch.no_grad(), hooks(*(hook.module.register_forward_hook(look(n)) for n, hook in modules.items())):
        run()
    if missing := [name for name in modules if name not in outputs]:
        raise ValueError(f"{missing[0]} is never called in the forward pass; expected a module that the model uses")
    return outputs


def zero_biases(outputs: Biases) -> Biases:
    """A zero bias, [B, T, D], for each hooked module."""
    return {name: hidden.new_zeros(*hidden.shape[:2], hidden.shape[-1]) for name, hidden in outputs.items()}
