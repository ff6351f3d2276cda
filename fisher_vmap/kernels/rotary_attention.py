"""Rules for rotary attention modules (projections, rotary embedding, attention) on packed prompts.

With cotangents as [N, K, D], positions first, the projections are plain matrix products, each prompt is a contiguous
range of rows, and only one permuted copy lies between; autograd transposes and gathers each of q, k and v, in a dozen
copies. The forward is the module's own, to the bit. A module gets these rules only if it returns the same as the
formula on tokens of the run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention import AttentionKind, attention_forward, pushforward_attention
from fisher_vmap.kernels.attention_rule import AttentionRule, Columns, Rotary
from fisher_vmap.kernels.autograd import Derived, Pullback, Pushforward, Scratch, cotangent_dim
from fisher_vmap.kernels.hf_attention import AttentionCall, Packed, packed_now
from fisher_vmap.kernels.parts import Seen
from fisher_vmap.kernels.quantized import has_matrix, runs_as_made
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import hooks

Forwards = dict[nn.Module, Callable[..., Any]]


@dataclass(frozen=True)
class AttentionParts:
    """The projections of an attention module: q [H E, D], k and v [G E, D], o [D, H E], and the width E of a head.

    A dataclass and not a tuple, because functorch would take a tuple's fields as inputs.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    head: int

    def weights(self) -> tuple[Tensor, ...]:
        """The weights of q, k, v and o."""
        return tuple(part.weight.detach() for part in (self.q, self.k, self.v, self.o))


class RotaryCall(NamedTuple):
    """The arguments of a rotary attention, or of the block around it, on packed prompts.

    x is [1, N, D]; cos and sin, the rotary embedding, are [1, N, E].
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    packed: Packed


class Heads(NamedTuple):
    """The results of a forward that the derivatives need: the rotary embedding, and the rotated queries and keys.

    cos and sin are [1, N, E], q is [1, H, N, E], k and the values v are [1, G, N, E].
    """

    cos: Tensor
    sin: Tensor
    q: Tensor
    k: Tensor
    v: Tensor


def attend(call: RotaryCall, parts: AttentionParts, scale: float) -> tuple[Tensor, Heads]:
    """The module's output, [1, N, D], and its heads; `scale` is the factor of the scores."""
    x, cos, sin, packed = call
    q, k, v = (project(x).view(*x.shape[:2], -1, parts.head) for project in (parts.q, parts.k, parts.v))
    cos_, sin_, half = cos[:, :, None], sin[:, :, None], parts.head // 2
    other_sin = torch.cat((sin_[..., half:], sin_[..., :half]), -1)
    q, k = (_rotate(t, cos_, other_sin, half) for t in (q, k))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = attention_forward(q, k, v, None, AttentionKind(scale, True, packed.groups_on(x.device)))
    return parts.o(out.transpose(1, 2).reshape(*x.shape[:2], -1)), Heads(cos, sin, q, k, v)


def _rotate(x: Tensor, cos: Tensor, other_sin: Tensor, half: int) -> Tensor:
    """The value of x * cos + rotate_half(x) * sin, to the bit; `other_sin` is sin with its halves swapped."""
    out, crossed = x * cos, x * other_sin
    out[..., :half] -= crossed[..., half:]
    out[..., half:] += crossed[..., :half]
    return out


def rotary_attention(call: RotaryCall, parts: AttentionParts, scale: float) -> Tensor:
    """The output of `attend`, with the rules of this file."""
    return _RotaryAttention.apply(*call, parts, scale)[0]  # type: ignore[no-any-return]


class _RotaryAttention(Derived):
    @staticmethod
    def forward(
        x: Tensor, cos: Tensor, sin: Tensor, packed: Packed, parts: AttentionParts, scale: float
    ) -> tuple[Tensor, ...]:
        y, heads = attend(RotaryCall(x, cos, sin, packed), parts, scale)
        return y, heads.q, heads.k, heads.v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _x, cos, sin, ctx.packed, ctx.parts, ctx.scale = inputs
        _y, q, k, v = output
        ctx.mark_non_differentiable(q, k, v)
        ctx.save_for_backward(cos, sin, q, k, v)
        ctx.save_for_forward(cos, sin, q, k, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        dx = _ModulePullback.apply(g, *ctx.saved_tensors, ctx.parts, ctx.scale, ctx.packed)
        return dx, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        dy = _ModulePushforward.apply(t, *ctx.saved_tensors, ctx.parts, ctx.scale, ctx.packed)
        return dy, None, None, None


class _ModulePullback(Pullback):
    @staticmethod
    def forward(g: Tensor, *shared: Any) -> Tensor:
        return _pull(g[0, :, None], *_put_together(shared))[None, :, 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], g: Tensor, *shared: Any) -> tuple[Tensor, int]:
        return _pull(g.movedim(cotangent_dim(in_dims), 2)[0], *_put_together(shared))[None], 2


def _put_together(shared: tuple[Any, ...]) -> tuple[Heads, AttentionParts, float, Packed]:
    """The heads, the projections, the scale and the prompts; `apply` takes tensors one by one."""
    parts, scale, packed = shared[5:]
    return Heads(*shared[:5]), parts, scale, packed


