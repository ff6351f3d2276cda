"""`BlockRule`: the pullback of a whole decoder block, two residual steps, from results of the block's forward.

    y = x + post(attention(pre(x)))        z = y + post(mlp(pre(y)))

with a rotary attention and a gated MLP, and norms before them, after them, or both, all of kinds that have a pullback
in this folder. Autograd is not needed: the cotangents are one tensor, [N, K, D], each step adds its part in place, and
intermediate results pass through memory that stays in cache.

A block is run by a rule only if it returned the same as the rule, to the bit, on tokens of the run. Then results of its
forward are kept for the pullback while there is room.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.autograd import Scratch, Seen, stretches
from fisher_vmap.kernels.hf_attention import Packed, packed_now
from fisher_vmap.kernels.mlp import Mlp, fused_mlp, mlp_of
from fisher_vmap.kernels.modules import NormKind, NormRows, fused_norm, norm_kind, norm_rows
from fisher_vmap.kernels.rotary_attention import (
    AttentionParts,
    Heads,
    RotaryCall,
    attend,
    attention_scale,
    parts_of,
    pullback_groups,
    rotary_call,
)
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import BlockCall, check_primal, hooks, output_of, with_hidden
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.wrappers import has_hooks

Forward = Callable[..., Any]

# The places of a block's norms, by their number, in the order in which the block holds them.
PLACES = {
    2: (("pre_attention", "pre_mlp"), ("post_attention", "post_mlp")),
    4: (("pre_attention", "post_attention", "pre_mlp", "post_mlp"),),
}
# How many bytes of forward results are kept for the pullback; blocks for which there is no room run again.
KEPT_BYTES = {"cpu": 3 * 2**25}
KEPT_SHARE_OF_GPU = 1 / 8  # of its free memory
# If all blocks' results are more than this many times that, nothing is kept: it would save little time for much memory,
# which is scarce with long prompts.
WORTH_KEEPING = 2


def fused_forward(module: nn.Module) -> Forward | None:
    """The forward with a fused pullback of a norm or an MLP; None for other modules."""
    if len(inspect.signature(module.forward).parameters) != 1:  # a second input, such as a gate
        return None
    if (fused := fused_mlp(module)) is not None:
        return fused
    if (kind := norm_kind(module)) is not None:
        return fused_norm(module, kind)
    return None


class NormRule(NamedTuple):
    """A norm of a known kind."""

    module: nn.Module
    kind: NormKind

    def rows(self, x: Tensor) -> NormRows:
        """The rows for the pullback at x, [N, 1, D]; the 1 broadcasts to the cotangents."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return norm_rows(x, weight.detach(), self.kind, x.dtype).each(lambda row: row[:, None])


class Kept(NamedTuple):
    """The results of a block's forward that its pullback needs in addition to its input x.

    Attributes:
        attended: [N, D], the input of the norm after the attention; None if there is none.
        heads: the attention's heads.
        y: [N, D], the residual stream after the attention.
        inner: the outputs of the MLP's first layers.
        moved: [N, D], the input of the norm after the MLP; None if there is none.
        z: [1, N, D], the block's output.
    """

    attended: Tensor | None
    heads: Heads
    y: Tensor
    inner: tuple[Tensor, ...]
    moved: Tensor | None
    z: Tensor

    def bytes(self) -> int:
        """The memory of these results, without what exists anyway: the output and the rotary embedding."""
        heads, own = self.heads, (self.attended, self.y, *self.inner, self.moved)
        return sum(t.numel() * t.element_size() for t in (*own, heads.q, heads.k, heads.v) if t is not None)


