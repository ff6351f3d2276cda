"""The pullback of a whole decoder block by hand, from what its forward has computed anyway.

A block is taken for one of these only if it is a chain of two residual steps,

    y = x + post(attention(pre(x)))        z = y + post(mlp(pre(y)))

whose norms, rotary attention and gated MLP are of the kinds that have a pullback of their own, and only if, on the
run's own tokens, it returns to the bit what this formula does. Then nothing needs autograd: the cotangents stand in one
piece of memory, [N, K, D], and each step adds its share to them in place; what the forward of the block had computed
serves as it is, while there is room to keep it; and everything in between passes through memory that stays in cache.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.attention_blocks import AttentionKind
from fisher_vmap.attention_interface import Packed, packed_now
from fisher_vmap.blocks import output_of, with_hidden
from fisher_vmap.fused_attention import (
    AttentionParts,
    attend,
    attention_scale,
    is_rotary,
    parts_of,
    pullback_prompts,
)
from fisher_vmap.gated_mlp import MlpParts, is_gated_mlp, pull_mlp
from fisher_vmap.memory import is_out_of_memory
from fisher_vmap.norms import NormKind, NormRows, norm_kind, norm_rows
from fisher_vmap.recording import BlockCall, check_primal, hooks
from fisher_vmap.scratch import Scratch, stretches

# Of what forwards compute, how much is kept for the pullback; the blocks that find no room run again.
KEPT_BYTES = {"cpu": 3 * 2**25}
KEPT_SHARE_OF_GPU = 1 / 8  # of the memory that is free
# Where all that the blocks compute is more than so many times as much, nothing is kept: the time saved would be small
# beside the memory, which is what long prompts are short of.
WORTH_KEEPING = 2

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

    [N, ...] each, q, k and v [1, H, N, E]; z, [1, N, D], is what the block returned, and cos and sin are all blocks'.
    """

    attended: Tensor | None
    y: Tensor
    moved: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    z: Tensor
    cos: Tensor
    sin: Tensor

    def bytes(self) -> int:
        """How much memory that is, without what would be there anyway: the stream and the rotary embedding."""
        return sum(t.numel() * t.element_size() for t in self[:-3] if t is not None)


@dataclass(frozen=True)
class BlockRule:
    """The parts of a block."""

    norms: Mapping[str, NormRule]
    attention: AttentionParts
    module: nn.Module
    """The attention module."""
    mlp: nn.Module

    @property
    def scale(self) -> float:
        """What the scores of attention are multiplied with, as it is now."""
        scale = attention_scale(self.module)
        assert scale is not None
        return scale

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packed: Packed) -> tuple[Tensor, Kept]:
        """The block's output, [1, N, D], for packed prompts, and what the pullback needs."""
        kind = AttentionKind(self.scale, True, packed.groups_on(x.device))
        step, q, k, v = attend(self._norm("pre_attention", x), cos, sin, self.attention, kind)
        attended = step if "post_attention" in self.norms else None
        y = x + self._norm("post_attention", step)
        step, a, b = MlpParts.of(self.mlp).forward(self._norm("pre_mlp", y))
        moved = step if "post_mlp" in self.norms else None
        z = y + self._norm("post_mlp", step)
        before = None if attended is None else attended[0], None if moved is None else moved[0]
        return z, Kept(before[0], y[0], before[1], q, k, v, a[0], b[0], z, cos, sin)

    def pullback(self, x: Tensor, kept: Kept, cotangents_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        """Turn K cotangents of the block's output into those of its input x, [1, N, D], in place, [N, K, D]."""
        self._pull_mlp(kept, cotangents_NKD, scratch)
        self._pull_attention(x[0], kept, cotangents_NKD, packed, scratch)

    def _norm(self, place: str, x: Tensor) -> Tensor:
        return self.norms[place].module(x) if place in self.norms else x  # type: ignore[no-any-return]

    def _pull_mlp(self, kept: Kept, G_NKD: Tensor, scratch: Scratch) -> None:
        N, K, _ = G_NKD.shape
        parts = MlpParts.of(self.mlp)
        weights = parts.weights()
        to_gate, to_up = (factor[:, None] for factor in parts.factors(kept.a, kept.b))
        pre, post = self._rows("pre_mlp", kept.y), self._rows("post_mlp", kept.moved)
        for a, z in stretches(range(1, N + 1), K, to_gate.shape[-1], G_NKD.device):
            g = G_NKD[a:z]
            step = g if post is None else post.at(a, z).pull(g, scratch, "step")
            dn = pull_mlp(step, to_gate[a:z], to_up[a:z], weights, scratch)
            _add_through(g, dn, pre, a, z, scratch)

    def _pull_attention(self, x: Tensor, kept: Kept, G_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        K = G_NKD.shape[1]
        pre, post = self._rows("pre_attention", x), self._rows("post_attention", kept.attended)
        kind, parts = AttentionKind(self.scale, True), self.attention
        weights = torch.cat([p.weight.detach() for p in (parts.q, parts.k, parts.v)]), parts.o.weight.detach()
        for a, z in stretches([stop for _, stop in packed.ranges], K, weights[0].shape[0], G_NKD.device):
            g = G_NKD[a:z]
            step = g if post is None else post.at(a, z).pull(g, scratch, "step")
            prompts = [(start, stop) for start, stop in packed.ranges if a <= start < z]
            dn = pullback_prompts(step, *kept[-2:], kept.q, kept.k, kept.v, weights, kind, prompts, scratch)
            _add_through(g, dn, pre, a, z, scratch)

    def _rows(self, place: str, x: Tensor | None) -> NormRows | None:
        return None if x is None or place not in self.norms else self.norms[place].rows(x)


def _add_through(g: Tensor, dn: Tensor, pre: NormRows | None, a: int, z: int, scratch: Scratch) -> None:
    """Add to g what arrives below the norm at the beginning of a residual step."""
    if pre is None:
        g += dn
    else:
        pre.at(a, z).add_pull(g, dn, scratch)


def block_rule(block: nn.Module) -> Iterator[BlockRule]:
    """The rules that a block may follow, by its parts; to be proven on what it returns."""
    children = list(block.children())
    attentions = [(module, parts) for module in children if (parts := parts_of(module)) is not None]
    mlps = [module for module in children if is_gated_mlp(module)]
    norms = [NormRule(module, kind) for module in children if (kind := norm_kind(module)) is not None]
    if len(attentions) != 1 or len(mlps) != 1 or len(children) != 2 + len(norms) or "forward" in vars(block):
        return
    (attention, parts) = attentions[0]
    if attention_scale(attention) is None:
        return
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in block.modules()):
        return
    for places in PLACES.get(len(norms), ()):
        yield BlockRule(dict(zip(places, norms, strict=True)), parts, attention, mlps[0])


Rules = dict[nn.Module, BlockRule]


def proven_blocks(candidates: Mapping[nn.Module, list[BlockRule]], run: Callable[[], object]) -> Rules:
    """For each block the rule that gives what the block gives, on what it sees while `run` runs the model."""
    right: Rules = {}

    def compare(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = _inputs(args, kwargs, next(iter(candidates[block])).attention.head)
        expected = output_of(output)
        if inputs is None or expected is None or not isinstance(output, Tensor):
            return
        for rule in candidates[block]:
            try:
                found, _ = rule.forward(*inputs)
            except (RuntimeError, TypeError, ValueError) as error:  # the parts do not fit together like this
                if is_out_of_memory(error):
                    raise
                continue
            # To the bit: next to a large residual stream a wrong step would look small.
            if torch.equal(found, expected):
                right[block] = rule
                return

    blocks = [block for block, rules in candidates.items() if rules]
    with hooks(*(block.register_forward_hook(compare, with_kwargs=True) for block in blocks)):
        run()
    return right


def _inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], head: int
) -> tuple[Tensor, Tensor, Tensor, Packed] | None:
    """x, cos, sin and the prompts of a call of a block; None where it is given anything else that could matter."""
    packed, rotary = packed_now(), kwargs.get("position_embeddings")
    x = args[0] if args else kwargs.get("hidden_states")
    if packed is None or len(args) > 1 or not isinstance(x, Tensor) or not is_rotary(rotary, x, head):
        return None
    if kwargs.get("attention_mask") is not None or kwargs.get("past_key_values") is not None:
        return None
    assert rotary is not None
    return x, rotary[0], rotary[1], packed


