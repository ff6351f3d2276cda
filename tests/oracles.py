"""What the package must compute, computed by the plainest means. Nothing here imports the package.

Every function takes one prompt, unpadded, as token ids [T], and a model in evaluation mode with its own attention.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Plain(NamedTuple):
    """One prompt: log p [K], highest first unless the tokens were given; token ids [K]; scores [K, D]."""

    log_probs: Tensor
    token_ids: Tensor
    gradients: Tensor

    @property
    def fisher(self) -> Tensor:
        """sum_t p_t g_t g_t^T, [D, D]."""
        return fisher_matrix(self.log_probs, self.gradients)


def fisher_matrix(log_probs: Tensor, gradients: Tensor) -> Tensor:
    """F = sum_t p_t g_t g_t^T in float64, one outer product after the other."""
    log_probs, gradients = log_probs.double(), gradients.double()
    return sum((p * torch.outer(g, g) for p, g in zip(log_probs.exp(), gradients, strict=True)), torch.zeros(()))


@contextmanager
def bias_added(module: nn.Module, bias: Tensor) -> Iterator[None]:
    """Within the context `bias`, of any shape that broadcasts to [1, T, D], is added to what the module returns."""

    def add(_module: nn.Module, _args: Any, output: Any) -> Any:
        return output + bias if isinstance(output, Tensor) else (output[0] + bias, *output[1:])

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def width_of(model: nn.Module, ids_T: Tensor, layer: str) -> int:
    """D of a module's output."""
    seen: list[int] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _module, _args, output: seen.append(first_of(output).shape[-1])
    )
    with torch.no_grad():
        model(input_ids=ids_T[None], use_cache=False)
    handle.remove()
    return seen[0]


def log_probabilities(model: nn.Module, ids_T: Tensor) -> Tensor:
    """log p of the token after the prompt, [V]; float32 at least."""
    logits_V = model(input_ids=ids_T[None], use_cache=False).logits[0, -1]
    return logits_V.to(torch.promote_types(logits_V.dtype, torch.float32)).log_softmax(0)


def plain_scores(
    model: nn.Module,
    ids_T: Tensor,
    layer: str,
    *,
    top_k: int | None = None,
    token_ids: Tensor | None = None,
    where_T: Tensor | None = None,
) -> Plain:
    """One bias [D], one backward pass a token.

    Args:
        model, ids_T, layer: the model, the prompt and the name of the hooked module.
        top_k: the number of likeliest tokens; None with `token_ids` None: all V.
        token_ids: [K], the tokens.
        where_T: the positions that the bias is added at, [T] bool; None: all.
    """
    dtype = next(model.parameters()).dtype
    theta_D = torch.zeros(width_of(model, ids_T, layer), dtype=dtype, requires_grad=True)
    bias = theta_D if where_T is None else where_T.to(dtype)[:, None] * theta_D
    with torch.enable_grad(), bias_added(model.get_submodule(layer), bias):
        log_p_V = log_probabilities(model, ids_T)
        if token_ids is None:
            token_ids = log_p_V.detach().sort(descending=True, stable=True).indices[:top_k]
        rows = [torch.autograd.grad(log_p_V[t], theta_D, retain_graph=True)[0] for t in token_ids.tolist()]
    return Plain(log_p_V.detach()[token_ids], token_ids, torch.stack(rows))


def position_scores(model: nn.Module, ids_T: Tensor, layer: str, token_ids: Tensor) -> Tensor:
    """The gradient of each token's log p with respect to a bias of its own at every position, [K, T, D]."""
    dtype = next(model.parameters()).dtype
    theta_TD = torch.zeros(len(ids_T), width_of(model, ids_T, layer), dtype=dtype, requires_grad=True)
    with torch.enable_grad(), bias_added(model.get_submodule(layer), theta_TD):
        log_p_V = log_probabilities(model, ids_T)
        rows = [torch.autograd.grad(log_p_V[t], theta_TD, retain_graph=True)[0] for t in token_ids.tolist()]
    return torch.stack(rows)


