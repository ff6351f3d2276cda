"""`rules_of`: how blocks are made, found by values on tokens of the run, and their rules, proven there.

Hooks note what every module of a block received and returned. A branch is a child whose output, or the norm of it, is
added to the stream that it, or the norm before it, received; the sums must be equal to what went on, to the bit, since
a wrong step could be small relative to the residual stream. An attention is made of the linear layers whose outputs
become its queries, keys and values, by a norm and a rotation, or without. The pullback of each part is then compared
with autograd's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention import attention_forward
from fisher_vmap.kernels.attention_rule import WAYS, AttentionRule, Columns, Rotary, rotary_of
from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.decoder_block import BlockRule, Branch, Rules
from fisher_vmap.kernels.experts import mixture_of
from fisher_vmap.kernels.hf_attention import Packed, nothing_packed, packed_now
from fisher_vmap.kernels.mlp import mlp_of
from fisher_vmap.kernels.modules import NormRule, norm_kind
from fisher_vmap.kernels.parts import ByAutograd, Part, Seen, Watched, seeing
from fisher_vmap.kernels.quantized import is_affine
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import output_of
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.wrappers import has_hooks

NO_KIND = "it is not an MLP or a mixture of experts of a known kind"


class Facts(NamedTuple):
    """What is known of a block's modules before it is watched: plain linear layers, norms, MLPs and mixtures."""

    linears: frozenset[nn.Module]
    norms: Mapping[nn.Module, NormRule]
    parts: Mapping[nn.Module, Part]


class _Found(NamedTuple):
    """What runs a branch, and what it adds to the stream before the factor."""

    name: str
    module: nn.Module
    pre: NormRule | None
    post: NormRule | None
    after: Tensor


def facts_of(block: nn.Module) -> Facts | str:
    """What is known of a block's modules before it is watched; or why it has no rule."""
    if has_hooks(block):
        return "it has a hook"
    if any("forward" in vars(m) for m in block.modules()):
        return "a forward in it has been replaced"
    inner = [m for m in block.modules() if m is not block]
    norms = {m: NormRule(m, kind) for m in inner if (kind := norm_kind(m)) is not None}
    parts = {m: part for m in block.children() if (part := mlp_of(m) or mixture_of(m)) is not None}
    return Facts(frozenset(m for m in inner if is_affine(m)), norms, parts)


def rules_of(blocks: Mapping[str, nn.Module], run: Callable[[], object]) -> tuple[Rules, dict[str, str]]:
    """The rules of blocks, found and proven while `run` runs the model on packed prompts; why the others have none."""
    rules: Rules = {}
    why: dict[str, str] = {}
    facts: dict[nn.Module, Facts] = {}
    names = {block: name for name, block in blocks.items()}
    for name, block in blocks.items():
        with weights_ready(block), nothing_packed():
            found = facts_of(block)
        if isinstance(found, str):
            why[name] = found
        else:
            facts[block] = found

    def end(block: nn.Module, seen: Seen) -> None:
        packed = packed_now()
        if packed is None or block in rules:
            return
        try:
            with weights_ready(block):
                rule: BlockRule | str = _compose(block, seen, facts[block], packed)
        except (RuntimeError, ValueError, IndexError) as error:  # shapes that no part of ours expects
            if is_out_of_memory(error):
                raise
            rule = f"it cannot be taken apart ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
        if isinstance(rule, str):
            why[names[block]] = rule
        else:
            rules[block] = rule

    def everything(block: nn.Module) -> Watched:
        modules = tuple(block.modules())
        return Watched(modules, modules, modules, modules)

    with seeing({block: everything(block) for block in facts}, lambda _block: Seen(), end):
        run()
    return rules, why


def _compose(block: nn.Module, seen: Seen, facts: Facts, packed: Packed) -> BlockRule | str:
    """The rule of a block from one call in which all its modules were seen; or why it has none."""
    x, z = seen.inputs.get(block), output_of(seen.outputs[block])
    if x is None or z is None or x.shape != z.shape or x.shape[0] != 1:
        return "its output is not like its input"
    if not seen.unchanged():
        return "it writes into its tensors"
    found = _branches(block, seen, facts)
    if not found:
        return "no branch was found in it"
    scales = (1.0, *(value for value in vars(block).values() if type(value) is float))
    steps, stream, waiting = list[tuple[Branch, ...]](), x, list[_Found]()
    sources = [seen.inputs[b.module if b.pre is None else b.pre.module] for b in found]
    for branch, source in [*zip(found, sources, strict=True), (None, z)]:
        if waiting and (branch is None or not torch.equal(source, stream)):
            scale = _scale(stream, [b.after for b in waiting], source, scales)
            if scale is None:
                return "what it adds to the residual stream is more than its branches"
            parts = [_part(b, seen, facts, packed) for b in waiting]
            steps.append(tuple(Branch(b.name, p, b.pre, b.post, scale) for b, p in zip(waiting, parts, strict=True)))
            stream, waiting = source, []
        if branch is not None:
            if not torch.equal(source, stream):
                return "a branch reads something else than the residual stream"
            waiting.append(branch)
    rule = BlockRule(tuple(steps))
    left = rule.by_autograd()
    if len(left) == len(found):
        return "; ".join(f"{name}: {reason}" for name, reason in left.items())
    return rule


