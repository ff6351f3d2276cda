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

Three features of some models change P alone, or dS by a factor. A soft-cap takes scores s to cap tanh(s / cap), whose
derivative is 1 - tanh^2(s / cap). A window hides all keys but the last few. A sink is one more score in a head's
softmax, which attends to nothing: rows of P then sum to less than 1, and the formulas hold as they are.

Where only some rows are live, the keys before the first live one are constants: S >= T, the last query is at the last
key, and dK and dV are those of the keys from `first_live` on.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, Scratch, cotangent_dim, softmax_pullback
from fisher_vmap.model.groups import Group

# Elements of dP in one block of queries: few enough for a CPU's cache, enough to keep a GPU busy.
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, or their derivatives."""


@dataclass(frozen=True)
class AttentionKind:
    """The settings of an attention.

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.

    Attributes:
        scale: the factor of the scores.
        causal: whether, without a mask, query t sees keys up to t + S - T only.
        groups: if prompts are packed end to end, the prompts in groups; no prompt sees another's positions.
        first_live: the first key whose derivatives are wanted; with groups, each has its own.
        softcap: the bound of the scores, by its tanh; None: none.
        window: how many keys a query sees at most, its own included, without a mask; None: all.
    """

    scale: float
    causal: bool
    groups: tuple[Group, ...] | None = None
    first_live: int = 0
    softcap: float | None = None
    window: int | None = None

    def alone(self, first_live: int = 0) -> "AttentionKind":
        """The same kind within one prompt, or one group."""
        return replace(self, groups=None, first_live=first_live)


class Seen(NamedTuple):
    """Queries [start, stop), and the keys [low, high) of which they see some; query t is at key t + `ahead`."""

    start: int
    stop: int
    low: int
    high: int
    ahead: int

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of queries and of keys."""
        return self.stop - self.start, self.high - self.low


def seen_by_blocks(
    T: int, S: int, elements_a_query: int, mask: Tensor | None, kind: AttentionKind, device: torch.device
) -> list[Seen]:
    """The blocks of queries, as `query_blocks` makes them, each with its keys."""
    blocks = []
    for start, stop in query_blocks(T, elements_a_query, device):
        low, high, ahead = 0, S, S - T
        if mask is None:
            high = keys_seen(stop + ahead, S) if kind.causal else S
            if kind.window is not None:
                low = max(0, start + ahead - kind.window + 1) // _step(S) * _step(S)
        blocks.append(Seen(start, stop, low, high, ahead))
    return blocks


def probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, sinks: Tensor | None, kind: AttentionKind, seen: Seen
) -> tuple[Tensor, Tensor | None]:
    """P of a block of queries, [B, H, t, s], and the derivative of its soft-cap, in the dtype of q.

    Scores and softmax are computed in float32 at least. `sinks` is [H].
    """
    B, H, _, E = q.shape
    G, (t, s) = k.shape[1], seen.shape
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    q_rows = q[:, :, seen.start : seen.stop].reshape(B, G, -1, E).to(score_dtype)
    k_BGsE = k[:, :, seen.low : seen.high].to(score_dtype)
    scores = (q_rows @ k_BGsE.mT).view(B, H, t, s).mul_(kind.scale)
    slope = None
    if kind.softcap is not None:
        scores.div_(kind.softcap).tanh_()
        slope = (1 - scores.square()).to(q.dtype)
        scores.mul_(kind.softcap)
    if mask is not None:
        block = mask[..., seen.start : seen.stop, :] if mask.shape[-2] != 1 else mask
        if block.dtype == torch.bool:
            scores.masked_fill_(~block, -torch.inf)
        else:
            scores += block
    elif kind.causal or kind.window is not None:
        key = torch.arange(seen.low, seen.high, device=q.device)
        own = torch.arange(seen.start, seen.stop, device=q.device)[:, None] + seen.ahead
        hidden = key > own if kind.causal else torch.zeros_like(key > own)
        scores.masked_fill_(hidden if kind.window is None else hidden | (key <= own - kind.window), -torch.inf)
    if sinks is None:
        return scores.softmax(-1).to(q.dtype), slope
    sink = sinks.to(score_dtype).view(1, H, 1, 1).expand(B, H, t, 1)
    return torch.cat((scores, sink), -1).softmax(-1)[..., :-1].to(q.dtype), slope


