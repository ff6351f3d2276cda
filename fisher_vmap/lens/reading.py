"""What a lens reads at each layer and position of a prompt, and how much the output cares about a direction.

With h_l,t the output of block l at position t and J_l the layer's matrix, the readout is the model's own head at
J_l h_l,t: softmax(unembed(norm(J_l h_l,t))). With the identity in place of J_l it is the logit lens.

Tokens stand in two orders. "logit": by that distribution. "kl": by what they account for where it counts, in the
model's own final distribution p at t. With a_v the gradient of log p_v with respect to the last block's output there, a
step eps along u = J_l h_l,t / |h_l,t| changes p by KL = eps^2 sum_v s_v nats, to second order, and

    s_v = 1/2 p_v (a_v . u)^2

is the share of token v. One derivative of the head along u, for all tokens at once, gives all a_v . u.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp

from fisher_vmap.data.pieces import Pieces
from fisher_vmap.fisher import check_inputs
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.linear_map import undisturbed
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.whole import hooked_outputs
from fisher_vmap.model.head import MIN_ROWS, UnembeddingHead, check_top_k, likeliest, times_rows
from fisher_vmap.model.layers import hooked, resolve_layers
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.recording import run_blocks
from fisher_vmap.model.validation import in_float64

ORDERS = ("logit", "kl")
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**28}  # numbers of the logits that are computed together


@dataclass(frozen=True, eq=False)
class Readout:
    """What a lens reads of one prompt of T tokens, k tokens a layer and position; on the CPU.

    Attributes:
        tokens: [T] int64, the prompt.
        layers: the numbers of the blocks, in order.
        token_ids: layer -> [T, k] int64, in the order asked for.
        log_probs: layer -> [T, k], their log-probabilities in the lens's own distribution, in nats; float32, or float64
            of a float64 model.
        model_token_ids: [T, k] int64, the likeliest next tokens of the model itself.
        model_log_probs: [T, k], their log-probabilities, in nats.
        kl: of order "kl", layer -> [T, k], the share of each token, in nats per unit step squared; else empty.
        text: the prompt as text, if it was given as one.
    """

    tokens: Tensor
    layers: list[int]
    token_ids: dict[int, Tensor]
    log_probs: dict[int, Tensor]
    model_token_ids: Tensor
    model_log_probs: Tensor
    kl: dict[int, Tensor] = field(default_factory=dict)
    text: str | None = None

    def top_tokens(self, tokenizer: Any, k: int | None = None) -> dict[int, list[list[str]]]:
        """Layer -> for each position the first k tokens (None: all that were read), as text.

        Raises:
            ValueError: k is below 1 or above what was read.
        """
        most = self.model_token_ids.shape[1]
        if k is not None and not 1 <= k <= most:
            raise ValueError(f"k is {k}; expected 1 to {most}, the tokens that were read")
        pieces = Pieces(tokenizer)
        return {
            layer: [[pieces.single(token) for token in row] for row in ids_Tk[:, :k].tolist()]
            for layer, ids_Tk in self.token_ids.items()
        }

    def as_json(self, tokenizer: Any) -> dict[str, Any]:
        """Plain values, with every token as text.

        Returns:
            "text": str or None; "tokens": a text for each position; "layers": their numbers; "top": {layer: for each
            position [token, log-probability] of k tokens}; "kl": {layer: the same with shares}, empty for order
            "logit"; "model": for each position [token, log-probability]. Layers are keys as text; log-probabilities
            have four decimals, shares four digits.
        """
        pieces = Pieces(tokenizer)

        def told(ids_Tk: Tensor, values_Tk: Tensor, form: str) -> list[list[list[Any]]]:
            return [
                [[pieces.single(token), float(format(value, form))] for token, value in zip(*row, strict=True)]
                for row in zip(ids_Tk.tolist(), values_Tk.tolist(), strict=True)
            ]

        return {
            "text": self.text,
            "tokens": [pieces.single(token) for token in self.tokens.tolist()],
            "layers": list(self.layers),
            "top": {str(n): told(self.token_ids[n], self.log_probs[n], ".4f") for n in self.layers},
            "kl": {str(n): told(self.token_ids[n], self.kl[n], ".4g") for n in self.layers if n in self.kl},
            "model": told(self.model_token_ids, self.model_log_probs, ".4f"),
        }


class Sensitive(NamedTuple):
    """The directions of a layer along which the output changes most.

    Attributes:
        directions: [count, D] float64, orthonormal, the most sensitive first.
        kl: [count] float64, the predicted mean KL of a unit step along each, in nats.
    """

    directions: Tensor
    kl: Tensor


class Streams(NamedTuple):
    """A prompt's way through the blocks of a model.

    Attributes:
        head: the model's head, from the last block's output to the logits.
        outputs: layer -> [T, D], the block's output, float32 or wider.
        top: [T, D], the last block's output, likewise.
    """

    head: UnembeddingHead
    outputs: dict[int, Tensor]
    top: Tensor


@autocast_off()
def read(
    jacobians: Mapping[int, Tensor] | None,
    width: int,
    model: FisherModel | nn.Module,
    prompt: Any,
    *,
    layers: Sequence[int],
    top_k: int = 10,
    order: str = "logit",
    tokenizer: Any = None,
) -> Readout:
    """`JacobianLens.readout`, by the matrices of the layers, {layer: [D, D]} (None: the identity), D being `width`."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; expected 'logit' or 'kl'")
    fisher = _opened(model, tokenizer)
    check_top_k(top_k, fisher.vocabulary)
    ids_T, text = _one_prompt(fisher, prompt)
    token_ids, log_probs, kl = {}, {}, {}
    with torch.inference_mode(False), torch.no_grad(), undisturbed(fisher.model, fisher.precision):
        head, outputs, top_TD = streams(fisher, ids_T, layers)
        if top_TD.shape[1] != width or any(h_TD.shape[1] != width for h_TD in outputs.values()):
            raise ValueError(f"the lens is {width} wide, this model's blocks {top_TD.shape[1]}; expected its own lens")
        model_ids, model_log_probs = _likeliest(head, top_TD, top_k)
        for layer, h_TD in outputs.items():
            J_hTD = h_TD if jacobians is None else h_TD @ jacobians[layer].to(h_TD).T
            if order == "logit":
                token_ids[layer], log_probs[layer] = _likeliest(head, J_hTD, top_k)
            else:
                length_T1 = h_TD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(h_TD.dtype).tiny)
                token_ids[layer], log_probs[layer], kl[layer] = _by_kl(head, top_TD, J_hTD, J_hTD / length_T1, top_k)
    return Readout(ids_T.cpu(), list(layers), token_ids, log_probs, model_ids, model_log_probs, kl, text)


