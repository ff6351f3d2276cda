"""The forward derivative of attention for many tangents at once: what `attention` is to cotangents.

For one head, with P = softmax(scale q k^T + mask) and tangents dq, dk, dv,

    dS = scale (dq k^T + q dk^T)        dP = P * (dS - rowsum(P * dS))        dO = dP v + P dv

As in the pullback, K joins the rows or the columns of each matrix product, and nothing that all tangents share is
repeated. Letters as in `attention`.
"""

from typing import Any

import torch
from torch import Tensor

from fisher_vmap.pullbacks.attention_blocks import AttentionKind, keys_seen, probabilities, query_blocks
from fisher_vmap.pullbacks.pullback import Pushforward
from fisher_vmap.pullbacks.ragged import Group


class AttentionPushforward(Pushforward):
    """Tangents of queries, keys and values to that of the output; each may be batched or not."""

    @staticmethod
    def forward(dq: Tensor, dk: Tensor, dv: Tensor, *shared: Any) -> Tensor:
        """One tangent of each."""
        dq, dk, dv = (t[:, :, :, None] for t in (dq, dk, dv))
        return pushforward_attention(dq, dk, dv, *shared).squeeze(3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """K of each."""
        if any(dim is not None for dim in in_dims[3:]):
            raise NotImplementedError("only the tangents can be batched: everything else is shared by all of them")
        tangents = [
            t.movedim(dim, 3) if dim is not None else t[:, :, :, None].expand(-1, -1, -1, info.batch_size, -1)
            for t, dim in zip(inputs[:3], in_dims[:3], strict=True)
        ]
        return pushforward_attention(*tangents, *inputs[3:]), 3


def pushforward_attention(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    """K tangents of an attention's queries, keys and values to those of its output.

    Args:
        dq: [B, H, T, K, E], the tangents.
        dk: [B, G, S, K, E].
        dv: [B, G, S, K, Ev].
        q: [B, H, T, E].
        k: [B, G, S, E].
        v: [B, G, S, Ev].
        mask: as for `attention`.
        kind: as for `attention`.

    Returns:
        [B, H, T, K, Ev], in the dtype of q.
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
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: AttentionKind,
    groups: tuple[Group, ...],
) -> Tensor:
    out = q.new_empty(*q.shape[:3], dq.shape[3], v.shape[3])
    alone = kind.alone()
    for group in groups:
        # What stands at padding is a copy of a prompt's last row: no real query sees it, and what it gives is left out.
        take = group.take_queries if kind.one_query else group.take
        dk_group, dv_group, k_group, v_group = (group.take(x) for x in (dk, dv, k, v))
        mask = group.real[:, None, None] if kind.one_query else None
        part = pushforward_attention(take(dq), dk_group, dv_group, take(q), k_group, v_group, mask, alone)
        (group.put_queries if kind.one_query else group.put)(out, part)
    return out