def keys_seen(keys: int, all_keys: int) -> int:
    """How many keys to take for a block of queries that sees this many.

    The number is rounded up, so that blocks share sizes: for every new size of a product the CPU's library compiles and
    keeps a program, and those of a long prompt would take more memory than its tensors.
    """
    step = _step(all_keys)
    return min(all_keys, -(-keys // step) * step)


def _step(all_keys: int) -> int:
    return max(32, all_keys // 16)


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
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """From K tangents of queries, and of keys and values from `first_live` on, to those of the output of `attention`.

    dq is [B, H, T, K, E], dk [B, G, S - first_live, K, E] and dv [B, G, S - first_live, K, Ev].

    Returns:
        [B, H, T, K, Ev], in the dtype of q.
    """
    if kind.groups is not None:
        return _push_groups((dq, dk, dv), (q, k, v), kind, sinks)
    B, H, T, K, E = dq.shape
    G, S, Ev = v.shape[1:]
    M = H // G
    out = torch.empty(B, H, T, K, Ev, dtype=q.dtype, device=q.device)
    dk_BGEKS = dk.permute(0, 1, 4, 3, 2)
    for seen in seen_by_blocks(T, S, B * H * K * S, mask, kind, q.device):
        (start, stop, low, high, _), (n, keys) = seen, seen.shape
        alive = slice(max(low, kind.first_live) - kind.first_live, max(high, kind.first_live) - kind.first_live)
        live = alive.stop - alive.start  # the last ones of these keys
        q_BGtE = q[:, :, start:stop].reshape(B, G, M * n, E)
        P_BHtS, slope_BHtS = probabilities(q, k, mask, sinks, kind, seen)
        dq_rows = dq[:, :, start:stop].reshape(B, G, M * n * K, E)
        dS = (dq_rows @ k[:, :, low:high].mT).view(B, G, M * n, K, keys)
        through_keys = q_BGtE @ dk_BGEKS[..., alive].reshape(B, G, E, K * live)
        dS[..., keys - live :] += through_keys.view(B, G, M * n, K, live)
        dS = dS.view(B, H, n, K, keys)
        if slope_BHtS is not None:
            dS.mul_(slope_BHtS.unsqueeze(3))
        P_BHt1S = P_BHtS.unsqueeze(3)
        dP = dS.mul_(P_BHt1S)
        dP.addcmul_(P_BHt1S, dP.sum(-1, keepdim=True), value=-1)
        part = (dP.view(B, G, M * n * K, keys) @ v[:, :, low:high]).view(B, H, n, K, Ev).mul_(kind.scale)
        dv_BGSKE = dv[:, :, alive].reshape(B, G, live, K * Ev)
        part += (P_BHtS[..., keys - live :].reshape(B, G, M * n, live) @ dv_BGSKE).view(B, H, n, K, Ev)
        out[:, :, start:stop] = part
    return out


def _push_groups(tangents: Heads, heads: Heads, kind: AttentionKind, sinks: Tensor | None) -> Tensor:
    (dq, dk, dv), (q, k, v) = tangents, heads
    out = q.new_empty(*q.shape[:3], dq.shape[3], v.shape[3])
    for group in kind.groups or ():
        # Padding repeats a row of the prompt: no real query sees it, and its output is dropped. Keys that a prompt has
        # before its first live one are constants.
        take_live = group.live.take if group.live is group.keys else group.live.take_real
        moved, asked = (group.queries.take(dq), take_live(dk), take_live(dv)), group.queries.take(q)
        mask, alone = group.seen(kind.window), kind.alone(group.first_live)
        part = pushforward_attention(*moved, asked, group.keys.take(k), group.keys.take(v), mask, alone, sinks)
        group.queries.put(out, part)
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind, sinks: Tensor | None = None
) -> Tensor:
    """Scaled dot-product attention, [B, H, T, E], with a backward that `vmap` can batch without looping.

    Args:
        q: [B, H, T, E].
        k: [B, G, S, E], with H a multiple of G.
        v: [B, G, S, Ev].
        mask: None, or a tensor that broadcasts to [B, H, T, S]: bool (True takes part) or floating (added).
        kind: the scale, whether position t sees keys up to t + S - T only (with mask None), and what else is special.
        sinks: [H], one more score in the softmax of each head, a constant; None: none.
    """
    return attention_to_live((q, k, v), (k, v), mask, kind, sinks)


def attention_to_live(
    live: Heads, every: tuple[Tensor, Tensor], mask: Tensor | None, kind: AttentionKind, sinks: Tensor | None = None
) -> Tensor:
    """The same as a function of the queries and of the live keys and values alone, [B, G, n, E] and [B, G, n, Ev].

    `every` has all keys and values, in which the live ones have these values.
    """
    return _Attention.apply(*live, *every, mask, kind, sinks)  # type: ignore[no-any-return]


class _Attention(Derived):
    """Of queries, live keys and values; then all keys and values, mask, kind and sinks, which are constants."""

    @staticmethod
    def forward(q: Tensor, _k: Tensor, _v: Tensor, *shared: Any) -> Tensor:
        return attention_forward(q, *shared)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, _, _, k, v, mask, ctx.kind, sinks = inputs
        ctx.live = inputs[1].shape, inputs[2].shape
        ctx.save_for_backward(q, k, v, mask, sinks)
        ctx.save_for_forward(q, k, v, mask, sinks)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, sinks = ctx.saved_tensors
        dq, dk, dv = _AttentionPullback.apply(grad_out, q, k, v, mask, ctx.kind, sinks)
        return dq, dk, dv, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, *_: Any) -> Tensor:
        q, k, v, mask, sinks = ctx.saved_tensors
        dq = torch.zeros_like(q) if dq is None else dq
        dk, dv = (q.new_zeros(shape) if t is None else t for t, shape in zip((dk, dv), ctx.live, strict=True))
        return AttentionPushforward.apply(dq, dk, dv, q, k, v, mask, ctx.kind, sinks)  # type: ignore[no-any-return]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind, sinks: Tensor | None = None
) -> Tensor:
    """The output, by the fused kernels where they have what the kind asks for."""
    if kind.groups is not None:
        out = q.new_empty(*q.shape[:3], v.shape[3])
        for group in kind.groups:
            q_group, k_group, v_group = group.queries.take(q), group.keys.take(k), group.keys.take(v)
            part = attention_forward(q_group, k_group, v_group, group.seen(kind.window), kind.alone(), sinks)
            group.queries.put(out, part)
        return out
    B, H, T, _ = q.shape
    G, S, Ev = v.shape[1:]
    windowed = mask is None and kind.window is not None and kind.window < S
    if sinks is None and kind.softcap is None and not windowed:
        causal, grouped = kind.causal and mask is None, G != H
        if not causal or T == S:
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=kind.scale, enable_gqa=grouped
            )
    out = q.new_empty(B, H, T, Ev)
    for seen in seen_by_blocks(T, S, B * H * S, mask, kind, q.device):
        P_BHts, _ = probabilities(q, k, mask, sinks, kind, seen)
        rows = P_BHts.view(B, G, -1, seen.shape[1]) @ v[:, :, seen.low : seen.high]
        out[:, :, seen.start : seen.stop] = rows.view(B, H, -1, Ev)
    return out