@contextmanager
def keeping(rules: Rules, calls: list[BlockCall], most: int) -> Iterator[None]:
    """Within the context blocks run by their rules; the last of the calls gets what its block computed, while room is.

    Args:
        rules: of the blocks.
        calls: the list that a recording fills; it has an entry for a call before the block runs.
        most: of how many calls at the beginning of the list anything is kept; the last block is pulled back otherwise.
    """
    room = dict(KEPT_BYTES)
    if torch.cuda.is_available():
        room["cuda"] = int(KEPT_SHARE_OF_GPU * torch.cuda.mem_get_info()[0])

    def by_rule(block: nn.Module, rule: BlockRule) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = _inputs(args, kwargs, rule.attention.head)
            if inputs is None:
                return own(*args, **kwargs)
            z, kept = rule.forward(*inputs)
            if calls and calls[-1].block is block and len(calls) <= most:
                device, size = z.device.type, kept.bytes()
                if len(calls) == 1 and size * most > WORTH_KEEPING * room.get(device, 0):
                    room.clear()
                if size <= room.get(device, 0):
                    room[device] -= size
                    calls[-1].kept.append(kept)
            return z

        return forward

    try:
        for block, rule in rules.items():
            block.forward = by_rule(block, rule)  # type: ignore[method-assign]
        yield
    finally:
        for block in rules:
            vars(block).pop("forward", None)


def pullback_by_rule(
    rule: BlockRule, call: BlockCall, expected: Tensor, cotangents: Tensor, chunk_size: int | None, scratch: Scratch
) -> bool:
    """Pull cotangents through one call of a block in place, [1, N, K, D]; False where the rule does not hold for it.

    Args:
        rule: of the block.
        call: the call; what had not been kept of it is computed again.
        expected: [1, N, D], what the call returned.
        cotangents: of its output, changed into those of its input.
        chunk_size: how many cotangents at a time; None: all at once.
        scratch: for what passes through.

    Raises:
        StructureChanged: what the block computed, or computes again, is not what went on from it.
    """
    packed, kept = packed_now(), call.kept[0] if call.kept else None
    if packed is None:
        return False
    if kept is None:
        inputs = _inputs(*with_hidden(call.args, call.kwargs, call.hidden), rule.attention.head)
        if inputs is None:
            return False
        _, kept = rule.forward(*inputs)
    check_primal(f"what {call.name} computed", kept.z, expected)
    G_NKD, K = cotangents[0], cotangents.shape[2]
    if chunk_size is None or chunk_size >= K:
        rule.pullback(call.hidden, kept, G_NKD, packed, scratch)
        return True
    for start in range(0, K, chunk_size):
        piece = G_NKD[:, start : start + chunk_size].contiguous()
        rule.pullback(call.hidden, kept, piece, packed, scratch)
        G_NKD[:, start : start + chunk_size] = piece
    return True