def first_of(output: Any) -> Tensor:
    """A block's output, which may come with others."""
    return output if isinstance(output, Tensor) else output[0]


def plain_jacobians(
    model: nn.Module, ids_T: Tensor, layers: Sequence[str], top: str, valid: Sequence[int]
) -> dict[str, Tensor]:
    """Layer -> [D, D], the mean over t in `valid` of the sum over t' in `valid` of d h_t' / d h_t, with h of `top`.

    One backward pass for each dimension of h.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = first_of(output)
            seen[name] = hidden if hidden.requires_grad else hidden.requires_grad_()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in (*layers, top)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            model(input_ids=ids_T[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    rows: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for d in range(seen[top].shape[-1]):
        total = seen[top][0, list(valid), d].sum()
        grads = torch.autograd.grad(total, [seen[layer] for layer in layers], retain_graph=True)
        for layer, grad in zip(layers, grads, strict=True):
            rows[layer].append(grad[0, list(valid)].mean(0))
    return {layer: torch.stack(found) for layer, found in rows.items()}


def kl_hessian(model: nn.Module, ids_T: Tensor, layer: str) -> Tensor:
    """The Hessian of KL(p_0 || p_theta) at theta = 0, [D, D]: the Fisher matrix of the whole vocabulary.

    The model's attention must be one that can be differentiated twice ("eager").
    """
    module = model.get_submodule(layer)
    with torch.no_grad():
        log_p0_V = log_probabilities(model, ids_T)

    def kl(theta_D: Tensor) -> Tensor:
        with bias_added(module, theta_D):
            return (log_p0_V.exp() * (log_p0_V - log_probabilities(model, ids_T))).sum()

    zero_D = torch.zeros(width_of(model, ids_T, layer), dtype=log_p0_V.dtype)
    with torch.enable_grad():
        return torch.autograd.functional.hessian(kl, zero_D)


def linear_fisher(jacobian: Tensor, unembedding: Tensor, logits_V: Tensor) -> Tensor:
    """F of a model whose logits are W J theta + constant: J^T W^T (diag p - p p^T) W J."""
    p_V = logits_V.softmax(0)
    return jacobian.T @ unembedding.T @ (torch.diag(p_V) - torch.outer(p_V, p_V)) @ unembedding @ jacobian


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention one head at a time: q [B, H, T, E], k and v [B, G, S, E], `allowed` [B, H, T, S] bool or added.

    `sinks`, [H], is one more score of each head, of a key whose value is zero.
    """
    B, H = q.shape[:2]
    heads_a_key = H // k.shape[1]
    out = []
    for b in range(B):
        for h in range(H):
            scores = scale * q[b, h] @ k[b, h // heads_a_key].T
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if allowed is not None:
                here = allowed[b, h]
                scores = torch.where(here, scores, -torch.inf) if here.dtype == torch.bool else scores + here
            values = v[b, h // heads_a_key]
            if sinks is not None:
                scores = torch.cat((scores, sinks[h].expand(len(scores), 1)), 1)
                values = torch.cat((values, torch.zeros_like(values[:1])))
            out.append(scores.softmax(-1) @ values)
    return torch.stack(out).unflatten(0, (B, H))


def dense_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and right singular vectors of a dense matrix."""
    _, S, V = torch.linalg.svd(matrix.double())
    return S, V


@contextmanager
def in_float64() -> Iterator[None]:
    """Within it no float64 is cast to float32, as many models do in norms, softmax and routers."""
    to, single, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wide = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if wide else to(x, *args, **kwargs)

    def softmax_kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        return softmax(x, *args, **kwargs)

    try:
        Tensor.to, Tensor.float = kept, lambda x: x if x.dtype == torch.float64 else single(x)
        torch.nn.functional.softmax = softmax_kept
        yield
    finally:
        Tensor.to, Tensor.float, torch.nn.functional.softmax = to, single, softmax


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, Frobenius, in float64."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())
