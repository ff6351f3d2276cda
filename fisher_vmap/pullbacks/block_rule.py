"""The pullback of a whole decoder block by hand: two residual steps, from what the block's forward has computed anyway.

    y = x + post(attention(pre(x)))        z = y + post(mlp(pre(y)))

with a rotary attention and a gated MLP, and with norms before them, after them, or both, all of the kinds that have a
pullback of their own. Nothing needs autograd then: the cotangents stand in one piece of memory, [N, K, D], each step
adds its share to them in place, and everything in between passes through memory that stays in cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.pullbacks.attention_interface import Packed
from fisher_vmap.pullbacks.fused_attention import attention_scale, parts_of
from fisher_vmap.pullbacks.gated_mlp import MlpParts, is_gated_mlp, pull_mlp
from fisher_vmap.pullbacks.norms import NormKind, NormRows, norm_kind, norm_rows
from fisher_vmap.pullbacks.rotary_attention import AttentionParts, Heads, RotaryCall, attend, pullback_prompts
from fisher_vmap.pullbacks.scratch import Scratch, stretches

# The places of a block's norms, in the order in which the block holds them.
PLACES = {
    2: (("pre_attention", "pre_mlp"), ("post_attention", "post_mlp")),
    4: (("pre_attention", "post_attention", "pre_mlp", "post_mlp"),),
}


class NormRule(NamedTuple):
    """A norm of a known kind."""

    module: nn.Module
    kind: NormKind

    def rows(self, x: Tensor) -> NormRows:
        """What its pullback at x needs, for each position with a dimension for the cotangents: [N, 1, D]."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return norm_rows(x, weight.detach(), self.kind, x.dtype).each(lambda row: row[:, None])


class Kept(NamedTuple):
    """What the forward of a block has computed beyond its input x, and its pullback needs.

    Attributes:
        attended: [N, D], what a norm after the attention was given; None where there is none.
        heads: of the attention.
        y: [N, D].
        a: [N, M], what the gate of the MLP returned, and b, what its up-projection did.
        b: see a.
        moved: [N, D], what a norm after the MLP was given; None where there is none.
        z: [1, N, D], what the block returned.
    """

    attended: Tensor | None
    heads: Heads
    y: Tensor
    a: Tensor
    b: Tensor
    moved: Tensor | None
    z: Tensor

    def bytes(self) -> int:
        """How much memory that is, without what would be there anyway: the stream and the rotary embedding."""
        heads, own = self.heads, (self.attended, self.y, self.a, self.b, self.moved)
        return sum(t.numel() * t.element_size() for t in (*own, heads.q, heads.k, heads.v) if t is not None)


@dataclass(frozen=True)
class BlockRule:
    """The parts of a block, and its pullback by them.

    Attributes:
        norms: by their places; a block has those of one entry of `PLACES`.
        attention: the attention module.
        projections: of the attention module.
        mlp: the gated MLP.
    """

    norms: Mapping[str, NormRule]
    attention: nn.Module
    projections: AttentionParts
    mlp: nn.Module

    @property
    def scale(self) -> float:
        """What the scores of attention are multiplied with, as it is now."""
        scale = attention_scale(self.attention)
        assert scale is not None
        return scale

    def forward(self, call: RotaryCall) -> tuple[Tensor, Kept]:
        """The block's output, [1, N, D], and what the pullback needs."""
        step, heads = attend(call._replace(x=self._norm("pre_attention", call.x)), self.projections, self.scale)
        attended = step[0] if "post_attention" in self.norms else None
        y = call.x + self._norm("post_attention", step)
        step, a, b = MlpParts.of(self.mlp).forward(self._norm("pre_mlp", y))
        moved = step[0] if "post_mlp" in self.norms else None
        z = y + self._norm("post_mlp", step)
        return z, Kept(attended, heads, y[0], a[0], b[0], moved, z)

    def pullback(self, x: Tensor, kept: Kept, cotangents_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        """Turn K cotangents of the block's output into those of its input x, [1, N, D], in place, [N, K, D]."""
        self._pull_mlp(kept, cotangents_NKD, scratch)
        self._pull_attention(x[0], kept, cotangents_NKD, packed, scratch)

    def _norm(self, place: str, x: Tensor) -> Tensor:
        return self.norms[place].module(x) if place in self.norms else x  # type: ignore[no-any-return]

    def _pull_mlp(self, kept: Kept, G_NKD: Tensor, scratch: Scratch) -> None:
        parts, norms = MlpParts.of(self.mlp), (self._rows("pre_mlp", kept.y), self._rows("post_mlp", kept.moved))
        weights = parts.weights()
        to_gate, to_up = (factor[:, None] for factor in parts.factors(kept.a, kept.b))

        def pull(step: Tensor, a: int, z: int) -> Tensor:
            return pull_mlp(step, to_gate[a:z], to_up[a:z], weights, scratch)

        _pull_residual(G_NKD, pull, norms, range(1, len(G_NKD) + 1), to_gate.shape[-1], scratch)

    def _pull_attention(self, x: Tensor, kept: Kept, G_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        norms = self._rows("pre_attention", x), self._rows("post_attention", kept.attended)
        *w_qkv, w_o = self.projections.weights()
        weights = torch.cat(w_qkv), w_o

        def pull(step: Tensor, a: int, z: int) -> Tensor:
            prompts = [(start, stop) for start, stop in packed.ranges if a <= start < z]
            return pullback_prompts(step, kept.heads, weights, self.scale, prompts, scratch)

        _pull_residual(G_NKD, pull, norms, [stop for _, stop in packed.ranges], len(weights[0]), scratch)

    def _rows(self, place: str, x: Tensor | None) -> NormRows | None:
        return None if x is None or place not in self.norms else self.norms[place].rows(x)


def _pull_residual(
    G_NKD: Tensor,
    pull: Callable[[Tensor, int, int], Tensor],
    norms: tuple[NormRows | None, NormRows | None],
    ends: Sequence[int],
    width: int,
    scratch: Scratch,
) -> None:
    """Pull cotangents through x + post(f(pre(x))), in place.

    Args:
        G_NKD: the cotangents.
        pull: the pullback of f for positions [start, stop).
        norms: what the pullbacks of pre and post need; None where there is no such norm.
        ends: where a stretch of positions may end that f pulls back by itself.
        width: of a row, where f is widest.
        scratch: for what passes through.
    """
    pre, post = norms
    for a, z in stretches(ends, G_NKD.shape[1], width, G_NKD.device):
        g = G_NKD[a:z]
        step = g if post is None else post.at(a, z).pull(g, scratch, "step")
        below = pull(step, a, z)
        if pre is None:
            g += below
        else:
            pre.at(a, z).add_pull(g, below, scratch)


def rules_for(block: nn.Module) -> Iterator[BlockRule]:
    """The rules that a block may follow, by its parts; to be proven on what it returns."""
    children = list(block.children())
    attentions = [(module, parts) for module in children if (parts := parts_of(module)) is not None]
    mlps = [module for module in children if is_gated_mlp(module)]
    norms = [NormRule(module, kind) for module in children if (kind := norm_kind(module)) is not None]
    if len(attentions) != 1 or len(mlps) != 1 or len(children) != 2 + len(norms) or "forward" in vars(block):
        return
    attention, parts = attentions[0]
    if attention_scale(attention) is None:
        return
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in block.modules()):
        return
    for places in PLACES.get(len(norms), ()):
        yield BlockRule(dict(zip(places, norms, strict=True)), attention, parts, mlps[0])
