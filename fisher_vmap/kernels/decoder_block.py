"""`BlockRule`: the pullback of a whole decoder block, put together from the pullbacks of its parts.

    y = x + s post(f(pre(x)))                          one branch after another,
    z = x + s post(f(pre(x))) + s post'(f'(pre'(x)))   or several side by side,

with norms before a branch, after it, both or none, and s a factor of the block. The branches are attention, MLPs and
mixtures of experts with a pullback in this folder; another branch is pulled back by `vmap`, it alone. The cotangents
are one tensor, [N, K, D], each branch adds its part in place, and intermediate results pass through memory that stays
in cache.

The block's forward stays its own; results that the pullback needs are kept while there is room. Of the last block only
the targets are read: it is pulled back from these rows to the live ones.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention_rule import AttentionRule
from fisher_vmap.kernels.autograd import Scratch, stretches
from fisher_vmap.kernels.hf_attention import Packed, packed_now
from fisher_vmap.kernels.mlp import Mlp, fused_mlp, matrices_pay
from fisher_vmap.kernels.modules import NormRows, NormRule, fused_norm, norm_kind
from fisher_vmap.kernels.parts import ByAutograd, Part, Pull, Seen, Watched, seeing
from fisher_vmap.model.recording import BlockCall

Forward = Callable[..., Any]

# How many bytes of forward results are kept for the pullback of MANY cotangents; blocks for which there is no room run
# again. Fewer cotangents take less memory themselves and running a block again costs as much as pulling back one, so
# that more is kept for them.
KEPT_BYTES = {"cpu": 3 * 2**25}
MANY = 10
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

    def takes_all(self, cotangents: int) -> bool:
        """Whether K cotangents are to be pulled back together."""
        return isinstance(self.part, Mlp) and matrices_pay(self.part.weights(), cotangents)

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

        `chunk_size` is how many cotangents to take at a time; None: all at once. Steps whose work grows with the number
        of pieces take all at once in any case.
        """
        K = G_NKD.shape[1]
        for number, step in reversed(list(enumerate(self.steps))):
            at_once = K if any(branch.takes_all(K) for branch in step) else min(K, chunk_size or K)
            for start in range(0, K, at_once):
                whole = at_once == K
                piece = G_NKD if whole else G_NKD[:, start : start + at_once].contiguous()
                self._pull_step(step, x if number == 0 else None, seen, piece, packed, scratch)
                if not whole:
                    G_NKD[:, start : start + at_once] = piece

    @property
    def reads_once(self) -> bool:
        """Whether positions interact in an attention of the first step alone, which has a rule."""
        first, *others = self.steps
        mixing = [b for b in first if isinstance(b.part, AttentionRule)]
        later = any(isinstance(b.part, AttentionRule) for step in others for b in step)
        return len(mixing) == 1 and not later and not self.mixes_by_autograd

    def pull_to_live(
        self, x: Tensor, at: Tensor | None, seen: tuple[Seen, Seen], g_MKD: Tensor, total: Tensor, packed: Packed,
        scratch: Scratch,
    ) -> None:  # fmt: skip
        """From cotangents of the block's output at fewer rows than the live ones to those of its input at these.

        Args:
            x: [n, D], the live rows of the block's input.
            at: [M] int64, the places of the fewer rows among these; None: they are the same.
            seen: what was seen at the fewer rows, and up to the attention at the live rows.
            g_MKD: the cotangents at the fewer rows, overwritten.
            total: [n, K, D], zeros; the result goes there.
            packed: the prompts, with queries at the fewer rows.
            scratch: memory.
        """
        few, live = seen
        for step in reversed(self.steps[1:]):
            self._pull_step(step, None, few, g_MKD, packed, scratch)
        place = torch.arange(len(x), device=x.device) if at is None else at.to(x.device)
        total[place] = g_MKD
        for branch in self.steps[0]:
            if isinstance(branch.part, AttentionRule):
                post = branch.post
                g = g_MKD if post is None else post.rows(few.inputs[post.module]).pull(g_MKD, scratch, "step")
                below, rows = branch.part.pull_to_live(g, few, live, at, len(x), packed, scratch), x
                below = below if branch.scale == 1 else below.mul_(branch.scale)
                into = total
            else:
                rows, into = x[place], torch.zeros_like(g_MKD)
                below = branch.pull_from(few, packed, scratch)(g_MKD, 0, len(g_MKD))
            if branch.pre is None:
                into += below
            else:
                branch.pre.rows(rows).add_pull(into, below, scratch)
            if into is not total:
                total.index_add_(0, place, into)

    def _pull_step(
        self, step: Sequence[Branch], x: Tensor | None, seen: Seen, G_NKD: Tensor, packed: Packed, scratch: Scratch
    ) -> None:
        """The same for one step; x is its input if that is the block's."""
        norms = {b.pre: seen.inputs[b.pre.module] if x is None else x for b in step if b.pre is not None}
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


def kept_room(kind: str, vectors: int | None) -> int:
    """How many bytes of forward results may be kept for the pullback of so many vectors on a device of this type."""
    if kind == "cuda":
        return int(KEPT_SHARE_OF_GPU * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0
    return KEPT_BYTES.get(kind, 0) * max(1, MANY // (vectors or MANY))


@contextmanager
def keeping(
    rules: Rules, calls: list[BlockCall], most: int, live: Tensor | None, vectors: int | None
) -> Iterator[None]:
    """Within the context results of the blocks with a rule are kept in `calls` while there is room.

    `calls` is the list of a recording, which has an entry for a call before the block runs. Results are kept for the
    first `most` calls only, since the last block is pulled back in another way, and at the `live` rows; None: all.
    `vectors` is how many will be pulled back.
    """
    room = {kind: kept_room(kind, vectors) for kind in (*KEPT_BYTES, "cuda")}

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


def seen_again(rule: BlockRule, call: BlockCall, run: Callable[[], Tensor]) -> tuple[Tensor, list[Seen] | None]:
    """What `run`, the block at some rows once more, returns, and what was seen in each call of it.

    The second is None if that is of no use.
    """
    found: list[Seen] = []

    def begin(_block: nn.Module) -> Seen:
        found.append(Seen())
        return found[-1]

    with without_forwards(call.block), seeing({call.block: rule.watched()}, begin, lambda _block, _seen: None):
        primal = run()
    return primal, found if all(seen.unchanged() for seen in found) else None


@contextmanager
def without_forwards(block: nn.Module) -> Iterator[None]:
    """Within the context the modules of a block run their own forwards."""
    replaced = [(m, vars(m).pop("forward")) for m in list(block.modules()) if "forward" in vars(m)]
    try:
        yield
    finally:
        for module, forward in replaced:
            module.forward = forward
