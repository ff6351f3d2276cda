"""The pullback of a whole attention module: projections, rotary embedding and attention, for all cotangents at once.

With cotangents as [N, K, D], positions first, the projections are plain matrix products, each prompt is a contiguous
range of rows, and between them lies one permuted copy: autograd's way, transposed and gathered for each of q, k and v,
makes a dozen. A module is taken for one of these only if, on the run's own tokens, it returns to the bit what the
formula does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.attention import attention_forward, pullback_attention
from fisher_vmap.attention_blocks import AttentionKind
from fisher_vmap.attention_interface import Packed, packed_now
from fisher_vmap.attention_push import pushforward_attention
from fisher_vmap.pullback import Derived, Pullback, Pushforward, cotangent_dim
from fisher_vmap.quantized import has_matrix, runs_as_made
from fisher_vmap.recording import hooks
from fisher_vmap.scratch import Scratch

Forwards = dict[nn.Module, Callable[..., Any]]


@dataclass(frozen=True)
class AttentionParts:
    """The projections of an attention module: q [H E, D], k and v [G E, D], o [D, H E], and the width E of a head."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    head: int


def parts_of(module: nn.Module) -> AttentionParts | None:
    """The parts of a module that may be a rotary attention; None where they are not all there, or there are more."""
    q, k, v, o = (getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    head = getattr(module, "head_dim", None)
    if not all(has_matrix(part) and runs_as_made(part) for part in (q, k, v, o)) or not isinstance(head, int):
        return None
    if len(list(module.children())) != 4 or "forward" in vars(module):
        return None  # norms of queries and keys, gates, sinks
    assert (
        isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    )
    return AttentionParts(q, k, v, o, head)


def rotary_attention(
    x: Tensor, cos: Tensor, sin: Tensor, parts: AttentionParts, kind: AttentionKind, packed: Packed
) -> Tensor:
    """The module's output, [1, N, D], for packed prompts.

    Args:
        x: [1, N, D].
        cos: [1, N, E], and sin likewise: the rotary embedding.
        sin: see cos.
        parts: of the module.
        kind: of the attention.
        packed: the prompts.
    """
    return _RotaryAttention.apply(x, cos, sin, parts, kind, packed)[0]  # type: ignore[no-any-return]


def attend(
    x: Tensor, cos: Tensor, sin: Tensor, parts: AttentionParts, kind: AttentionKind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The module's output, [1, N, D], and its queries, keys and values, [1, H, N, E], after the rotary embedding."""
    q, k, v = (project(x).view(*x.shape[:2], -1, parts.head) for project in (parts.q, parts.k, parts.v))
    cos, sin, half = cos[:, :, None], sin[:, :, None], parts.head // 2
    other_sin = torch.cat((sin[..., half:], sin[..., :half]), -1)
    q, k = (_rotate(t, cos, other_sin, half) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = attention_forward(q, k, v, None, kind)
    return parts.o(out.transpose(1, 2).reshape(*x.shape[:2], -1)), q, k, v


def _rotate(x: Tensor, cos: Tensor, other_sin: Tensor, half: int) -> Tensor:
    """X * cos + rotate_half(x) * sin, to the bit; each half of `other_sin` is the other half of sin."""
    out, crossed = x * cos, x * other_sin
    out[..., :half] -= crossed[..., half:]
    out[..., half:] += crossed[..., :half]
    return out


class _RotaryAttention(Derived):
    @staticmethod
    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, parts: AttentionParts, kind: AttentionKind, packed: Packed
    ) -> tuple[Tensor, ...]:
        return attend(x, cos, sin, parts, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _x, cos, sin, ctx.parts, ctx.kind, ctx.packed = inputs
        _y, q, k, v = output
        ctx.mark_non_differentiable(q, k, v)
        ctx.save_for_backward(cos, sin, q, k, v)
        ctx.save_for_forward(cos, sin, q, k, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weights = (p.weight.detach() for p in (ctx.parts.q, ctx.parts.k, ctx.parts.v, ctx.parts.o))
        dx = _ModulePullback.apply(g, *ctx.saved_tensors, *weights, ctx.kind, ctx.packed)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        weights = (p.weight.detach() for p in (ctx.parts.q, ctx.parts.k, ctx.parts.v, ctx.parts.o))
        dy = _ModulePushforward.apply(t, *ctx.saved_tensors, *weights, ctx.kind, ctx.packed)
        return dy, None, None, None


class _ModulePullback(Pullback):
    @staticmethod
    def forward(g: Tensor, *shared: Any) -> Tensor:
        return pullback_rotary(g[0, :, None], *shared)[None, :, 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        return pullback_rotary(g.movedim(cotangent_dim(in_dims), 2)[0], *shared)[None], 2


def pullback_rotary(
    g_NKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    kind: AttentionKind,
    packed: Packed,
) -> Tensor:
    """K cotangents of the module's output to those of its input, [N, K, D]; q and k are after the rotary embedding."""
    weights = torch.cat((w_q, w_k, w_v)), w_o
    return pullback_prompts(g_NKD, cos, sin, q, k, v, weights, kind.alone(), packed.ranges, Scratch())


def pullback_prompts(
    g_nKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: tuple[Tensor, Tensor],
    kind: AttentionKind,
    ranges: Sequence[tuple[int, int]],
    scratch: Scratch,
) -> Tensor:
    """The same for some neighbouring prompts, in scratch memory.

    Args:
        g_nKD: the cotangents at their n positions.
        cos: [1, N, E] of all positions, and so on.
        sin: [1, N, E].
        q: [1, H, N, E], after the rotary embedding.
        k: [1, G, N, E], after the rotary embedding.
        v: [1, G, N, E].
        weights: of queries, keys and values, [(H + 2 G) E, D], and of the output, [D, H E].
        kind: of the attention within one prompt.
        ranges: [start, stop) of each prompt among all positions.
        scratch: for what passes through; the result stays in it until it is used again.
    """
    w_qkv, w_o = weights
    n, K, D = g_nKD.shape
    H, G, E, first = q.shape[1], k.shape[1], q.shape[3], ranges[0][0]
    dO = torch.mm(g_nKD.reshape(n * K, D), w_o, out=scratch("dO", (n * K, H * E), g_nKD)).view(n, K, H, E)
    dqkv = scratch("dqkv", (n, K, H + 2 * G, E), g_nKD)
    for a, z in ranges:
        here = slice(a - first, z - first)
        cotangents = scratch("dO of a prompt", (H, z - a, K, E), dO).copy_(dO[here].permute(2, 0, 1, 3))
        dq, dk, dv = pullback_attention(cotangents[None], q[:, :, a:z], k[:, :, a:z], v[:, :, a:z], None, kind)
        c, s = cos[0, a:z, None], sin[0, a:z, None]
        out = dqkv[here].permute(2, 0, 1, 3)
        _unrotate(dq[0], c, s, out[:H])
        _unrotate(dk[0], c, s, out[H : H + G])
        out[H + G :].copy_(dv[0])
    return torch.mm(dqkv.view(n * K, -1), w_qkv, out=scratch("dn", (n * K, D), g_nKD)).view(n, K, D)


class _ModulePushforward(Pushforward):
    @staticmethod
    def forward(t: Tensor, *shared: Any) -> Tensor:
        return pushforward_rotary(t[0, :, None], *shared)[None, :, 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, *shared: Any) -> tuple[Tensor, int]:
        return pushforward_rotary(t.movedim(cotangent_dim(in_dims), 2)[0], *shared)[None], 2


def pushforward_rotary(
    t_NKD: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_o: Tensor,
    kind: AttentionKind,
    packed: Packed,
) -> Tensor:
    """K tangents of the module's input to those of its output, [N, K, D]; q and k are after the rotary embedding."""
    N, K, D = t_NKD.shape
    rows = t_NKD.reshape(N * K, D)
    tq, tk, tv = ((rows @ w.T).view(N, K, x.shape[1], -1) for w, x in ((w_q, q), (w_k, k), (w_v, v)))
    out = t_NKD.new_empty(N, K, q.shape[1], v.shape[3])
    alone = kind.alone()
    for a, z in packed.ranges:
        c, s = cos[0, a:z, None], sin[0, a:z, None]
        dq, dk = (t[a:z].permute(2, 0, 1, 3) for t in (tq, tk))
        dq, dk = (t * c + _rotate_half(t) * s for t in (dq, dk))
        dv = tv[a:z].permute(2, 0, 1, 3)
        tangents = (dq[None], dk[None], dv[None])
        moved = pushforward_attention(*tangents, q[:, :, a:z], k[:, :, a:z], v[:, :, a:z], None, alone)
        out[a:z].permute(2, 0, 1, 3).copy_(moved[0])
    return (out.view(N * K, -1) @ w_o.T).view(N, K, D)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _unrotate(g: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The transpose of x * cos + rotate_half(x) * sin, applied to g [H, T, K, E] and written to out."""
    half = g.shape[-1] // 2
    torch.mul(g, cos, out=out)
    out[..., :half].addcmul_(g[..., half:], sin[..., half:])
    out[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)


def attention_scale(module: nn.Module) -> float | None:
    """What a module multiplies the scores of its attention with, by its own word; None where it has none."""
    scale = getattr(module, "scaling", None)
    return scale if isinstance(scale, float) else None


def fused_attention_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention module with the fused pullback for packed prompts; None for other modules."""
    parts, scale = parts_of(module), attention_scale(module)
    if parts is None or scale is None:
        return None
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        packed = packed_now()
        x = args[0] if args else kwargs.get("hidden_states")
        rotary = kwargs.get("position_embeddings")
        if packed is None or len(args) > 1 or not isinstance(x, Tensor) or not is_rotary(rotary, x, parts.head):
            return own(*args, **kwargs)
        assert rotary is not None
        kind = AttentionKind(scale, True, packed.groups_on(x.device))
        return rotary_attention(x, rotary[0], rotary[1], parts, kind, packed), None

    return forward


def proven(
    forwards: dict[nn.Module, Callable[..., Any]], run: Callable[[], object]
) -> dict[nn.Module, Callable[..., Any]]:
    """Those of the forwards that give what their modules give, on what the modules see while `run` runs the model."""
    right: Forwards = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("attention_mask") is not None:
            return
        expected, found = output[0], forwards[module](*args, **kwargs)[0]
        if (found - expected).norm() <= 4 * torch.finfo(expected.dtype).eps * expected.norm():
            right[module] = forwards[module]

    with hooks(*(module.register_forward_hook(compare, with_kwargs=True) for module in forwards)):
        run()
    return right


def is_rotary(rotary: Sequence[Tensor] | None, x: Tensor, head: int) -> bool:
    """Whether a pair of tensors is cos and sin, [1, N, E], for x."""
    if rotary is None or len(rotary) != 2:
        return False
    return all(isinstance(t, Tensor) and t.shape == (1, x.shape[1], head) for t in rotary)