def _branches(block: nn.Module, seen: Seen, facts: Facts) -> list[_Found]:
    """The modules whose output, or its norm, is added to the stream, in the order of their calls."""
    called = [(name, module) for name, module in block.named_children() if module in seen.inputs]
    norms = [facts.norms[module] for _, module in called if module in facts.norms]
    order = list(seen.inputs)
    found = []
    for name, module in sorted(called, key=lambda pair: order.index(pair[1])):
        got, gave = seen.inputs[module], output_of(seen.outputs[module])
        if module in facts.norms or gave is None or gave.shape != got.shape or torch.equal(got, gave):
            continue  # a norm, something else than a branch, or a dropout
        pre = next((norm for norm in norms if torch.equal(seen.outputs[norm.module], got)), None)
        post = next((norm for norm in norms if torch.equal(seen.inputs[norm.module], gave)), None)
        after = gave if post is None else seen.outputs[post.module]
        found.append(_Found(name, module, pre, post, after))
    return found


def _scale(stream: Tensor, added: Sequence[Tensor], target: Tensor, scales: Sequence[float]) -> float | None:
    """The factor s with stream + s * (the sum of what is added) equal to the target, to the bit; None: none of them."""
    for scale in scales:
        terms = [stream, *(t if scale == 1 else t * scale for t in added)]
        for order in permutations(terms):
            total = order[0]
            for term in order[1:]:
                total = total + term
            if torch.equal(total, target):
                return scale
    return None


def _part(branch: _Found, seen: Seen, facts: Facts, packed: Packed) -> AttentionRule | Part:
    """The part of a branch, proven on what was seen; `ByAutograd` if it has no rule there."""
    module = branch.module
    mixes = any(m in seen.attention for m in module.modules())
    part: AttentionRule | Part | str
    part = find_attention(module, seen, facts, packed) if mixes else facts.parts.get(module, NO_KIND)
    if isinstance(part, str):
        return ByAutograd(module, part, mixes)
    gap, allowed = _gap(part, ByAutograd(module, "", mixes), seen, packed)
    if not gap <= allowed:
        return ByAutograd(module, f"its pullback is {gap:.0e} away from autograd's", mixes)
    return part