@dataclass(frozen=True)
class BlockRule:
    """The parts of a block, and its pullback by them.

    Attributes:
        norms: the norms by place; the places are one entry of `PLACES`.
        attention: the attention module.
        projections: the projections of the attention module.
        mlp: the MLP.
    """

    norms: Mapping[str, NormRule]
    attention: nn.Module
    projections: AttentionParts
    mlp: Mlp

    @property
    def scale(self) -> float:
        """The factor of the attention scores, as it is now."""
        scale = attention_scale(self.attention)
        assert scale is not None
        return scale

    def forward(self, call: RotaryCall) -> tuple[Tensor, Kept]:
        """The block's output, [1, N, D], and the results that the pullback needs."""
        step, heads = attend(call._replace(x=self._norm("pre_attention", call.x)), self.projections, self.scale)
        attended = step[0] if "post_attention" in self.norms else None
        y = call.x + self._norm("post_attention", step)
        step, *outs = self.mlp.forward(self._norm("pre_mlp", y))
        moved = step[0] if "post_mlp" in self.norms else None
        z = y + self._norm("post_mlp", step)
        return z, Kept(attended, heads, y[0], tuple(out[0] for out in outs), moved, z)

    def pullback(self, x: Tensor, kept: Kept, cotangents_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        """Turn K cotangents of the block's output into those of its input x, [1, N, D], in place, [N, K, D]."""
        self._pull_mlp(kept, cotangents_NKD, scratch)
        self._pull_attention(x[0], kept, cotangents_NKD, packed, scratch)

    def _norm(self, place: str, x: Tensor) -> Tensor:
        return self.norms[place].module(x) if place in self.norms else x  # type: ignore[no-any-return]

    def _pull_mlp(self, kept: Kept, G_NKD: Tensor, scratch: Scratch) -> None:
        norms = self._rows("pre_mlp", kept.y), self._rows("post_mlp", kept.moved)
        pull = self.mlp.pull_from(Seen({}, dict(zip(self.mlp.first, kept.inner, strict=True))), scratch)
        _pull_residual(G_NKD, pull, norms, range(1, len(G_NKD) + 1), self.mlp.width, scratch)

    def _pull_attention(self, x: Tensor, kept: Kept, G_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        norms = self._rows("pre_attention", x), self._rows("post_attention", kept.attended)
        *w_qkv, w_o = self.projections.weights()
        weights = torch.cat(w_qkv), w_o

        groups = packed.groups_on(G_NKD.device)
        together = any(group.single is None for group in groups)

        def pull(step: Tensor, a: int, z: int) -> Tensor:
            inside = [group for group in groups if together or a <= group.first < z]
            return pullback_groups(step, kept.heads, weights, self.scale, inside, scratch)

        ends = [len(G_NKD)] if together else [stop for _, stop in packed.ranges]
        _pull_residual(G_NKD, pull, norms, ends, len(weights[0]), scratch)

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

    `pull` is the pullback of f for positions [start, stop), `norms` are the rows of pre and post, and `ends` and
    `width` are as for `stretches`.
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
    """The rules that a block may follow, by its parts; to be proven by its output."""
    children = list(block.children())
    attentions = [(module, parts) for module in children if (parts := parts_of(module)) is not None]
    mlps = [mlp for module in children if (mlp := mlp_of(module)) is not None]
    norms = [NormRule(module, kind) for module in children if (kind := norm_kind(module)) is not None]
    if len(attentions) != 1 or len(mlps) != 1 or len(children) != 2 + len(norms) or "forward" in vars(block):
        return
    attention, parts = attentions[0]
    if attention_scale(attention) is None:
        return
    if has_hooks(block) or any("forward" in vars(m) for m in block.modules()):
        return
    for places in PLACES.get(len(norms), ()):
        yield BlockRule(dict(zip(places, norms, strict=True)), attention, parts, mlps[0])


def why_no_rule(block: nn.Module) -> str:
    """Why `rules_for` has no rule for a block, in words."""
    if has_hooks(block):
        return "it has a hook"
    if any("forward" in vars(m) for m in block.modules()):
        return "a forward in it has been replaced"
    children = list(block.children())
    if not any(parts_of(module) is not None for module in children):
        return "its attention is not of the plain rotary kind"
    if not any(mlp_of(module) is not None for module in children):
        return "its MLP is not of a plain kind"
    return "it has parts other than norms, rotary attention and gated MLP"


Rules = dict[nn.Module, BlockRule]


def proven_blocks(candidates: Mapping[nn.Module, list[BlockRule]], run: Callable[[], object]) -> Rules:
    """For each block the rule that returns the same as the block, on its inputs while `run` runs the model."""
    right: Rules = {}

    def compare(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inner = rotary_call(args, kwargs, next(iter(candidates[block])).projections.head)
        expected = output_of(output)
        if inner is None or expected is None or not isinstance(output, Tensor):
            return
        for rule in candidates[block]:
            try:
                with weights_ready(block):
                    found, _ = rule.forward(inner)
            except (RuntimeError, TypeError, ValueError) as error:  # the parts do not fit this rule
                if is_out_of_memory(error):
                    raise
                continue
            # To the bit: a wrong step could be small relative to the residual stream.
            if torch.equal(found, expected):
                right[block] = rule
                return

    blocks = [block for block, rules in candidates.items() if rules]
    with hooks(*(block.register_forward_hook(compare, with_kwargs=True) for block in blocks)):
        run()
    return right


def kept_room(kind: str) -> int:
    """How many bytes of forward results may be kept for the pullback on a device of this type."""
    if kind == "cuda":
        return int(KEPT_SHARE_OF_GPU * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
    return KEPT_BYTES.get(kind, 0)


@contextmanager
def run_by_rules(rules: Rules, calls: list[BlockCall], most: int) -> Iterator[None]:
    """Within the context blocks run by their rules, and results are kept in `calls` while there is room.

    `calls` is the list of a recording, which has an entry for a call before the block runs. Results are kept for the
    first `most` calls only; the last block is pulled back in another way.
    """
    room = {kind: kept_room(kind) for kind in (*KEPT_BYTES, "cuda")}

    def by_rule(block: nn.Module, rule: BlockRule) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            inner = rotary_call(args, kwargs, rule.projections.head)
            if inner is None:
                return own(*args, **kwargs)
            z, kept = rule.forward(inner)
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
    """Pull cotangents through one call of a block in place, [1, N, K, D]; False if the rule does not apply to the call.

    `expected` is the recorded output, [1, N, D]. If no results are kept, the block's forward runs again. `chunk_size`
    is how many cotangents to take at a time; None: all at once.

    Raises:
        StructureChanged: the rule's output differs from `expected`.
    """
    packed, kept = packed_now(), call.kept[0] if call.kept else None
    if packed is None:
        return False
    if kept is None:
        inner = rotary_call(*with_hidden(call.args, call.kwargs, call.hidden), rule.projections.head)
        if inner is None:
            return False
        _, kept = rule.forward(inner)
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
