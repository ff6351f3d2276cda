"""What a user would write without the package. Nothing here imports it: these are also the oracle of the benchmarks.

`plain_pipeline` is the first thing that works: one bias vector for the whole batch, so that every score costs a
backward pass of its own, and F as a dense matrix. `careful_pipeline` is the best loop that we could find: one bias row
a prompt makes one backward pass serve the whole batch, and nothing is computed that the scores do not need. Variants
were timed against each other (the bias as one row or as a leaf at every position; the gradient taken from log p, from
z - logsumexp z, or with one-hot minus p given as the logits' gradient); they differ by less than 3%, and the plainest
was kept.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Loop(NamedTuple):
    """What a loop of backward passes gives: log_probs [B, K], token_ids [B, K], gradients [B, K, D] float32."""

    log_probs: Tensor
    token_ids: Tensor
    gradients: Tensor


class Decomposed(NamedTuple):
    """A loop's scores, and of each prompt's F the leading singular values [B, R] and vectors [B, R, D]."""

    scores: Loop
    singular_values: Tensor
    vectors: Tensor


def plain_loop(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, top_k: int) -> Loop:
    """One bias vector [D] shared by the batch, hence B x K backward passes, and the logits of every position."""
    with _prepared(model):
        bias_D = torch.zeros(_width(model), dtype=model.dtype, device=input_ids.device, requires_grad=True)
        with _hooked(model.get_submodule(layer).register_forward_hook(_adding(bias_D))):
            logits_BTV = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        last_B = attention_mask.sum(1) - 1
        rows_BV = logits_BTV[torch.arange(len(last_B), device=last_B.device), last_B]
        top = rows_BV.float().log_softmax(-1).topk(top_k)
        gradients = [torch.autograd.grad(log_p, bias_D, retain_graph=True)[0].float() for log_p in top.values.flatten()]
    return Loop(top.values.detach(), top.indices, torch.stack(gradients).view(*top.values.shape, -1))


def plain_pipeline(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, layer: str, top_k: int, rank: int
) -> Decomposed:
    """`plain_loop`, then F = sum_t p_t g_t g_t^T as a dense matrix [D, D] a prompt, and its dense SVD."""
    scores = plain_loop(model, input_ids, attention_mask, layer, top_k)
    values, vectors = [], []
    for log_p_K, G_KD in zip(scores.log_probs, scores.gradients, strict=True):
        F_DD = (G_KD.T * log_p_K.exp()) @ G_KD
        _U, S, Vh = torch.linalg.svd(F_DD)
        values.append(S[:rank])
        vectors.append(Vh[:rank])
    return Decomposed(scores, torch.stack(values), torch.stack(vectors))


def careful_loop(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layer: str,
    top_k: int,
    token_ids: Tensor | None = None,
    where: Tensor | None = None,
) -> Loop:
    """One bias row a prompt, [B, 1, D], hence K backward passes a batch.

    The prompts do not touch one another, so the gradient of a sum over the batch holds each prompt's own in its row.
    The padding stands on the right, where a causal model does not see it, so no mask is given and the fused causal
    attention runs. Only the last real token of each prompt is unembedded, in a 2-D product. No parameter asks for a
    gradient, so nothing below the hook is kept. `where` [B, T] says at which positions the bias is added; None: all.
    """
    last_B = attention_mask.sum(1) - 1
    each_B = torch.arange(len(last_B), device=last_B.device)
    with _prepared(model):
        theta_B1D = torch.zeros(
            len(last_B), 1, _width(model), dtype=model.dtype, device=input_ids.device, requires_grad=True
        )
        with _hooked(
            model.get_submodule(layer).register_forward_hook(_adding(theta_B1D, where)),
            model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: (args[0][each_B, last_B],)),
        ):
            logits_BV = model(input_ids=input_ids, use_cache=False).logits
        log_p_BV = logits_BV.float().log_softmax(-1)
        if token_ids is None:
            log_p_BK, token_ids = log_p_BV.topk(top_k)
        else:
            log_p_BK = log_p_BV.gather(1, token_ids)
        K = log_p_BK.shape[1]
        gradients = [
            torch.autograd.grad(log_p_BK[:, k].sum(), theta_B1D, retain_graph=k < K - 1)[0][:, 0] for k in range(K)
        ]
    return Loop(log_p_BK.detach(), token_ids, torch.stack(gradients, 1).float())


def careful_pipeline(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    layer: str,
    top_k: int,
    rank: int,
    where: Tensor | None = None,
) -> Decomposed:
    """`careful_loop`, then the thin SVD of diag(sqrt p) G, whose squared singular values are those of F."""
    scores = careful_loop(model, input_ids, attention_mask, layer, top_k, where=where)
    A_BKD = (scores.log_probs / 2).exp()[:, :, None] * scores.gradients
    _U, sigma, Vh = torch.linalg.svd(A_BKD, full_matrices=False)
    return Decomposed(scores, sigma[:, :rank] ** 2, Vh[:, :rank])


def with_compiled_blocks(model: nn.Module) -> nn.Module:
    """A copy of the model whose decoder blocks are compiled, for `careful_loop`.

    It is a faster loop once it is compiled, which takes tens of seconds, and as long again for other lengths.
    """
    import torch._functorch.config

    # A compiled backward pass frees what it has used, unless told that it will be called again.
    torch._functorch.config.donated_buffer = False
    compiled: Any = copy.deepcopy(model)
    for block in compiled.model.layers:
        block.forward = torch.compile(block.forward)
    return compiled


def last_logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    """[B, V]: a forward pass without gradients that unembeds the last position only, in a 2-D product."""
    with (
        torch.no_grad(),
        _hooked(model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: (args[0][:, -1],))),
    ):
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits


def bare_forward(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, V]: the last token's logits by a forward pass as transformers runs it: padded, with the mask, no gradients.

    The padding stands on the left, as transformers has it for generation: the last column is every prompt's last token,
    and it alone is unembedded where the model can leave the others out. It is given to the unembedding as one piece of
    memory: torch would copy the whole matrix for each prompt on a CPU otherwise, and a forward pass of GPT-2's took ten
    times as long.
    """
    leave_out = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    unembedding: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    in_one_piece = unembedding.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(),))
    try:
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False, **leave_out
            ).logits
    finally:
        in_one_piece.remove()
    return logits[:, -1]


def padded_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same prompts with their padding on the left, for `bare_forward`."""
    empty_B = (attention_mask == 0).sum(1).tolist()
    rows = zip(input_ids, attention_mask, empty_B, strict=True)
    moved = [(ids.roll(n), mask.roll(n)) for ids, mask, n in rows]
    return torch.stack([ids for ids, _ in moved]), torch.stack([mask for _, mask in moved])


def _width(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[1])


def _adding(bias: Tensor, where: Tensor | None = None) -> Callable[..., Any]:
    """A forward hook that adds the bias to a block's output, whether that is a tensor or a tuple."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        step = bias if where is None else where.to(bias.dtype)[:, :, None] * bias
        return output + step if isinstance(output, Tensor) else (output[0] + step, *output[1:])

    return add


@contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _prepared(model: nn.Module) -> Iterator[None]:
    """Gradients on, evaluation mode, and no parameter that asks for a gradient; requires_grad as before afterwards."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