def _pull(g_NKD: Tensor, heads: Heads, parts: AttentionParts, scale: float, packed: Packed) -> Tensor:
    """K cotangents of the module's output to those of its input, [N, K, D], as in the rule of a whole block."""
    H, G, name = heads.q.shape[1], heads.k.shape[1], parts.o
    q, k, v = (Columns(linear, 0, n) for linear, n in ((parts.q, H), (parts.k, G), (parts.v, G)))
    rule = AttentionRule(name, q, k, v, parts.o, Rotary(pairs=False, given="each"), parts.head)
    call = AttentionCall(name, heads.q, heads.k, heads.v, AttentionKind(scale, causal=True), None)
    seen = Seen(calls={name: ((), {"position_embeddings": (heads.cos, heads.sin)})}, attention={name: call})
    return rule.pull_from(seen, Scratch(), packed)(g_NKD, 0, len(g_NKD))


class _ModulePushforward(Pushforward):
    @staticmethod
    def forward(t: Tensor, *shared: Any) -> Tensor:
        return _push(t[0, :, None], *_put_together(shared))[None, :, 0]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, *shared: Any) -> tuple[Tensor, int]:
        return _push(t.movedim(cotangent_dim(in_dims), 2)[0], *_put_together(shared))[None], 2


def _push(t_NKD: Tensor, heads: Heads, parts: AttentionParts, scale: float, packed: Packed) -> Tensor:
    """K tangents of the module's input to those of its output, [N, K, D]."""
    (w_q, w_k, w_v, w_o), (cos, sin, q, k, v) = parts.weights(), heads
    N, K, D = t_NKD.shape
    rows = t_NKD.reshape(N * K, D)
    tq, tk, tv = ((rows @ w.T).view(N, K, x.shape[1], -1) for w, x in ((w_q, q), (w_k, k), (w_v, v)))
    out = t_NKD.new_empty(N, K, q.shape[1], v.shape[3])
    alone, half = AttentionKind(scale, causal=True), q.shape[3] // 2
    for group in packed.groups_on(t_NKD.device):
        c, s = (group.keys.take_rows(t[0])[:, None, :, None] for t in (cos, sin))
        dq, dk, dv = (group.keys.take_rows(t).permute(0, 3, 1, 2, 4) for t in (tq, tk, tv))
        dq, dk = (t * c + torch.cat((-t[..., half:], t[..., :half]), -1) * s for t in (dq, dk))
        here = group.keys
        moved = pushforward_attention(dq, dk, dv, here.take(q), here.take(k), here.take(v), None, alone)
        group.queries.put_rows(out, moved.permute(0, 2, 3, 1, 4))
    return (out.view(N * K, -1) @ w_o.T).view(N, K, D)


def parts_of(module: nn.Module) -> AttentionParts | None:
    """The parts of a module that may be a rotary attention; None if it lacks one or has others."""
    q, k, v, o = (getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    head = getattr(module, "head_dim", None)
    if not all(has_matrix(part) and runs_as_made(part) for part in (q, k, v, o)) or not isinstance(head, int):
        return None
    if len(list(module.children())) != 4 or "forward" in vars(module):  # `children` names each once
        return None  # norms of queries and keys, gates, sinks
    assert (
        isinstance(q, nn.Linear) and isinstance(k, nn.Linear) and isinstance(v, nn.Linear) and isinstance(o, nn.Linear)
    )
    return AttentionParts(q, k, v, o, head)


def attention_scale(module: nn.Module) -> float | None:
    """The factor of the attention scores, from the module's attribute `scaling`; None if it has none."""
    scale = getattr(module, "scaling", None)
    return scale if isinstance(scale, float) else None


def rotary_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], head: int) -> RotaryCall | None:
    """The arguments of an attention module or of a block; None if prompts are not packed or it has others that matter.

    Expected are the residual stream, as first argument or `hidden_states`, and `position_embeddings`, the pair of cos
    and sin; neither mask nor cache. `head` is the width E of a head.
    """
    packed, rotary = packed_now(), kwargs.get("position_embeddings")
    x = args[0] if args else kwargs.get("hidden_states")
    if packed is None or rotary is None or len(rotary) != 2 or len(args) > 1 or not isinstance(x, Tensor):
        return None
    if any(not isinstance(t, Tensor) or t.shape != (1, x.shape[1], head) for t in rotary):
        return None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    cos, sin = rotary
    return RotaryCall(x, cos, sin, packed)


def fused_attention_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The forward of an attention module with the fused pullback for packed prompts; None for other modules."""
    parts, scale = parts_of(module), attention_scale(module)
    if parts is None or scale is None:
        return None
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = rotary_call(args, kwargs, parts.head)
        return own(*args, **kwargs) if call is None else (rotary_attention(call, parts, scale), None)

    return forward


def proven_attentions(forwards: Forwards, run: Callable[[], object]) -> Forwards:
    """The forwards that agree with their modules, up to rounding, on the modules' inputs while `run` runs the model."""
    right: Forwards = {}

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("attention_mask") is not None:
            return
        with weights_ready(module):
            expected, found = output[0], forwards[module](*args, **kwargs)[0]
        if (found - expected).norm() <= 4 * torch.finfo(expected.dtype).eps * expected.norm():
            right[module] = forwards[module]

    with hooks(*(module.register_forward_hook(compare, with_kwargs=True) for module in forwards)):
        run()
    return right
