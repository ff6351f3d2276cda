"""Attention whose backward handles many cotangents at once.

Fused attention kernels have no batching rule for their backward, so `vmap` would loop over the cotangents. Here the
forward is fused and the backward has its own `vmap` rule. For one head, with P = softmax(scale q k^T + mask),

    dV = P^T dO        dP = dO V^T        dS = P * (dP - rowsum(P * dP))        dQ = scale dS k        dK = scale dS^T q

and q, k, v and P are the same for all K cotangents. With K next to the innermost dimension each product is one matrix
product: K joins the rows of dP and dQ, the columns of dV, and the rows of dK. Query heads that share a key-value head
join the contraction, so keys and values are never repeated. Queries are taken in blocks: memory is linear in T.

    Letters: B prompts, G key-value heads, M query heads for each, T queries, S keys, E head width, K cotangents.

The forward derivative, for tangents dq, dk, dv, handles many in the same way:

    dS = scale (dq k^T + q dk^T)        dP = P * (dS - rowsum(P * dS))        dO = dP v + P dv
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, Scratch, cotangent_dim, softmax_pullback
from fisher_vmap.model.layout import Group

# Elements of dP in one block of queries: few enough for a CPU's cache, enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}


@dataclass(frozen=True)
class AttentionKind:
    """The settings of an attention.

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.

    Attributes:
        scale: the factor of the scores.
        causal: whether, without a mask, query t sees keys up to t + S - T only.
        groups: if prompts are packed end to end, the prompts in groups; no prompt sees another's positions.
        one_query: with groups: whether there is one query for each prompt, [1, H, B, E], which sees all of its keys.
    """

    scale: float
    causal: bool
    groups: tuple[Group, ...] | None = None
    one_query: bool = False

    def alone(self) -> "AttentionKind":
        """The same kind within one prompt."""
        return AttentionKind(self.scale, self.causal)


def probabilities(
    q: Tensor, k_BGSE: Tensor, mask: Tensor | None, kind: AttentionKind, start: int, stop: int, ahead: int
) -> Tensor:
    """P of a block of queries, [B, H, t, S], in the dtype of q; scores and softmax are computed in float32.

    Without a mask, query t of a causal attention sees the keys up to t + `ahead`.
    """
    B, H, _, E = q.shape
    G, S = k_BGSE.shape[1], k_BGSE.shape[2]
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    q_rows = q[:, :, start:stop].reshape(B, G, -1, E).to(score_dtype)
    scores = (q_rows @ k_BGSE.to(score_dtype).mT).view(B, H, stop - start, S).mul_(kind.scale)
    if mask is not None:
        block = mask[..., start:stop, :] if mask.shape[-2] != 1 else mask
        if block.dtype == torch.bool:
            scores.masked_fill_(~block, -torch.inf)
        else:
            scores += block
    elif kind.causal:
        last_key = torch.arange(start, stop, device=q.device) + ahead
        scores.masked_fill_(torch.arange(S, device=q.device) > last_key[:, None], -torch.inf)
    return scores.softmax(-1).to(q.dtype)


def keys_seen(keys: int, all_keys: int) -> int:
    """How many keys to take for a block of queries that sees this many.

    The number is rounded up, so that blocks share sizes: for every new size of a product the CPU's library compiles and
    keeps a program, and those of a long prompt would take more memory than its tensors.
    """
    step = max(32, all_keys // 16)
    return min(all_keys, -(-keys // step) * step)


def query_blocks(T: int, elements_a_query: int, device: torch.device) -> list[tuple[int, int]]:
    """Blocks of queries whose dP stays below the device's limit."""
    limit = BLOCK_ELEMENTS.get(device.type, 2**24)
    size = max(16, limit // max(1, elements_a_query))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


class AttentionPushforward(Pushforward):
    """From tangents of queries, keys and values to those of the output; each of the three may be batched or not."""

    @staticmethod
    def forward(dq: Tensor, dk: Tensor, dv: Tensor, *shared: Any) -> Tensor:
        """For one tangent of each."""
        dq, dk, dv = (t[:, :, :, None] for t in (dq, dk, dv))
        return pushforward_attention(dq, dk, dv, *shared).squeeze(3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """For K tangents of each."""
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("only the tangents can be batched: everything else is shared by all of them")
        tangents = [
            t.movedim(dim, 3) if dim is not None else t[:, :, :, None].expand(-1, -1, -1, info.batch_size, -1)
            for t, dim in zip(inputs[:3], in_dims[:3], strict=True)
        ]
        return pushforward_attention(*tangents, *inputs[3:]), 3


def pushforward_attention(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind
) -> Tensor:
    """From K tangents of queries, keys and values, dq [B, H, T, K, E], dk [B, G, S, K, E] and dv [B, G, S, K, Ev].

    Returns:
        [B, H, T, K, Ev], those of the output of `attention`, in the dtype of q.
    """
    if kind.groups is not None:
        return _push_groups(dq, dk, dv, q, k, v, kind, kind.groups)
    B, H, T, K, E = dq.shape
    G, S, Ev = v.shape[1:]
    M = H // G
    out = torch.empty(B, H, T, K, Ev, dtype=q.dtype, device=q.device)
    dk_BGEKS = dk.permute(0, 1, 4, 3, 2)
    for start, stop in query_blocks(T, B * H * K * S, q.device):
        keys = keys_seen(stop + S - T, S) if kind.causal and mask is None else S
        n = stop - start
        q_BGtE = q[:, :, start:stop].reshape(B, G, M * n, E)
        k_BGSE, v_BGSE = k[:, :, :keys], v[:, :, :keys]
        P_BHtS = probabilities(q, k_BGSE, mask, kind, start, stop, S - T)
        dq_rows = dq[:, :, start:stop].reshape(B, G, M * n * K, E)
        dS = (dq_rows @ k_BGSE.mT).view(B, G, M * n, K * keys)
        dS += q_BGtE @ dk_BGEKS[..., :keys].reshape(B, G, E, K * keys)
        dS = dS.view(B, H, n, K, keys)
        P_BHt1S = P_BHtS.unsqueeze(3)
        dP = dS.mul_(P_BHt1S)
        dP.addcmul_(P_BHt1S, dP.sum(-1, keepdim=True), value=-1)
        part = (dP.view(B, G, M * n * K, keys) @ v_BGSE).view(B, H, n, K, Ev).mul_(kind.scale)
        dv_BGSKE = dv[:, :, :keys].reshape(B, G, keys, K * Ev)
        part += (P_BHtS.reshape(B, G, M * n, keys) @ dv_BGSKE).view(B, H, n, K, Ev)
        out[:, :, start:stop] = part
    return out


def _push_groups(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, groups: tuple[Group, ...]
) -> Tensor:
    out = q.new_empty(*q.shape[:3], dq.shape[3], v.shape[3])
    alone = kind.alone()
    for group in groups:
        # Padding repeats the prompt's last row: no real query sees it, and its output is dropped.
        take = group.take_queries if kind.one_query else group.take
        dk_group, dv_group, k_group, v_group = (group.take(x) for x in (dk, dv, k, v))
        mask = group.real[:, None, None] if kind.one_query else None
        part = pushforward_attention(take(dq), dk_group, dv_group, take(q), k_group, v_group, mask, alone)
        (group.put_queries if kind.one_query else group.put)(out, part)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind) -> Tensor:
    """Scaled dot-product attention, [B, H, T, E], with a backward that `vmap` can batch without looping.

    Args:
        q: [B, H, T, E].
        k: [B, G, S, E], with H a multiple of G.
        v: [B, G, S, Ev].
        mask: None, or a tensor that broadcasts to [B, H, T, S]: bool (True takes part) or floating (added).
        kind: the scale, and whether position t sees keys up to t + S - T only (with mask None).
    """
    return _Attention.apply(q, k, v, mask, kind)  # type: ignore[no-any-return]


class _Attention(Derived):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind) -> Tensor:
        return attention_forward(q, k, v, mask, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, mask, ctx.kind = inputs
        ctx.save_for_backward(q, k, v, mask)
        ctx.save_for_forward(q, k, v, mask)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dq, dk, dv = _AttentionPullback.apply(grad_out, *ctx.saved_tensors, ctx.kind)
        return dq, dk, dv, None, None

    @staticmethod
    def jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: Any) -> Tensor:
        q, k, v, mask = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) if t is None else t for t, x in ((dq, q), (dk, k), (dv, v)))
        return AttentionPushforward.apply(dq, dk, dv, q, k, v, mask, ctx.kind)  # type: ignore[no-any-return]