def streams(fisher: FisherModel, ids_T: Tensor, layers: Sequence[int]) -> Streams:
    """The outputs of blocks, by number, for one prompt, [T] int64, from one run; within `undisturbed`.

    Raises:
        ValueError: no such block, tokens that the model does not have, or a head that cannot be taken apart.
    """
    model = fisher.model
    layout = lay_out(ids_T[None].to(fisher.device), None, "all", "all")
    check_inputs(model, layout)
    names = resolve_layers(model, list(layers))
    known = probe(model, layout._replace(targets=None))
    if known.parts.head is None:
        raise ValueError(f"a lens cannot be read at this model: {known.why_no_head}; expected norm and unembedding")
    found: list[Tensor] = []

    def run() -> Tensor:
        found.append(run_blocks(model, known.parts.blocks, known.parts.call_order, layout))
        return found[0]

    outputs = hooked_outputs(run, hooked(model, names), layout)
    if other := [name for name in names if outputs[name].dim() != 3]:
        raise ValueError(f"{other[0]} has several residual streams; expected blocks that return [B, T, D]")
    wide = torch.promote_types(found[0].dtype, torch.float32)
    by_number = {layer: outputs[name][0].to(found[0].device, wide) for layer, name in zip(layers, names, strict=True)}
    return Streams(known.parts.head, by_number, found[0][0].to(wide))


def log_probabilities(head: UnembeddingHead, rows_ND: Tensor) -> Tensor:
    """Log p of all tokens at rows of the last block's output, [N, V], in nats; within `undisturbed`."""
    with head.on_device():
        return _log_softmax(head, rows_ND)


