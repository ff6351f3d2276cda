"""The reference for all comparisons: the model itself, one prompt at a time, and plain autograd.

The model runs unchanged, with its own attention, hooks and head, on the unpadded prompt alone. If a user's hook works
for the caller's batch only, that batch is run as it was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisher_vmap.linearize.residual_norms import residual_norm
from fisher_vmap.linearize.whole import rows_from_logits
from fisher_vmap.model.layers import Place, decoder_blocks, hooked
from fisher_vmap.model.layout import Layout, alone, as_given
from fisher_vmap.model.offload import is_offloaded, small_graph
from fisher_vmap.model.recording import forwards_set, hooks, output_of, run_model, with_output
from fisher_vmap.model.rope_scaling import forget_lengths
from fisher_vmap.model.validation import is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import hook_behind, is_hooked

GRAPH_ROWS = 8192  # most rows, over all blocks, whose graph is kept; beyond that blocks are run again in the backward


class Reference(NamedTuple):
    """One prompt, and the batch in which the model runs it.

    Attributes:
        layout: the prompt by itself, or the caller's batch.
        b: the prompt's index in it.
    """

    layout: Layout
    b: int

    @property
    def given(self) -> bool:
        """Whether the model is run on the caller's batch."""
        return self.layout.attention_mask is not None


class Plain(NamedTuple):
    """The result of plain autograd for one prompt.

    Attributes:
        log_probs: log p of every token, [V].
        scores: for each layer, the scores of K tokens, [K, D].
        norms: for each layer, the median norm of its output over the prompt's tokens.
    """

    log_probs: Tensor
    scores: Mapping[str, Tensor]
    norms: Mapping[str, float]


def reference_of(model: nn.Module, layout: Layout, b: int) -> Reference:
    """The prompt by itself, or in the caller's batch if the user's hooks allow nothing else.

    Raises:
        ValueError: the model runs on neither; the message names the hook.
    """
    one = Reference(alone(layout, b), 0)
    if not is_hooked(model):
        return one
    wrong = _why_not(model, one)
    if wrong is None:
        return one
    if layout.given is None:
        raise wrong
    given = Reference(as_given(layout), b)
    if (error := _why_not(model, given)) is not None:
        behind = hook_behind(model, error)
        raise ValueError(
            f"{behind or type(model).__name__} cannot be run on these {len(layout.lengths)} prompts of up to "
            f"{max(layout.lengths)} tokens ({first_line(error)}); expected a hook that works for them"
        ) from error
    return given


def _why_not(model: nn.Module, reference: Reference) -> Exception | None:
    """The error of a forward on these prompts, or of logits that do not have a row for each token; None if it works."""
    forget_lengths(model)
    ids = reference.layout.input_ids
    try:
        with torch.no_grad():
            logits: Tensor = run_model(model, reference.layout).logits
    except Exception as error:  # a user's hook may raise anything
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        return error
    if logits.shape[:2] == ids.shape:
        return None
    return ValueError(f"logits of shape {tuple(logits.shape)} for prompts {tuple(ids.shape)}")


def plain_log_probs(model: nn.Module, reference: Reference) -> Tensor:
    """Log p of every next token, [V], in float32 or wider, from one forward of the unchanged model."""
    forget_lengths(model)
    with torch.no_grad():
        row_V = rows_from_logits(model, reference.layout, gather=False)()[reference.b]
        return _log_softmax(row_V).to(reference.layout.device)


@contextmanager
def noting_autocast() -> Iterator[set[torch.dtype]]:
    """Yield a set that collects the formats of every autocast that is active when a module is called."""
    found: set[torch.dtype] = set()

    def look(_module: nn.Module, args: Any) -> None:
        kinds = {x.device.type for x in args if isinstance(x, Tensor)} if isinstance(args, tuple) else set()
        found.update(torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind))

    with hooks(torch.nn.modules.module.register_module_forward_pre_hook(look)):
        yield found


def plain_autograd(
    model: nn.Module, reference: Reference, layers: Sequence[str], token_ids: Tensor, gather: bool = False
) -> Plain:
    """Scores of tokens [K] by the model's own attention, logits and backward.

    With `gather` only the last rows are unembedded, which is right if everything after treats positions independently.

    Raises:
        RuntimeError: or any other error of torch or the model; it cannot be differentiated.
    """
    layout, b = reference
    run = rows_from_logits(model, layout, gather=gather)
    biases: dict[str, Tensor] = {}
    norms: dict[str, float] = {}

    def add(name: str, place: Place) -> Callable[..., Any]:
        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output_of(output)
            assert hidden is not None
            norms[name] = float(residual_norm(place.gathered(hidden.detach()), layout)[b])
            if name not in biases:
                biases[name] = hidden.new_zeros(1, 1, hidden.shape[-1]).requires_grad_()
            return with_output(output, hidden + place.spread(_spread(biases[name], layout, b)))

        return after

    forget_lengths(model)
    handles = [hook.module.register_forward_hook(add(name, hook.place)) for name, hook in hooked(model, layers).items()]
    blocks = list(decoder_blocks(model))
    first = min(blocks.index(layer) if layer in blocks else 0 for layer in layers)
    graph_rows = layout.input_ids.numel() * (len(blocks) - first)
    graph = _graph_made_again(model) if graph_rows > GRAPH_ROWS else nullcontext()
    with torch.enable_grad(), small_graph(model), hooks(*handles), graph:
        log_p_V = _log_softmax(run()[b])
        if missing := [layer for layer in layers if layer not in biases]:
            raise RuntimeError(f"{missing[0]} is never called in the forward pass")
        leaves = [biases[layer] for layer in layers]
        grads = [torch.autograd.grad(log_p_V[token], leaves, retain_graph=True) for token in token_ids.tolist()]
    scores = {layer: torch.stack([g[i][0, 0] for g in grads]) for i, layer in enumerate(layers)}
    return Plain(log_p_V.detach().to(layout.device), scores, norms)


def _log_softmax(row_V: Tensor) -> Tensor:
    return row_V.to(torch.promote_types(row_V.dtype, torch.float32)).log_softmax(0)


def _spread(bias_11D: Tensor, layout: Layout, b: int) -> Tensor:
    """The bias at the positions where it is added: all, [1, 1, D], or some rows of one prompt, [B, T, D]."""
    if isinstance(layout.positions, str) and layout.positions == "all" and len(layout.lengths) == 1:
        return bias_11D
    where_N = torch.zeros(layout.input_ids.numel(), dtype=torch.bool, device=layout.device)
    first, stop = layout.ranges()[b]
    where_N[first:stop] = True
    if (mask_N := layout.bias_mask()) is not None:
        where_N &= mask_N.bool()
    return bias_11D * where_N.view(*layout.input_ids.shape, 1).to(bias_11D)


@contextmanager
def _graph_made_again(model: nn.Module) -> Iterator[None]:
    """Within the context a block's graph is not kept; its backward runs the block again."""
    if is_offloaded(model):
        yield
        return

    def again(forward: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    with forwards_set([(block, again(block.forward)) for block in decoder_blocks(model).values()]):
        yield


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