def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind) -> Tensor:
    """The output, by the fused kernels."""
    if kind.groups is None:
        causal, grouped = kind.causal and mask is None, k.shape[1] != q.shape[1]
        if causal and q.shape[2] != k.shape[2]:  # the fused kernels align the causal mask at the first key instead
            mask, causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device), False
            mask = mask.tril(k.shape[2] - q.shape[2])
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=kind.scale, enable_gqa=grouped
        )
    out = q.new_empty(*q.shape[:3], v.shape[3])
    for group in kind.groups:
        k_group, v_group = group.take(k), group.take(v)
        if kind.one_query:
            part = attention_forward(group.take_queries(q), k_group, v_group, group.real[:, None, None], kind.alone())
            group.put_queries(out, part)
        else:
            group.put(out, attention_forward(group.take(q), k_group, v_group, None, kind.alone()))
    return out


class _AttentionPullback(Pullback):
    @staticmethod
    def forward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = pullback_attention(grad_out[:, :, :, None], q, k, v, mask, kind)
        return dq.squeeze(3), dk.squeeze(3), dv.squeeze(3)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad_out: Tensor, *shared: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        return pullback_attention(grad_out.movedim(cotangent_dim(in_dims), 3), *shared), (3, 3, 3)


def pullback_attention(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind
) -> tuple[Tensor, Tensor, Tensor]:
    """From K cotangents of the output of `attention`, [B, H, T, K, Ev], to those of its queries, keys and values.

    Returns:
        dq [B, H, T, K, E], dk [B, G, S, K, E], dv [B, G, S, K, Ev], in the dtype of q.
    """
    if kind.groups is not None:
        return _pullback_groups(grad_out, q, k, v, kind, kind.groups)
    B, H, T, K, Ev = grad_out.shape
    G, S, E = k.shape[1:]
    M, scratch = H // G, Scratch()
    blocks = query_blocks(T, B * H * K * S, q.device)
    total: tuple[Tensor, Tensor, Tensor] | None = None
    # Start with the last queries, which see all keys: later blocks need no more memory, and reuse the same.
    for start, stop in reversed(blocks):
        keys = keys_seen(stop + S - T, S) if kind.causal and mask is None else S
        n = stop - start
        q_GtE = q[:, :, start:stop].reshape(B * G, M * n, E)
        k_GSE, v_GSE = k[:, :, :keys].flatten(0, 1), v[:, :, :keys].flatten(0, 1)
        P_BHtS = probabilities(q, k[:, :, :keys], mask, kind, start, stop, S - T)
        dO_GtE = grad_out[:, :, start:stop].reshape(B * G, M * n * K, Ev)
        dP = _product(dO_GtE, v_GSE.mT, 1.0, scratch, "dP")
        softmax_pullback(dP.view(B, H, n, K, keys), P_BHtS.unsqueeze(3))
        dS_GtKS, dO_GtKE = dP.view(B * G, M * n, K * keys), dO_GtE.reshape(B * G, M * n, K * Ev)
        dq = _product(dP, k_GSE, kind.scale, scratch, "dq").view(B, H, n, K, E)
        dk = _product(dS_GtKS.mT, q_GtE, kind.scale, scratch, "dk").view(B, G, K, keys, E)
        dv = _product(P_BHtS.reshape(B * G, M * n, keys).mT, dO_GtKE, 1.0, scratch, "dv").view(B, G, keys, K, Ev)
        if len(blocks) == 1:  # this memory is not reused
            return dq, dk.transpose(2, 3), dv
        if total is None:
            total = dq.new_empty(B, H, T, K, E), dk.clone(), dv.clone()
        else:
            total[1][:, :, :, :keys] += dk
            total[2][:, :, :keys] += dv
        total[0][:, :, start:stop] = dq
    assert total is not None
    return total[0], total[1].transpose(2, 3), total[2]


def _product(a: Tensor, b: Tensor, scale: float, scratch: Scratch, name: str) -> Tensor:
    """Return scale a @ b over [G, m, n] and [G, n, l], in scratch memory, without a separate pass for the scale."""
    out = scratch(name, (len(a), a.shape[1], b.shape[2]), a)
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _pullback_groups(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, kind: AttentionKind, groups: tuple[Group, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    K = grad_out.shape[3]
    dq, dk, dv = (x.new_empty(*x.shape[:3], K, x.shape[3]) for x in (q, k, v))
    for group in groups:
        k_group, v_group, alone = group.take(k), group.take(v), kind.alone()
        if kind.one_query:
            dO, q_group = group.take_queries(grad_out), group.take_queries(q)
            mask = group.real[:, None, None]
            dq_group, *rest = pullback_attention(dO, q_group, k_group, v_group, mask, alone)
            group.put_queries(dq, dq_group)
        else:
            dO, q_group = group.take_real(grad_out), group.take(q)
            dq_group, *rest = pullback_attention(dO, q_group, k_group, v_group, None, alone)
            group.put(dq, dq_group)
        for whole, part in zip((dk, dv), rest, strict=True):
            group.put(whole, part)
    return dq, dk, dv
