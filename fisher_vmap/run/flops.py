"""The floating-point operations that a job cannot avoid: its matrix products, by their shapes, for real tokens only.

* one forward pass through every block; but of the last block, only keys and values are needed at every position, all
  else at the last position of each prompt;
* a pullback of each vector through each block above the hook, one product for each linear layer; of the last block,
  again, only keys and values at every position; a push is as much as a pull;
* attention's products at their causal size, half of T x T: two forward, four for each vector;
* the products with the unembedding: one forward, and one that serves all cotangents of estimator topk.

Recomputation is not counted, nor is anything that is not a matrix product. Of a mixture of experts, those that see a
token are counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

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
    """One product of the job: what it is for, its shape, and the weight as right-hand side (None: activations)."""

    kind: str
    shape: Shape
    weight: Tensor | None


class Work(NamedTuple):
    """How many vectors go through the blocks above the lowest hook for each prompt."""

    shared: int
    """Pulled down once, for all hooked layers: K of estimator topk."""
    of_each_layer: int = 0
    """Pushed up to the top or pulled down from there for each hooked layer by itself, as estimator full does."""
    head: int = 1
    """Products with the unembedding beside the forward one."""


def unavoidable(
    model: Any, blocks: Sequence[nn.Module], lengths: Sequence[int], hooks: Sequence[int], work: Work
) -> list[Product]:
    """The products of the job, in its order.

    Args:
        model: a causal LM, with or without its weights (on the meta device).
        blocks: its decoder blocks.
        lengths: the number of real tokens of each prompt.
        hooks: the numbers of the hooked blocks; -1: below all of them.
        work: the vectors.
    """
    config = model.config.get_text_config()
    B, M, top = len(lengths), sum(lengths), len(blocks) - 1
    products: list[Product] = []

    def through(number: int, vectors: int, kind: str) -> None:
        block, many = blocks[number], max(vectors, 1)
        for name, weight, share in _matrices(block, config):
            everywhere = number < top or name.endswith(_everywhere(block))
            rows = many * (max(1, int(M * share)) if everywhere else B)
            out, inner = weight.shape[-2:]
            experts = int(weight.numel() // (out * inner))
            usable = weight if experts == 1 else None
            if vectors:
                shape = Shape(1, rows * experts if usable is None else rows, out, inner)
                products.append(Product(f"{kind}, linear layers", shape, usable))
            else:
                shape = Shape(1, rows * experts if usable is None else rows, inner, out)
                products.append(Product(f"{kind}, linear layers", shape, None if usable is None else usable.T))
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            return  # no attention: what takes its place is not made of large products
        groups = getattr(config, "num_key_value_heads", None) or heads
        attention = _last_query if number == top else _causal
        for T in lengths:
            shapes = attention(T, heads, groups, _head_width(block, config), vectors)
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


def _matrices(block: nn.Module, config: Any) -> list[tuple[str, Tensor, float]]:
    """Each weight matrix as [out, in] with its name, and the share of the tokens that it sees."""
    modules = dict(block.named_modules())
    found = []
    for name, weight in block.named_parameters():
        owner, _, _ = name.rpartition(".")
        module = modules.get(owner)
        if weight.dim() == 2 and not isinstance(module, nn.Embedding):
            # transformers' Conv1D, GPT-2's linear layer, has its weight the other way round.
            turned = weight.T if type(module).__name__ == "Conv1D" else weight
            one_of_many = ".experts." in f".{name}"
            found.append((owner, turned, _seen_by_an_expert(config) if one_of_many else 1.0))
        elif weight.dim() == 3 and not isinstance(module, nn.Conv1d):
            found.append((owner, weight, _seen_by_an_expert(config)))
    return found


def _seen_by_an_expert(config: Any) -> float:
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or 1
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((value for name in names if (value := getattr(config, name, None))), chosen)
    return min(1.0, float(chosen) / float(experts))


def _everywhere(block: nn.Module) -> tuple[str, ...]:
    """The ends of the names of the last block's layers that work on all positions; where they are not known, all do."""
    names = [name for name, _ in block.named_modules()]
    known = tuple(end for end in (*ATTENTION_INPUTS, *FUSED_INPUTS) if any(name.endswith(end) for name in names))
    return known or ("",)


def _head_width(block: nn.Module, config: Any) -> int:
    heads = config.num_attention_heads
    for name, module in block.named_modules():
        if name.endswith("q_proj") and isinstance(module, nn.Linear):
            return int(module.out_features // heads)
    return int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _causal(T: int, heads: int, groups: int, E: int, K: int) -> list[Shape]:
    """Attention over T tokens, forward for K = 0; query heads that share keys, and vectors, folded into the rows.

    Half of T stands for the causal half of T x T.
    """
    shared, half = heads // groups, (T + 1) // 2
    if K == 0:
        return [Shape(groups, shared * half, E, T), Shape(groups, shared * half, T, E)]  # Q K^T, P V
    return [
        Shape(groups, K * shared * half, E, T),  # dP = dO V^T
        Shape(groups, K * shared * half, T, E),  # dQ = dS K
        Shape(heads, T, half, K * E),  # dV = P^T dO
        Shape(heads, K * T, half, E),  # dK = dS^T Q
    ]


def _last_query(T: int, heads: int, groups: int, E: int, K: int) -> list[Shape]:
    """The same for the last position's query alone, which sees all T tokens."""
    shared = heads // groups
    if K == 0:
        return [Shape(groups, shared, E, T), Shape(groups, shared, T, E)]
    return [
        Shape(groups, K * shared, E, T),
        Shape(groups, K * shared, T, E),
        Shape(heads, T, 1, K * E),
        Shape(heads, K * T, 1, E),
    ]
