"""`AttentionRule`: the pullback of a whole attention module on packed prompts, put together from what its call shows.

    q, k, v = rotate(norm(x W^T + b))        y = attention(q, k, v) W_o^T + b_o

with separate or joined projections, with or without biases, norms of queries and keys (of each head, or of all heads
together), and a rotary embedding of all, some or none of a head's width, in halves or in neighbouring pairs. Everything
is found by values: which linear layer's output becomes the queries, and by which of these ways. Softmax, soft-cap,
sinks and windows are those of the call (`AttentionKind`).

With cotangents as [N, K, D], positions first, the projections are plain matrix products and each prompt is a
contiguous range of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.attention import attention_forward, pullback_attention
from fisher_vmap.kernels.autograd import Scratch
from fisher_vmap.kernels.hf_attention import AttentionCall, Packed
from fisher_vmap.kernels.modules import NormRows, NormRule
from fisher_vmap.kernels.parts import Part, Pull, Seen, Watched
from fisher_vmap.kernels.quantized import weight_matrix
from fisher_vmap.model.groups import Group
from fisher_vmap.model.recording import output_of


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
            return x.unflatten(-1, (self.heads, self.joined, width))[..., self.start, :]
        return x[..., self.start : self.start + self.heads * width].unflatten(-1, (self.heads, width))

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
        rows_of_norms = [p.norm_rows(seen, self.head) for p in (self.q, self.k)]
        groups = packed.groups_on(call.q.device)
        together = any(group.single is None for group in groups)
        H, E = call.q.shape[1], self.head

        def pull(g_nKD: Tensor, a: int, z: int) -> Tensor:
            n, K, D = g_nKD.shape
            inside = [group for group in groups if together or a <= group.first < z]
            first = 0 if together else a
            dO = torch.mm(g_nKD.reshape(n * K, D), w_o, out=scratch("dO", (n * K, w_o.shape[1]), g_nKD))
            dO = dO.view(n, K, H, -1)
            d_in = scratch("d_in", (n, K, len(w_in)), g_nKD)
            dq, dk, dv = (p.of(self._slice(d_in, p.linear), E) for p in (self.q, self.k, self.v))
            for group in inside:
                if group.single is None:
                    self._pull_group(group, dO, call, turn, (dq, dk, dv))
                else:
                    self._pull_single(group, first, dO, call, turn, (dq, dk, dv), scratch)
            for columns, d, norm in zip((self.q, self.k), (dq, dk), rows_of_norms, strict=False):
                if norm is not None:
                    columns.pull_norm(d, norm.at(a, z), scratch)
            d_rows = d_in.view(n * K, -1)
            return torch.mm(d_rows, w_in, out=scratch("dn", (n * K, w_in.shape[1]), g_nKD)).view(n, K, -1)

        return pull

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

    def _back(self, g: Tensor, turn: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
        if turn is None:
            out.copy_(g)
        else:
            assert self.rotary is not None
            self.rotary.pull(g, *turn, out)

    def _pull_single(
        self,
        group: Group,
        first: int,
        dO: Tensor,
        call: AttentionCall,
        turn: tuple[Tensor, Tensor] | None,
        out: tuple[Tensor, Tensor, Tensor],
        scratch: Scratch,
    ) -> None:
        """The pullback of one prompt's attention, from dO [n, K, H, E] to queries, keys and values [n, K, ., E]."""
        assert group.single is not None
        a, z = group.single
        here = slice(a - first, z - first)
        _, K, H, E = dO.shape
        cotangents = scratch("dO of a prompt", (H, z - a, K, E), dO).copy_(dO[here].permute(2, 0, 1, 3))
        heads = call.q[:, :, a:z], group.keys.take(call.k), group.keys.take(call.v)
        dq, dk, dv = pullback_attention(cotangents[None], *heads, None, call.kind.alone(group.first_live), call.sinks)
        here_turn = None if turn is None else (turn[0][a:z, None], turn[1][a:z, None])
        to_q, to_k, to_v = (d[here].permute(2, 0, 1, 3) for d in out)
        self._back(dq[0], here_turn, to_q)
        self._back(dk[0], here_turn, to_k)
        to_v.copy_(dv[0])

    def _pull_group(
        self,
        group: Group,
        dO: Tensor,
        call: AttentionCall,
        turn: tuple[Tensor, Tensor] | None,
        out: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """The same for a group of prompts."""
        queries, kind = group.queries, call.kind.alone(group.first_live)
        heads = queries.take(call.q), group.keys.take(call.k), group.keys.take(call.v)
        cotangents = (queries.take_rows(dO) * queries.real[:, :, None, None, None]).permute(0, 3, 1, 2, 4)
        pulled = pullback_attention(cotangents, *heads, group.seen(kind.window), kind, call.sinks)
        for rows, d, to, turned in zip(
            (queries, group.live, group.live), pulled, out, (True, True, False), strict=True
        ):
            at = tuple(rows.take_rows(t)[:, None, :, None] for t in turn) if turned and turn is not None else None
            back = torch.empty_like(d)
            self._back(d, at, back)  # type: ignore[arg-type]
            rows.put_rows(to, back.permute(0, 2, 3, 1, 4))


def rotary_of(seen: Seen, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Cos and sin, [1, N, R] each, as the attention module received them."""
    cos, sin = seen.calls[module][1]["position_embeddings"]
    return cos, sin


def _joined(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))


class Facts(NamedTuple):
    """What is known of a block's modules before it is watched: plain linear layers, norms, MLPs and mixtures."""

    linears: frozenset[nn.Module]
    norms: Mapping[nn.Module, NormRule]
    parts: Mapping[nn.Module, Part]


def find_attention(module: nn.Module, seen: Seen, facts: Facts, packed: Packed) -> AttentionRule | str:
    """The rule of an attention module from one call of it in which all its modules were seen; or why it has none."""
    call, inner = seen.attention.get(module), set(module.modules()) - {module}
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
    search = _Search(module, seen, ins, [facts.norms[m] for m in inner if m in facts.norms and m in seen.outputs], E)
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
    """

    module: nn.Module
    seen: Seen
    linears: Sequence[nn.Module]
    norms: Sequence[NormRule]
    width: int

    def columns(self, found: Tensor, plain: bool) -> tuple[Columns, Rotary | None] | None:
        """The columns and the rotation that give `found`, [1, heads, N, E]; `plain`: without norm and rotation."""
        heads, target = found.shape[1], found[0].transpose(0, 1)
        for linear in self.linears:
            x = self.seen.outputs[linear].flatten(0, -2)
            for columns in _places(linear, heads, x.shape[-1], self.width):
                raw = columns.of(x, self.width)
                for normed, value in [(columns, raw)] if plain else self._normed(columns, raw):
                    for rotary in [None] if plain else self._rotaries():
                        if same(self._rotated(value, rotary), target):
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
        known = isinstance(rotary, tuple | list) and len(rotary) == 2 and all(isinstance(t, Tensor) for t in rotary)
        if known and rotary[0].dim() == 3:
            for way in (Rotary(*way) for way in WAYS):
                columns = way.factors(*rotary)[0].shape[-1]
                if columns <= self.width and columns % 2 == 0:
                    yield way

    def _rotated(self, value: Tensor, rotary: Rotary | None) -> Tensor:
        if rotary is None:
            return value
        cos, sin = rotary.factors(*(t[0] for t in rotary_of(self.seen, self.module)))
        return rotary.apply(value, cos[:, None], sin[:, None])


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