def _gap(part: AttentionRule | Part, other: ByAutograd, seen: Seen, packed: Packed) -> tuple[float, float]:
    """The relative distance of a part's pullback of two cotangents from autograd's, and how much of it is rounding."""
    x = seen.inputs[other.module]
    N, D = x.shape[-2:]
    g = torch.randn(N, 2, D, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    narrow = {p: seen.only(p.watched()).at(None, N) for p in (part, other)}
    expected = other.pull_from(narrow[other], Scratch())(g, 0, N)
    if isinstance(part, AttentionRule):
        found = part.pull_from(narrow[part], Scratch(), packed)(g, 0, N)
    else:
        found = part.pull_from(narrow[part], Scratch())(g, 0, N)
    size = expected.norm()
    gap = float((found - expected).norm() / size) if size > 0 else float(found.norm())
    return gap, float(torch.finfo(x.dtype).eps ** (2 / 3))


def find_attention(module: nn.Module, seen: Seen, facts: Facts, packed: Packed) -> AttentionRule | str:
    """The rule of an attention module from one call of it in which all its modules were seen; or why it has none."""
    call, inner = seen.attention.get(module), [m for m in module.modules() if m is not module]
    if call is None:
        return "it does not call our attention"
    linears = [m for m in inner if m in facts.linears and m in seen.outputs]
    y, x, E = output_of(seen.outputs[module]), seen.inputs[module], call.q.shape[-1]
    outs = [m for m in linears if y is not None and same(seen.outputs[m], y)]
    ins = [m for m in linears if m not in outs and same(seen.inputs[m], x)]
    if len(outs) != 1 or not ins:
        return "its projections were not found"
    kind = replace(call.kind, groups=packed.groups_on(call.q.device))
    attended = attention_forward(call.q, call.k, call.v, None, kind, call.sinks).transpose(1, 2)
    if not same(seen.inputs[outs[0]], attended):
        return "its output projection receives something else than the attention's output"
    norms = [facts.norms[m] for m in inner if m in facts.norms and m in seen.outputs]
    search = _Search(module, seen, ins, norms, E, [])
    q, k, v = (search.columns(t, plain=t is call.v) for t in (call.q, call.k, call.v))
    if q is None or k is None or v is None:
        return f"how its {'queries' if q is None else 'keys' if k is None else 'values'} are made was not found"
    if q[1] != k[1]:
        return "its queries and keys are rotated in different ways"
    if {q[0].linear, k[0].linear, v[0].linear} != set(ins):
        return "it has other projections"
    return AttentionRule(module, q[0], k[0], v[0], outs[0], q[1], E)


class _Search(NamedTuple):
    """Where queries, keys and values may come from.

    Attributes:
        module: the attention module.
        seen: one call of it.
        linears: the linear layers of its input.
        norms: the norms inside it.
        width: E.
        taken: the columns that were found to be something.
    """

    module: nn.Module
    seen: Seen
    linears: Sequence[nn.Module]
    norms: Sequence[NormRule]
    width: int
    taken: list[Columns]

    def columns(self, found: Tensor, plain: bool) -> tuple[Columns, Rotary | None] | None:
        """The columns and the rotation that give `found`, [1, heads, N, E]; `plain`: without norm and rotation.

        Layers may have the same weights: one that nothing was found in comes first, and columns are found once.
        """
        heads, target = found.shape[1], found[0].transpose(0, 1)
        used = [columns.linear for columns in self.taken]
        for linear in sorted(self.linears, key=lambda linear: linear in used):
            x = self.seen.outputs[linear].flatten(0, -2)
            for columns in _places(linear, heads, x.shape[-1], self.width):
                raw = columns.of(x, self.width)
                if columns in self.taken:
                    continue
                for normed, value in [(columns, raw)] if plain else self._normed(columns, raw):
                    for rotary in [None] if plain else self._rotaries():
                        if same(self._rotated(value, rotary), target):
                            self.taken.append(columns)
                            return normed, rotary
        return None

    def _normed(self, columns: Columns, raw: Tensor) -> Iterator[tuple[Columns, Tensor]]:
        yield columns, raw
        N, heads, width = raw.shape
        for rule in self.norms:
            got, gave = self.seen.inputs[rule.module], self.seen.outputs[rule.module]
            if got.numel() != raw.numel():
                continue
            # The norm may receive [1, N, heads, E], [1, heads, N, E] or [1, N, heads E].
            turned = got.dim() >= 3 and got.shape[-3:-1] == (heads, N) and (heads != N or not same(got, raw))
            before, after = (
                t.reshape(heads, N, width).transpose(0, 1) if turned else t.reshape(N, heads, width)
                for t in (got, gave)
            )
            if same(before, raw):
                whole = got.shape[-1] != width
                yield replace(columns, norm=rule, whole=whole), after

    def _rotaries(self) -> Iterator[Rotary | None]:
        yield None
        rotary = self.seen.calls[self.module][1].get("position_embeddings")
        if isinstance(rotary, tuple | list) and len(rotary) == 2 and all(_may_rotate(t) for t in rotary):
            for way in (Rotary(*way) for way in WAYS):
                columns = way.factors(*rotary)[0].shape[-1]
                if columns <= self.width and columns % 2 == 0:
                    yield way

    def _rotated(self, value: Tensor, rotary: Rotary | None) -> Tensor:
        if rotary is None:
            return value
        cos, sin = rotary.factors(*(t[0] for t in rotary_of(self.seen, self.module)))
        return rotary.apply(value, cos[:, None], sin[:, None])


def _may_rotate(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3


def _places(linear: nn.Module, heads: int, C: int, width: int) -> Iterator[Columns]:
    """Where heads may be in C columns: one after another from any head's beginning, or one of each of some slots."""
    size = heads * width
    for start in range(0, C - size + 1, width):
        yield Columns(linear, start, heads)
    if C % size == 0 and size < C:
        for slot in range(C // size):
            yield Columns(linear, slot, heads, joined=C // size)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, up to a few roundings."""
    if a.numel() != b.numel():
        return False
    expected = b.reshape(a.shape)
    return bool((a - expected).norm() <= 4 * torch.finfo(a.dtype).eps * expected.norm())