def along(head: UnembeddingHead, rows_ND: Tensor, moves_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Log p at rows, [N, V], and the derivative of each along a move of its row, a_v . u, [N, V]."""
    with head.on_device():
        log_p_NV, change_NV = jvp(lambda rows: _log_softmax(head, rows), (rows_ND,), (moves_ND,))  # type: ignore[misc]
    return log_p_NV, change_NV


def mean_kl(jacobian: Tensor, metric: Tensor, direction: Any) -> float | Tensor:
    """1/2 v^T J^T C J v for a direction v of length 1: see `JacobianLens.sensitivity`."""
    given = torch.as_tensor(direction).detach().to("cpu", torch.float64)
    D = jacobian.shape[1]
    if given.dim() not in (1, 2) or given.shape[-1] != D:
        raise ValueError(f"direction has shape {tuple(given.shape)}; expected [{D}] or [N, {D}]")
    v_ND = given.reshape(-1, D)
    length_N1 = v_ND.norm(dim=1, keepdim=True)
    if not bool(((length_N1 > 0) & length_N1.isfinite()).all()):
        raise ValueError("a direction is zero or not finite; expected a length above 0")
    moved_ND = v_ND / length_N1 @ in_float64(jacobian).cpu().T
    kl_N: Tensor = (moved_ND @ in_float64(metric).cpu() * moved_ND).sum(1) / 2
    return float(kl_N) if given.dim() == 1 else kl_N


def leading(jacobian: Tensor, metric: Tensor, count: int) -> Sensitive:
    """The leading eigenvectors of J^T C J: see `JacobianLens.sensitive_directions`."""
    D = jacobian.shape[1]
    if not 1 <= count <= D:
        raise ValueError(f"count is {count}; expected 1 to {D}, the width of the lens")
    J, C = in_float64(jacobian).cpu(), in_float64(metric).cpu()
    values_D, vectors_DD = torch.linalg.eigh(J.T @ ((C + C.T) / 2) @ J)
    return Sensitive(vectors_DD[:, -count:].T.flip(0), values_D[-count:].flip(0) / 2)


def _opened(model: FisherModel | nn.Module, tokenizer: Any) -> FisherModel:
    if not isinstance(model, FisherModel):
        return FisherModel(model, tokenizer, layers=0, top_k=1)
    if tokenizer is not None:
        raise ValueError("tokenizer was given with a FisherModel, which has its own; leave it out")
    return model


def _one_prompt(fisher: FisherModel, prompt: Any) -> tuple[Tensor, str | None]:
    """A prompt's token ids, [T] int64, and its text if it was given as one."""
    ids = isinstance(prompt, Tensor) or (isinstance(prompt, list | tuple) and all(isinstance(i, int) for i in prompt))
    if not ids:
        if isinstance(prompt, list) and not isinstance(prompt[0], dict):
            raise ValueError(f"prompt is a list of {len(prompt)} {type(prompt[0]).__name__}; a lens reads one prompt")
        rendered = fisher.renderer.render(fisher.renderer.given(prompt))
        return torch.tensor(rendered.ids), rendered.text
    ids_T = torch.as_tensor(prompt)
    ids_T = ids_T[0] if ids_T.dim() == 2 and len(ids_T) == 1 else ids_T
    if ids_T.dim() != 1 or not ids_T.numel() or ids_T.is_floating_point():
        raise ValueError(
            f"prompt has shape {tuple(ids_T.shape)} and dtype {ids_T.dtype}; expected token ids, [T] int64"
        )
    return ids_T.long(), None


def _log_softmax(head: UnembeddingHead, rows_ND: Tensor) -> Tensor:
    padded_ND = torch.cat([rows_ND, rows_ND[:1].expand(max(0, MIN_ROWS - len(rows_ND)), -1)])
    x_ND = head.norm(padded_ND).to(head.weight.device)
    pieces = []
    for where, weight_vD in head.chunks(x_ND.dtype):
        raw_Nv = times_rows(x_ND, weight_vD)
        pieces.append(head.phi(raw_Nv if head.bias is None else raw_Nv + head.bias[where].to(raw_Nv.dtype)))
    return torch.cat(pieces, 1)[: len(rows_ND)].log_softmax(1)


def _at_once(head: UnembeddingHead) -> int:
    """At how many rows all logits are computed together."""
    weight = head.weight
    return max(MIN_ROWS, LOGITS_AT_ONCE.get(weight.device.type, 2**24) // len(weight))


def _likeliest(head: UnembeddingHead, rows_TD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at each row, [T, k], and their log-probabilities."""
    found = []
    for rows_ND in rows_TD.split(_at_once(head)):
        log_p_NV = log_probabilities(head, rows_ND)
        ids_Nk = likeliest(log_p_NV, top_k)
        found.append((ids_Nk, log_p_NV.gather(1, ids_Nk)))
    ids, values = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return ids, values


def _by_kl(
    head: UnembeddingHead, top_TD: Tensor, lens_TD: Tensor, moves_TD: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of the largest shares, [T, k], their log-probabilities in the lens's distribution, and the shares."""
    found = []
    for rows_ND, lens_ND, moves_ND in zip(*(x.split(_at_once(head)) for x in (top_TD, lens_TD, moves_TD)), strict=True):
        log_p_NV, change_NV = along(head, rows_ND, moves_ND)
        share_NV = log_p_NV.exp() * change_NV.square() / 2
        ids_Nk = likeliest(share_NV, top_k)
        found.append((ids_Nk, log_probabilities(head, lens_ND).gather(1, ids_Nk), share_NV.gather(1, ids_Nk)))
    ids, values, shares = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return ids, values, shares
