"""`BlockRule`: the pullback of a whole decoder block, put together from the pullbacks of its parts.

    y = x + s post(f(pre(x)))                          one branch after another,
    z = x + s post(f(pre(x))) + s post'(f'(pre'(x)))   or several side by side,

with norms before a branch, after it, both or none, and s a factor of the block. The branches are attention, MLPs and
mixtures of experts with a pullback in this folder; another branch is pulled back by `vmap`, it alone. The cotangents
are one tensor, [N, K, D], each branch adds its part in place, and intermediate results pass through memory that stays
in cache.

How a block is made is found by values, on tokens of the run: what each module received and returned, and which sums
are equal to what went on, to the bit. A wrong step could be small relative to the residual stream. The pullback of each
part is compared with autograd there. The block's forward stays its own; results that the pullback needs are kept while
there is room.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention_rule import AttentionRule, Facts, find_attention
from fisher_vmap.kernels.autograd import Scratch, stretches
from fisher_vmap.kernels.experts import mixture_of
from fisher_vmap.kernels.hf_attention import Packed, nothing_packed, packed_now
from fisher_vmap.kernels.mlp import fused_mlp, mlp_of
from fisher_vmap.kernels.modules import NormRows, NormRule, fused_norm, norm_kind
from fisher_vmap.kernels.parts import ByAutograd, Part, Pull, Seen, Watched, seeing
from fisher_vmap.kernels.quantized import is_affine
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.recording import BlockCall, output_of
from fisher_vmap.model.validation import is_out_of_memory
from fisher_vmap.model.wrappers import has_hooks

Forward = Callable[..., Any]

# How many bytes of forward results are kept for the pullback; blocks for which there is no room run again.
KEPT_BYTES = {"cpu": 3 * 2**25}
KEPT_SHARE_OF_GPU = 1 / 8  # of its free memory
# If all blocks' results are more than this many times that, nothing is kept: it would save little time for much memory,
# which is scarce with long prompts.
WORTH_KEEPING = 2
NO_KIND = "it is not an MLP or a mixture of experts of a known kind"


def fused_forward(module: nn.Module) -> Forward | None:
    """The forward with a fused pullback of a norm or an MLP; None for other modules."""
    if len(inspect.signature(module.forward).parameters) != 1:  # a second input, such as a gate
        return None
    if (fused := fused_mlp(module)) is not None:
        return fused
    if (kind := norm_kind(module)) is not None:
        return fused_norm(module, kind)
    return None


@dataclass(frozen=True)
class Branch:
    """scale * post(part(pre(x))), which a block adds to its residual stream x.

    Attributes:
        name: of the module in the block.
        part: the attention, the MLP, or a module that `vmap` pulls back.
        pre: the norm before it; None: none.
        post: the norm after it; None: none.
        scale: the factor.
    """

    name: str
    part: AttentionRule | Part
    pre: NormRule | None
    post: NormRule | None
    scale: float

    def watched(self, first: bool) -> Watched:
        """What its pullback needs; the input of the first norms is that of the block."""
        norms = [None if first else self.pre, self.post]
        own = Watched(inputs=tuple(norm.module for norm in norms if norm is not None))
        return Watched.all_of([own, self.part.watched()])

    def ends(self, packed: Packed, rows: int, device: torch.device) -> Sequence[int]:
        """Where a stretch of positions may end."""
        if isinstance(self.part, AttentionRule):
            return self.part.ends(packed, rows, device)
        return [rows] if isinstance(self.part, ByAutograd) else range(1, rows + 1)

    def pull_from(self, seen: Seen, packed: Packed, scratch: Scratch) -> Pull:
        """The pullback of post and part; the cotangents of pre's output, with the factor."""
        if isinstance(self.part, AttentionRule):
            inner = self.part.pull_from(seen, scratch, packed)
        else:
            inner = self.part.pull_from(seen, scratch)
        post = None if self.post is None else self.post.rows(seen.inputs[self.post.module])

        def pull(g: Tensor, a: int, z: int) -> Tensor:
            below = inner(g if post is None else post.at(a, z).pull(g, scratch, "step"), a, z)
            return below if self.scale == 1 else below.mul_(self.scale)

        return pull


@dataclass(frozen=True)
class BlockRule:
    """The steps of a block, each of branches side by side, and its pullback by them."""

    steps: tuple[tuple[Branch, ...], ...]

    def watched(self) -> Watched:
        """What the pullback needs of the forward."""
        return Watched.all_of([b.watched(first=i == 0) for i, step in enumerate(self.steps) for b in step])

    def by_autograd(self) -> dict[str, str]:
        """The branches that `vmap` pulls back, and why."""
        parts = [(branch.name, branch.part) for step in self.steps for branch in step]
        return {name: part.why for name, part in parts if isinstance(part, ByAutograd)}

    @property
    def mixes_by_autograd(self) -> bool:
        """Whether positions interact in a branch that `vmap` pulls back."""
        return any(isinstance(b.part, ByAutograd) and b.part.mixes for step in self.steps for b in step)

    def pull(
        self, x: Tensor, seen: Seen, G_NKD: Tensor, packed: Packed, chunk_size: int | None, scratch: Scratch
    ) -> None:
        """Turn K cotangents of the block's output into those of its input x, [N, D], in place, [N, K, D].

        `chunk_size` is how many cotangents to take at a time; None: all at once.
        """
        K = G_NKD.shape[1]
        if chunk_size is None or chunk_size >= K:
            self._pull(x, seen, G_NKD, packed, scratch)
            return
        for start in range(0, K, chunk_size):
            piece = G_NKD[:, start : start + chunk_size].contiguous()
            self._pull(x, seen, piece, packed, scratch)
            G_NKD[:, start : start + chunk_size] = piece

    def _pull(self, x: Tensor, seen: Seen, G_NKD: Tensor, packed: Packed, scratch: Scratch) -> None:
        for number, step in reversed(list(enumerate(self.steps))):
            norms = {b.pre: x if number == 0 else seen.inputs[b.pre.module] for b in step if b.pre is not None}
            rows = {norm: norm.rows(x_ND) for norm, x_ND in norms.items()}
            pulls = [branch.pull_from(seen, packed, scratch) for branch in step]
            if len(step) == 1:
                _pull_alone(step[0], pulls[0], rows, G_NKD, packed, scratch)
            else:
                _pull_side_by_side(step, pulls, rows, G_NKD, packed, scratch)