class _AttentionPullback(Pullback):
    @staticmethod
    def forward(grad_out: Tensor, *shared: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = pullback_attention(grad_out[:, :, :, None], *shared)
        return dq.squeeze(3), dk.squeeze(3), dv.squeeze(3)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad_out: Tensor, *shared: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        return pullback_attention(grad_out.movedim(cotangent_dim(in_dims), 3), *shared), (3, 3, 3)


def pullback_attention(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind,
    sinks: Tensor | None = None,
) -> Heads:  # fmt: skip
    """From K cotangents of the output of `attention`, [B, H, T, K, Ev], to those of queries, live keys and values.

    Returns:
        dq [B, H, T, K, E], dk [B, G, S - first_live, K, E], dv [B, G, S - first_live, K, Ev], in the dtype of q; with
        groups, dk and dv [1, G, n, K, E] at the n live rows.
    """
    if kind.groups is not None:
        return _pullback_groups(grad_out, (q, k, v), kind, sinks)
    B, H, T, K, Ev = grad_out.shape
    G, S, E = k.shape[1:]
    M, scratch = H // G, Scratch()
    blocks = seen_by_blocks(T, S, B * H * K * S, mask, kind, q.device)
    total: tuple[Tensor, Tensor, Tensor] | None = None
    # Start with the last queries, which see most keys: later blocks need no more memory, and reuse the same.
    for seen in reversed(blocks):
        (start, stop, low, high, _), (n, keys) = seen, seen.shape
        first = max(low, kind.first_live)  # of these keys, those from here on are live
        live = max(high - first, 0)
        q_GtE = q[:, :, start:stop].reshape(B * G, M * n, E)
        k_GSE, v_GSE = k[:, :, low:high].flatten(0, 1), v[:, :, low:high].flatten(0, 1)
        P_BHtS, slope_BHtS = probabilities(q, k, mask, sinks, kind, seen)
        dO_GtE = grad_out[:, :, start:stop].reshape(B * G, M * n * K, Ev)
        dP = _product(dO_GtE, v_GSE.mT, 1.0, scratch, "dP")
        dS = softmax_pullback(dP.view(B, H, n, K, keys), P_BHtS.unsqueeze(3))
        if slope_BHtS is not None:
            dS.mul_(slope_BHtS.unsqueeze(3))
        dq = _product(dP, k_GSE, kind.scale, scratch, "dq").view(B, H, n, K, E)
        dS_GtKS = dP.view(B * G, M * n, K, keys)[..., keys - live :].reshape(B * G, M * n, K * live)
        P_GtS = P_BHtS[..., keys - live :].reshape(B * G, M * n, live)
        dO_GtKE = dO_GtE.reshape(B * G, M * n, K * Ev)
        dk = _product(dS_GtKS.mT, q_GtE, kind.scale, scratch, "dk").view(B, G, K, live, E)
        dv = _product(P_GtS.mT, dO_GtKE, 1.0, scratch, "dv").view(B, G, live, K, Ev)
        if len(blocks) == 1 and first == kind.first_live:  # this memory is not reused
            return dq, dk.transpose(2, 3), dv
        if total is None:
            n_live = S - kind.first_live
            total = dq.new_empty(B, H, T, K, E), dq.new_zeros(B, G, K, n_live, E), dq.new_zeros(B, G, n_live, K, Ev)
        at = slice(first - kind.first_live, first - kind.first_live + live)
        total[1][:, :, :, at] += dk
        total[2][:, :, at] += dv
        total[0][:, :, start:stop] = dq
    assert total is not None
    return total[0], total[1].transpose(2, 3), total[2]


def _product(a: Tensor, b: Tensor, scale: float, scratch: Scratch, name: str) -> Tensor:
    """Return scale a @ b over [G, m, n] and [G, n, l], in scratch memory, without a separate pass for the scale."""
    out = scratch(name, (len(a), a.shape[1], b.shape[2]), a)
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def _pullback_groups(grad_out: Tensor, heads: Heads, kind: AttentionKind, sinks: Tensor | None) -> Heads:
    (q, k, v), groups = heads, kind.groups or ()
    K, live = grad_out.shape[3], sum(len(group.live.own) for group in groups)
    dq = q.new_empty(*q.shape[:3], K, q.shape[3])
    dk, dv = (x.new_empty(*x.shape[:2], live, K, x.shape[3]) for x in (k, v))
    for group in groups:
        dO, inside = group.queries.take_real(grad_out), (group.queries.take(q), group.keys.take(k), group.keys.take(v))
        mask, alone = group.seen(kind.window), kind.alone(group.first_live)
        dq_group, dk_group, dv_group = pullback_attention(dO, *inside, mask, alone, sinks)
        group.queries.put(dq, dq_group)
        group.live.put(dk, dk_group)
        group.live.put(dv, dv_group)
    return dq, dk, dv
