"""`AttentionRule`: the pullback of a whole attention module on packed prompts, put together from what its call shows.

    q, k, v = rotate(norm(x W^T + b))        y = attention(q, k, v) W_o^T + b_o

with separate or joined projections, with or without biases, norms of queries and keys (of each head, or of all heads
together), and a rotary embedding of all, some or none of a head's width, in halves or in neighbouring pairs. Everything
is found by values: which linear layer's output becomes the queries, and by which of these ways. Softmax, soft-cap,
sinks and windows are those of the call (`AttentionKind`).

With cotangents as [N, K, D], positions first, the projections are plain matrix products and each prompt is a
contiguous range of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention import pullback_attention
from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.hf_attention import AttentionCall, Packed
from fisher_vmap.kernels.modules import NormRows, NormRule
from fisher_vmap.kernels.parts import Pull, Seen, Watched
from fisher_vmap.kernels.quantized import weight_matrix
from fisher_vmap.model.groups import Group


@dataclass(frozen=True)
class Rotary:
    """How a head is rotated: x cos + turn(x) sin, over its first columns.

    Attributes:
        pairs: whether `turn` swaps neighbours, (x0, x1) -> (-x1, x0); else halves.
        given: what cos and sin have: each column's ("each"), those of half the columns, of which the rest are a copy
            ("half"), or first one of each pair and then anything ("first half").
    """

    pairs: bool
    given: str

    def factors(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of each rotated column, [N, R] each."""
        if self.given == "each":
            return cos, sin
        if self.given == "half":
            return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        half = cos.shape[-1] // 2
        return cos[..., :half].repeat_interleave(2, -1), sin[..., :half].repeat_interleave(2, -1)

    def halves(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """The two halves of the rotated columns that are turned into one another, as views."""
        if self.pairs:
            return x[..., 0:width:2], x[..., 1:width:2]
        return x[..., : width // 2], x[..., width // 2 : width]

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotation of x [..., E]; cos and sin, as `factors` gives them, broadcast to [..., R]."""
        width, out = cos.shape[-1], x.clone()
        low, high = self.halves(x, width)
        (cos_low, cos_high), (sin_low, sin_high) = self.halves(cos, width), self.halves(sin, width)
        to_low, to_high = self.halves(out, width)
        to_low.copy_(low * cos_low - high * sin_low)
        to_high.copy_(high * cos_high + low * sin_high)
        return out

    def pull(self, g: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        """The transpose of `apply`, from g [..., E], written to out."""
        width = cos.shape[-1]
        torch.mul(g[..., :width], cos, out=out[..., :width])
        low, high = self.halves(g, width)
        sin_low, sin_high = self.halves(sin, width)
        to_low, to_high = self.halves(out, width)
        to_low.addcmul_(high, sin_high)
        to_high.addcmul_(low, sin_low, value=-1)
        if width < g.shape[-1]:
            out[..., width:].copy_(g[..., width:])


# The ways that are looked for.
WAYS = ((False, "each"), (True, "each"), (True, "first half"), (False, "half"))


@dataclass(frozen=True)
class Columns:
    """Where the heads of queries, keys or values are in a linear layer's output.

    Attributes:
        linear: the layer.
        start: the first column, or of `joined` heads the number of the slot.
        heads: how many heads.
        joined: how many slots the columns of each head have (3 for queries, keys and values side by side); 0: the
            heads are contiguous.
        norm: the norm of the heads; None: none.
        whole: whether the norm is of all heads together.
    """

    linear: nn.Module
    start: int
    heads: int
    joined: int = 0
    norm: NormRule | None = None
    whole: bool = False

    def of(self, x: Tensor, width: int) -> Tensor:
        """[..., heads, E]: these columns of x, [..., C], as a view."""
        if self.joined:
            return x.view(*x.shape[:-1], self.heads, self.joined, width)[..., self.start, :]
        return x[..., self.start : self.start + self.heads * width].view(*x.shape[:-1], self.heads, width)

    def norm_rows(self, seen: Seen, width: int) -> NormRows | None:
        """The factors of the norm's pullback at each position, [N, 1, heads, E] or [N, 1, heads E]."""
        if self.norm is None:
            return None
        x = self.of(seen.outputs[self.linear], width)
        return self.norm.rows(x.flatten(1) if self.whole else x)

    def pull_norm(self, g_NKHE: Tensor, rows: NormRows, scratch: Scratch) -> None:
        """Pull cotangents through the norm, in place."""
        g = g_NKHE.flatten(2) if self.whole else g_NKHE
        g_NKHE.copy_(rows.pull(g, scratch, "normed").view_as(g_NKHE))


@dataclass(frozen=True)
class AttentionRule:
    """The parts of an attention module.

    Attributes:
        module: the module.
        q: the columns of its queries.
        k: of its keys.
        v: of its values.
        o: the output projection.
        rotary: the rotation of queries and keys; None: none.
        head: E, the width of a head.
    """

    module: nn.Module
    q: Columns
    k: Columns
    v: Columns
    o: nn.Module
    rotary: Rotary | None
    head: int

    @property
    def linears(self) -> list[nn.Module]:
        """The linear layers of queries, keys and values, each once."""
        return list(dict.fromkeys((self.q.linear, self.k.linear, self.v.linear)))

    @property
    def width(self) -> int:
        """The width of queries, keys and values together."""
        return sum(len(weight_matrix(linear)) for linear in self.linears)

    def watched(self) -> Watched:
        """The call of our attention, the rotary embedding, and what is normed in queries and keys."""
        normed = tuple(p.linear for p in (self.q, self.k) if p.norm is not None)
        return Watched(outputs=normed, calls=(self.module,), attention=(self.module,))

    def pull_from(self, seen: Seen, scratch: Scratch, packed: Packed) -> Pull:
        """The pullback of the cotangents of some positions; the stretches must end where `ends` says."""
        call = seen.attention[self.module]
        w_in, w_o = _joined([weight_matrix(linear) for linear in self.linears]), weight_matrix(self.o)
        turn = self._turn(seen)
        norm_q, norm_k = (p.norm_rows(seen, self.head) for p in (self.q, self.k))
        groups = packed.groups_on(call.q.device)
        together = any(group.single is None for group in groups)

        def pull(g_nKD: Tensor, a: int, z: int) -> Tensor:
            n, K, _ = g_nKD.shape
            inside = [group for group in groups if together or a <= group.first < z]
            first = 0 if together else a
            d_in = scratch("d_in", (n, K, len(w_in)), g_nKD)
            dq, dk, dv = (p.of(self._slice(d_in, p.linear), self.head) for p in (self.q, self.k, self.v))
            self._pull_heads(inside, g_nKD, w_o, call, _Into(dq, dk, dv, turn, turn, first, first), scratch)
            for columns, d, norm in ((self.q, dq, norm_q), (self.k, dk, norm_k)):
                if norm is not None:
                    columns.pull_norm(d, norm.at(a, z), scratch)
            return _product(d_in, w_in, scratch, "dn")

        return pull

    def pull_to_live(
        self, g_MKD: Tensor, seen: Seen, live: Seen, at: Tensor | None, n: int, packed: Packed, scratch: Scratch
    ) -> Tensor:
        """The pullback where only some of the live rows have queries: [n, K, D] at the live rows.

        Args:
            g_MKD: the cotangents at the rows with queries.
            seen: what was seen at these; its keys and values are those of all rows.
            live: what was seen at the live rows, up to the attention.
            at: the places of the rows with queries among the live rows; None: they are the same.
            n: how many live rows there are.
            packed: the prompts, with these queries and live keys.
            scratch: memory.
        """
        call, E = seen.attention[self.module], self.head
        M, K, _ = g_MKD.shape
        turn, turn_live = self._turn(seen), self._turn(live)
        w_kv = torch.cat([p.of(weight_matrix(p.linear).T, E).flatten(1) for p in (self.k, self.v)], 1).T
        w_q = self.q.of(weight_matrix(self.q.linear).T, E).flatten(1).T
        d_q = scratch("d_q", (M, K, len(w_q)), g_MKD)
        d_kv = scratch("d_kv", (n, K, len(w_kv)), g_MKD)
        dq, (dk, dv) = d_q.unflatten(-1, (-1, E)), (
            part.unflatten(-1, (p.heads, E)) for p, part in zip((self.k, self.v), d_kv.chunk(2, -1), strict=True)
        )  # fmt: skip
        into = _Into(dq, dk, dv, turn, turn_live, 0, 0)
        self._pull_heads(packed.groups_on(g_MKD.device), g_MKD, weight_matrix(self.o), call, into, scratch)
        for columns, d, rows in ((self.q, dq, seen), (self.k, dk, live)):
            if (norm := columns.norm_rows(rows, E)) is not None:
                columns.pull_norm(d, norm, scratch)
        total = _product(d_kv, w_kv, scratch, "dn")
        below = _product(d_q, w_q, scratch, "dn of queries")
        return total.add_(below) if at is None else total.index_add_(0, at.to(total.device), below)

    def ends(self, packed: Packed, rows: int, device: torch.device) -> Sequence[int]:
        """Where a stretch of positions may end: after a prompt, or at the end where prompts attend in groups."""
        groups = packed.groups_on(device)
        return [rows] if any(group.single is None for group in groups) else [stop for _, stop in packed.ranges]

    def _slice(self, d_in: Tensor, linear: nn.Module) -> Tensor:
        """The columns of one of the linear layers."""
        start = 0
        for other in self.linears:
            stop = start + len(weight_matrix(other))
            if other is linear:
                return d_in[..., start:stop]
            start = stop
        raise AssertionError

    def _turn(self, seen: Seen) -> tuple[Tensor, Tensor] | None:
        """The cos and sin of each row, [N, R]."""
        return None if self.rotary is None else self.rotary.factors(*(t[0] for t in rotary_of(seen, self.module)))

    def _pull_heads(
        self, groups: Sequence[Group], g: Tensor, w_o: Tensor, call: AttentionCall, into: "_Into", scratch: Scratch
    ) -> None:
        """The pullback through output projection, attention and rotation, from g [n, K, D]."""
        n, K, _ = g.shape
        dO = _product(g, w_o, scratch, "dO").view(n, K, call.q.shape[1], -1)
        for group in groups:
            (self._pull_single if group.single is not None else self._pull_group)(group, dO, call, into, scratch)

    def _pull_single(self, group: Group, dO: Tensor, call: AttentionCall, into: "_Into", scratch: Scratch) -> None:
        """One prompt's attention, from dO [n, K, H, E]."""
        assert group.queries.single is not None and group.live.single is not None
        (a, z), (first, stop), (_, K, H, E) = group.queries.single, group.live.single, dO.shape
        here, alive = slice(a - into.first_q, z - into.first_q), slice(first - into.first_k, stop - into.first_k)
        cotangents = scratch("dO of a prompt", (H, z - a, K, E), dO).copy_(dO[here].permute(2, 0, 1, 3))
        heads = call.q[:, :, a:z], group.keys.take(call.k), group.keys.take(call.v)
        dq, dk, dv = pullback_attention(cotangents[None], *heads, None, call.kind.alone(group.first_live), call.sinks)
        self._back(dq[0], into.turn_q, slice(a, z), into.q[here].permute(2, 0, 1, 3))
        self._back(dk[0], into.turn_k, slice(first, stop), into.k[alive].permute(2, 0, 1, 3))
        into.v[alive].permute(2, 0, 1, 3).copy_(dv[0])

    def _back(self, g: Tensor, turn: tuple[Tensor, Tensor] | None, rows: slice, out: Tensor) -> None:
        """Undo the rotation of heads at some rows, [heads, n, K, E]."""
        if turn is None:
            out.copy_(g)
        else:
            assert self.rotary is not None
            self.rotary.pull(g, turn[0][rows, None], turn[1][rows, None], out)

    def _pull_group(self, group: Group, dO: Tensor, call: AttentionCall, into: "_Into", scratch: Scratch) -> None:
        """The same for a group of prompts."""
        queries, live, kind = group.queries, group.live, call.kind.alone(group.first_live)
        heads = queries.take(call.q), group.keys.take(call.k), group.keys.take(call.v)
        dO_btKHE = queries.take_rows(dO)
        if queries.even is None:
            dO_btKHE = dO_btKHE * queries.real[:, :, None, None, None]
        cotangents = dO_btKHE.permute(0, 3, 1, 2, 4)
        dq, dk, dv = pullback_attention(cotangents, *heads, group.seen(kind.window), kind, call.sinks)
        for d, rows, turn, to in ((dq, queries, into.turn_q, into.q), (dk, live, into.turn_k, into.k)):
            back = d
            if turn is not None:
                assert self.rotary is not None
                cos, sin = (rows.take_rows(t)[:, None, :, None] for t in turn)
                self.rotary.pull(d, cos, sin, back := torch.empty_like(d))
            rows.put_rows(to, back.permute(0, 2, 3, 1, 4))
        live.put_rows(into.v, dv.permute(0, 2, 3, 1, 4))


class _Into(NamedTuple):
    """Where the cotangents of queries, keys and values go, [n, K, heads, E] each.

    Attributes:
        q: those of the queries.
        k: those of the live keys.
        v: those of the live values.
        turn_q: cos and sin of all query rows, [N, R] each; None: no rotation.
        turn_k: of all live rows.
        first_q: the number of the first query row in `q`.
        first_k: of the first live row in `k` and `v`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    turn_q: tuple[Tensor, Tensor] | None
    turn_k: tuple[Tensor, Tensor] | None
    first_q: int
    first_k: int


def _product(x_NKC: Tensor, w: Tensor, scratch: Scratch, name: str) -> Tensor:
    """[N, K, D]: x times w, [C, D], in scratch memory."""
    N, K, _ = x_NKC.shape
    return torch.mm(x_NKC.reshape(N * K, -1), w, out=scratch(name, (N * K, w.shape[1]), x_NKC)).view(N, K, -1)


def rotary_of(seen: Seen, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Cos and sin, [1, N, R] each, as the attention module received them."""
    cos, sin = seen.calls[module][1]["position_embeddings"]
    return cos, sin


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))
