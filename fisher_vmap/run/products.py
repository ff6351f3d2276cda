"""The operations of a run: the matrix products that it cannot avoid, for real tokens only.

* one forward pass through every block; of the last block, only keys and values at every position, and the rest at the
  last position of each prompt;
* one pullback of each vector through each block above the hook, one product per linear layer; the last block as above.
  A push costs as much as a pullback;
* attention's products at their causal size, half of T x T, or less under a sliding window: two in the forward pass,
  four for each vector;
* the products with the unembedding: one in the forward pass, and one that serves all cotangents of estimator topk.

Recomputation and everything that is not a matrix product are left out. Of a mixture of experts, a token counts only for
the experts that it is routed to, and the tokens are spread evenly over the experts. Where one layer computes queries,
keys and values, the last block's queries count at the last positions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fisher_vmap.estimators import TRACE_SAMPLES

if TYPE_CHECKING:
    from fisher_vmap.run.settings import Settings

ATTENTION_INPUTS = ("k_proj", "v_proj")  # what the last block needs at every position
FUSED_INPUTS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")  # the same in one with the queries


class Shape(NamedTuple):
    """`batch` products [rows, inner] x [inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns


class Product(NamedTuple):
    """One product: what it is for, its shape, and the weight on its right-hand side (None: activations)."""

    kind: str
    shape: Shape
    weight: Tensor | None


class Work(NamedTuple):
    """How many vectors go through the blocks above the lowest hook for each prompt."""

    shared: int
    """Pulled back once for all hooked layers: K of estimator topk."""
    of_each_layer: int = 0
    """Pushed or pulled for each hooked layer separately, as estimator full does."""
    head: int = 1
    """Products with the unembedding besides the forward one."""


def work_of(settings: Settings) -> Work:
    """How many vectors the estimator sends through the network for each prompt."""
    if settings.estimator == "topk":
        samples = 0 if settings.trace_samples == "auto" else settings.trace_samples
        return Work(shared=settings.top_k_tokens + samples)
    samples = TRACE_SAMPLES if settings.trace_samples == "auto" else settings.trace_samples
    return work_of_full(settings.num_singular_values + settings.oversampling, settings.passes, samples)


def work_of_full(vectors: int, passes: int, samples: int) -> Work:
    """The same of estimator full with this many vectors, rounds of push and pull, and trace samples."""
    return Work(vectors + samples, 2 * passes * vectors, 1 + 2 * passes * vectors)


def unavoidable(
    model: Any, blocks: Sequence[nn.Module], lengths: Sequence[int], hooks: Sequence[int], work: Work
) -> list[Product]:
    """The products of a run, in order.

    Args:
        model: a causal LM, with or without its weights (on the meta device).
        blocks: its decoder blocks.
        lengths: the number of real tokens of each prompt.
        hooks: the numbers of the hooked blocks; -1: below all of them.
        work: the vectors.
    """
    config = model.config.get_text_config()
    B, M, top = len(lengths), sum(lengths), len(blocks) - 1
    heads = getattr(config, "num_attention_heads", None)
    products: list[Product] = []

    def through(number: int, vectors: int, kind: str) -> None:
        block, many = blocks[number], max(vectors, 1)
        for matrix in _matrices(block, config):
            for part, everywhere in _parts(block, matrix, config) if number == top else [(matrix, True)]:
                for (experts, rows), weight in part.spread(many * (M if everywhere else B)):
                    out, inner = weight.shape[-2:]
                    shape = Shape(experts, rows, *((out, inner) if vectors else (inner, out)))
                    usable = (weight if vectors else weight.T) if weight.dim() == 2 else None
                    products.append(Product(f"{kind}, linear layers", shape, usable))
        if not isinstance(heads, int):
            return  # no attention: what replaces it has no large products
        groups = getattr(config, "num_key_value_heads", None) or heads
        for T in lengths:
            size = Attended(T, _window(config, number), last_query=number == top)
            shapes = _attention(size, heads, groups, _head_width(block, config), vectors)
            products.extend(Product(f"{kind}, attention", shape, None) for shape in shapes)

    for number in range(len(blocks)):
        through(number, 0, "forward")
    unembedding = model.get_output_embeddings().weight
    V, D = unembedding.shape
    products.append(Product("head", Shape(1, B, D, V), unembedding.T))
    products += [Product("head", Shape(1, B, V, D), unembedding)] * work.head
    for number in range(top, min(hooks), -1):
        through(number, work.shared, "pullback")
    for hook in hooks if work.of_each_layer else ():
        for number in range(top, hook, -1):
            through(number, work.of_each_layer, "of each layer")
    return products


class Matrix(NamedTuple):
    """A weight matrix [out, in] or a stack of experts' [E, out, in], the layer's name, and who uses it.

    Attributes:
        name: of the layer.
        weight: the matrix.
        routed: the expert's number, how many a token is routed to, and how many there are; None: it is no expert's.
    """

    name: str
    weight: Tensor
    routed: tuple[int, int, int] | None = None

    def spread(self, rows: int) -> list[tuple[tuple[int, int], Tensor]]:
        """How many experts take how many of these rows each, and the weight; an expert without rows is left out."""
        if self.routed is None:
            return [((1, rows), self.weight)]
        number, chosen, experts = self.routed
        few, more = divmod(rows * chosen, experts)
        # The first experts take what is left over; a matrix is one expert's, a stack all of theirs.
        of_all = [(more, few + 1), (experts - more, few)]
        sizes = [(1, few + (number < more))] if self.weight.dim() == 2 else of_all
        return [(size, self.weight) for size in sizes if all(size)]


def _matrices(block: nn.Module, config: Any) -> list[Matrix]:
    """Every weight matrix of a block."""
    modules = dict(block.named_modules())
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    found = []
    for name, weight in block.named_parameters():
        owner, _, _ = name.rpartition(".")
        module = modules.get(owner)
        if weight.dim() == 2 and not isinstance(module, nn.Embedding):
            # transformers' Conv1D, GPT-2's linear layer, stores its weight transposed.
            matrix = weight.T if type(module).__name__ == "Conv1D" else weight
            found.append(Matrix(owner, matrix, _expert(owner, modules, chosen)))
        elif weight.dim() == 3 and not isinstance(module, nn.Conv1d):
            found.append(Matrix(owner, weight, (0, min(chosen, len(weight)), len(weight))))
    return found


def _expert(owner: str, modules: dict[str, nn.Module], chosen: int) -> tuple[int, int, int] | None:
    """`Matrix.routed` of a layer in a list of experts; None: it is in none."""
    before, found, after = owner.rpartition("experts.")
    number = after.partition(".")[0]
    experts = modules.get(f"{before}experts")
    if not found or not number.isdecimal() or not isinstance(experts, nn.ModuleList) or before[-1:] not in ("", "."):
        return None
    return int(number), min(chosen, len(experts)), len(experts)


def _parts(block: nn.Module, matrix: Matrix, config: Any) -> list[tuple[Matrix, bool]]:
    """A matrix of the last block in parts, each with whether all positions need it: keys and values do.

    A layer that computes queries, keys and values is cut in two. Where its rows are in another order, by heads, the
    parts are other rows of the weight, as many of them.
    """
    if matrix.name.endswith(FUSED_INPUTS) and isinstance(heads := getattr(config, "num_attention_heads", None), int):
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = _head_width(block, config)
        if matrix.weight.dim() == 2 and len(matrix.weight) == (heads + 2 * groups) * width:
            queries, others = matrix.weight[: heads * width], matrix.weight[heads * width :]
            return [(matrix._replace(weight=queries), False), (matrix._replace(weight=others), True)]
    return [(matrix, matrix.name.endswith(_everywhere(block)))]


def _everywhere(block: nn.Module) -> tuple[str, ...]:
    """Name endings of the last block's layers that run on all positions; ("",), which is all, if none is known."""
    names = [name for name, _ in block.named_modules()]
    known = tuple(end for end in (*ATTENTION_INPUTS, *FUSED_INPUTS) if any(name.endswith(end) for name in names))
    return known or ("",)


def _head_width(block: nn.Module, config: Any) -> int:
    heads = config.num_attention_heads
    for name, module in block.named_modules():
        if name.endswith("q_proj") and isinstance(module, nn.Linear):
            return int(module.out_features // heads)
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


class Attended(NamedTuple):
    """How many queries of a prompt of T tokens see how many keys: all of them as queries x keys, one rectangle.

    A query sees itself and what is before it, at most `window` tokens.
    """

    tokens: int
    window: int | None
    last_query: bool

    @property
    def keys(self) -> int:
        """The most keys that a query sees."""
        return min(self.tokens, self.window or self.tokens)

    @property
    def queries(self) -> int:
        """As many as see the keys' number each: the last one alone, or of T without a window the causal half."""
        unseen = self.keys * (self.keys - 1) // 2  # by the first queries, which have fewer tokens before them
        return 1 if self.last_query else (self.tokens * self.keys - unseen) // self.keys


def _window(config: Any, number: int) -> int | None:
    """The sliding window of a block; None: it sees everything before."""
    types = getattr(config, "layer_types", None)
    slides = types is None or number >= len(types) or types[number] == "sliding_attention"
    window = getattr(config, "sliding_window", None)
    return window if slides and isinstance(window, int) and window > 0 else None


def _attention(size: Attended, heads: int, groups: int, E: int, K: int) -> list[Shape]:
    """Attention's products: the forward pass for K = 0, else the pullback of K vectors.

    Query heads that share keys, and vectors, are folded into the rows.
    """
    shared, Q, S = heads // groups, size.queries, size.keys
    if K == 0:
        return [Shape(groups, shared * Q, E, S), Shape(groups, shared * Q, S, E)]  # Q K^T, P V
    return [
        Shape(groups, K * shared * Q, E, S),  # dP = dO V^T
        Shape(groups, K * shared * Q, S, E),  # dQ = dS K
        Shape(heads, S, Q, K * E),  # dV = P^T dO
        Shape(heads, K * S, Q, E),  # dK = dS^T Q
    ]
