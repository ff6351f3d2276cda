"""The upper network in one piece: the head's input as a function of a bias at every position of the hooked modules.

It works for any hooked module of any model. Pulled back by `vmap` over `vjp` it is the kernel's whole form; by plain
autograd, one backward pass a cotangent, it is the loop, the last resort for what `torch.func` cannot express.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from fisher_vmap.model.layers import Hooked
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.recording import (
    StructureChanged,
    hooks,
    inputs_of,
    output_embedding,
    output_of,
    run_blocks,
    with_output,
)

Biases = dict[str, Tensor]  # [B, T, D] for each hooked module


def rows_from_blocks(
    model: nn.Module, blocks: Mapping[str, nn.Module], call_order: Sequence[str], layout: Layout
) -> Callable[[], Tensor]:
    """A function that runs the model's blocks and returns the last rows, [B, D]: the input of an `UnembeddingHead`."""

    def run() -> Tensor:
        return layout.last(run_blocks(model, blocks, call_order, layout))

    return run


def rows_from_logits(model: nn.Module, layout: Layout, *, gather: bool) -> Callable[[], Tensor]:
    """A function that runs the whole model and returns the last rows' logits, [B, V]: the input of a `LogitsHead`.

    With `gather` only those rows are unembedded: the hidden states are gathered before they enter the output embedding.
    That is right where what follows looks at each position alone.
    """
    unembedding = output_embedding(model) if gather else None
    B, T = layout.input_ids.shape

    def gather_last(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if args and isinstance(args[0], Tensor) and args[0].dim() == 3 and args[0].shape[:2] == (B, T):
            return (layout.last(args[0])[:, None], *args[1:])
        return None

    def run() -> Tensor:
        handles = [] if unembedding is None else [unembedding.register_forward_pre_hook(gather_last)]
        with hooks(*handles):
            logits: Tensor = model(**inputs_of(model, layout)).logits
        return logits[:, 0] if logits.shape[1] == 1 else layout.last(logits)

    return run


def with_biases(run: Callable[[], Tensor], modules: Mapping[str, Hooked]) -> Callable[[Biases], Tensor]:
    """The same function with a bias added to the output of each hooked module."""

    def biased(biases: Biases) -> Tensor:
        used: set[str] = set()

        def add(name: str) -> Callable[..., Any]:
            def after(_module: nn.Module, _args: Any, output: Any) -> Any:
                hidden = output_of(output)
                assert hidden is not None  # hooked_outputs has looked
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
            outputs[name] = place.gathered(hidden).clone()  # what comes next may write into it

        return after

    with torch.no_grad(), hooks(*(hook.module.register_forward_hook(look(n)) for n, hook in modules.items())):
        run()
    if missing := [name for name in modules if name not in outputs]:
        raise ValueError(f"{missing[0]} is never called in the forward pass; expected a module that the model uses")
    return outputs


def zero_biases(outputs: Biases) -> Biases:
    """A zero bias, [B, T, D], for each hooked module."""
    return {name: hidden.new_zeros(*hidden.shape[:2], hidden.shape[-1]) for name, hidden in outputs.items()}


def pullback_whole(
    function: Callable[[Biases], Tensor], biases: Biases
) -> tuple[Tensor, Callable[[Tensor, int | None], Biases]]:
    """The rows [B, X] and the map from their cotangents [K, B, X] to those of the biases, [B, T, K, D], in one call."""
    rows, pull = vjp(function, biases)  # type: ignore[misc]

    def pullback(cotangents_KBX: Tensor, chunk_size: int | None) -> Biases:
        (pulled,) = vmap(pull, out_dims=2, chunk_size=chunk_size)(cotangents_KBX)
        return pulled  # type: ignore[no-any-return]

    return rows, pullback


def pullback_loop(
    function: Callable[[Biases], Tensor], biases: Biases
) -> tuple[Tensor, Callable[[Tensor, int | None], Biases]]:
    """The same by plain autograd: K backward passes through one graph. `chunk_size` has no effect."""
    with torch.enable_grad():
        leaves = {name: bias.detach().requires_grad_() for name, bias in biases.items()}
        rows = function(leaves)

    def pullback(cotangents_KBX: Tensor, chunk_size: int | None) -> Biases:
        pulled = [
            torch.autograd.grad(rows, list(leaves.values()), cotangent, retain_graph=True)
            for cotangent in cotangents_KBX
        ]
        return {name: torch.stack([grads[i] for grads in pulled], 2) for i, name in enumerate(leaves)}

    return rows.detach(), pullback