def _pull_alone(
    branch: Branch, pull: Pull, norms: Mapping[NormRule, NormRows], G_NKD: Tensor, packed: Packed, scratch: Scratch
) -> None:
    N, K, _ = G_NKD.shape
    for a, z in stretches(branch.ends(packed, N, G_NKD.device), K, branch.part.width, G_NKD.device):
        g = G_NKD[a:z]
        below = pull(g, a, z)
        if branch.pre is None:
            g += below
        else:
            norms[branch.pre].at(a, z).add_pull(g, below, scratch)


def _pull_side_by_side(
    step: Sequence[Branch],
    pulls: Sequence[Pull],
    norms: Mapping[NormRule, NormRows],
    G_NKD: Tensor,
    packed: Packed,
    scratch: Scratch,
) -> None:
    """Every branch is pulled back from the same cotangents before any of them is added."""
    N, K, D = G_NKD.shape
    most = max(branch.part.width for branch in step)
    ends = min((branch.ends(packed, N, G_NKD.device) for branch in step), key=len)
    for a, z in stretches(ends, K, most, G_NKD.device):
        sums: dict[NormRule | None, Tensor] = {}
        for branch, pull in zip(step, pulls, strict=True):
            new = branch.pre not in sums
            if new:
                sums[branch.pre] = scratch(f"branch {len(sums)}", (z - a, K, D), G_NKD)
            into = sums[branch.pre]
            whole = isinstance(branch.part, AttentionRule | ByAutograd)
            inner = [(0, z - a)] if whole else stretches(range(1, z - a + 1), K, branch.part.width, G_NKD.device)
            for b, y in inner:
                below = pull(G_NKD[a + b : a + y], a + b, a + y)
                into[b:y].copy_(below) if new else into[b:y].add_(below)
        g = G_NKD[a:z]
        for norm, below in sums.items():
            if norm is None:
                g += below
            else:
                norms[norm].at(a, z).add_pull(g, below, scratch)


Rules = dict[nn.Module, BlockRule]


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


def kept_room(kind: str) -> int:
    """How many bytes of forward results may be kept for the pullback on a device of this type."""
    if kind == "cuda":
        return int(KEPT_SHARE_OF_GPU * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
    return KEPT_BYTES.get(kind, 0)


@contextmanager
def keeping(rules: Rules, calls: list[BlockCall], most: int, live: Tensor | None) -> Iterator[None]:
    """Within the context results of the blocks with a rule are kept in `calls` while there is room.

    `calls` is the list of a recording, which has an entry for a call before the block runs. Results are kept for the
    first `most` calls only, since the last block is pulled back in another way, and at the `live` rows; None: all.
    """
    room = {kind: kept_room(kind) for kind in (*KEPT_BYTES, "cuda")}

    def begin(block: nn.Module) -> Seen | None:
        wanted = room and packed_now() is not None and calls and calls[-1].block is block and len(calls) <= most
        return Seen() if wanted else None

    def end(_block: nn.Module, seen: Seen) -> None:
        call = calls[-1]
        narrow = seen.at(live, call.hidden.shape[1])
        device, size = call.hidden.device.type, narrow.bytes()
        if len(calls) == 1 and size * most > WORTH_KEEPING * room.get(device, 0):
            room.clear()
        if size <= room.get(device, 0) and seen.unchanged():
            room[device] -= size
            call.kept.append(narrow)

    with seeing({block: rule.watched() for block, rule in rules.items()}, begin, end):
        yield


def seen_again(rule: BlockRule, call: BlockCall, run: Callable[[], Tensor]) -> tuple[Tensor, Seen | None]:
    """What `run`, the block at its live rows once more, returns, and what was seen of it; None if that is of no use."""
    seen = Seen()
    with without_forwards(call.block), seeing({call.block: rule.watched()}, lambda _: seen, lambda _block, _seen: None):
        primal = run()
    return primal, seen.at(None, primal.shape[1]) if seen.unchanged() else None


@contextmanager
def without_forwards(block: nn.Module) -> Iterator[None]:
    """Within the context the modules of a block run their own forwards."""
    replaced = [(m, vars(m).pop("forward")) for m in list(block.modules()) if "forward" in vars(m)]
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward
