"""A model without its weights: its layers, the operations of a run, and the memory of a batch, from shapes alone.

The operations are the matrix products that a run cannot avoid, for real tokens only:

* one forward pass through every block; of the last one only keys and values at every position, the rest at the targets;
* one pullback of each vector through each block above the hook, one product per linear layer; the last block as above.
  A push costs as much as a pullback;
* attention's products at their causal size, half of T x T, or less under a sliding window: two in the forward pass,
  four for each vector;
* for each target the products with the unembedding: one in the forward pass, and one for all cotangents of topk.

Recomputation and all that is not a matrix product are left out. Of experts, a token counts for those that it is routed
to, spread evenly. Where one layer computes queries, keys and values, the last queries count at the targets alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from fisher_vmap.errors import UserError
from fisher_vmap.estimators import TRACE_SAMPLES
from fisher_vmap.linearize.blockwise import pull_memory, widths_of
from fisher_vmap.load.model import without_weights
from fisher_vmap.load.options import LoadOptions, saved_by_packing
from fisher_vmap.load.source import explained, quiet_progress
from fisher_vmap.model.layers import block_numbers
from fisher_vmap.model.recording import hooks, output_of

if TYPE_CHECKING:
    from fisher_vmap.run.settings import Settings

ATTENTION_INPUTS = ("k_proj", "v_proj")  # what the last block needs at every position
WIDTH_OF = ("out_features", "embedding_dim", "nf")  # of a linear layer, an embedding, GPT-2's linear layer
FUSED_INPUTS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj")  # the same in one with the queries


class Skeleton(NamedTuple):
    """A causal LM on the meta device.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        blocks: its decoder blocks by name.
        widths: D of each hooked layer.
        hooks: for each hooked layer, the number of the block that it is or is in; -1: below all blocks.
        quantized: whether its weights are stored packed, or packed when they are loaded.
        quantization: how they are then packed for the run, by bitsandbytes; None: they are not.
    """

    model: Any
    tokenizer: Any
    blocks: dict[str, nn.Module]
    widths: dict[str, int]
    hooks: list[int]
    quantized: bool
    quantization: str | None = None

    @property
    def weight_bytes(self) -> int:
        """What the weights take in the dtype of the run, or packed."""
        whole: int = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return whole - (saved_by_packing(self.model, self.quantization) if self.quantization else 0)


def skeleton_of(settings: Settings) -> Skeleton:
    """The model that the settings name, without its weights.

    Raises:
        UserError: the model is missing or gated, or has no such layer.
    """
    from fisher_vmap.run.open import loading_of  # pydantic

    path, config, tokenizer = without_weights(settings.model_path, how := LoadOptions(**loading_of(settings)))
    with quiet_progress():
        packed = getattr(config, "quantization_config", None) is not None
        if packed:
            del config.quantization_config
        with torch.device("meta"):
            load = transformers.AutoModelForCausalLM.from_config
            dtype, hint = getattr(torch, settings.dtype), how.to_check
            model = explained(
                path, "model", load, config, hint=hint, dtype=dtype, trust_remote_code=how.trust_remote_code
            )
        model = model.to("meta").eval()
    blocks = _blocks(path, model)
    names = _layers(model, blocks, settings.hook_layer_name)
    kept = None if settings.dequantize else settings.quantization
    packed = packed or settings.quantization is not None
    return Skeleton(model, tokenizer, blocks, _widths(model, names), block_numbers(blocks, names), packed, kept)


def _blocks(path: str, model: nn.Module) -> dict[str, nn.Module]:
    """The largest list of modules that is not inside another list.

    `model.layers` finds the blocks by watching a forward pass, which needs weights.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise UserError(f"{path}: no list of decoder blocks was found, and --plan cannot count; run without --plan")
    stack = max(outer, key=lambda name: sum(parameter.numel() for parameter in outer[name].parameters()))
    return {f"{stack}.{i}": block for i, block in enumerate(outer[stack])}


def _layers(model: nn.Module, blocks: dict[str, nn.Module], wanted: int | str | tuple[int | str, ...]) -> list[str]:
    """Names of modules, as `fisher_vmap.model.layers.resolve_layers` gives them for a model with weights."""
    if wanted == "all":
        return list(blocks)
    modules, names = dict(model.named_modules()), list(blocks)
    found = []
    for entry in wanted if isinstance(wanted, tuple) else [wanted]:
        if isinstance(entry, int) and -len(names) <= entry < len(names):
            entry = names[entry]
        if entry not in modules or entry == "":
            raise UserError(f"the model has no layer {entry!r}; its {len(names)} layers are {names[0]} to {names[-1]}")
        found.append(str(entry))
    return found


def _widths(model: Any, names: Sequence[str]) -> dict[str, int]:
    """D of each hooked module from its output's shape; from what it is if the model cannot run without weights."""
    modules = [model.get_submodule(name) for name in names]
    declared = [next(filter(None, (getattr(m, word, None) for word in WIDTH_OF)), None) for m in modules]
    hidden_size = int(model.config.get_text_config().hidden_size)
    widths = {name: int(D or hidden_size) for name, D in zip(names, declared, strict=True)}

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output_of(output)
            if hidden is not None and hidden.dim() == 3:
                widths[name] = int(hidden.shape[-1])

        return hook

    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    watched = hooks(*(module.register_forward_hook(look(name)) for name, module in zip(names, modules, strict=True)))
    # An error means that it reads numbers in its forward pass.
    with torch.no_grad(), watched, suppress(RuntimeError, NotImplementedError, ValueError, TypeError):
        model(input_ids=ids, use_cache=False)
    return widths


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
    """How many vectors go through the blocks above the lowest hook for each prompt, and from how many targets."""

    shared: int  # pulled back once for all hooked layers: K of estimator topk
    of_each_layer: int = 0  # pushed or pulled for each hooked layer separately, as estimator full does
    head: int = 1  # products with the unembedding besides the forward one
    targets: Sequence[int] | None = None  # of each prompt; None: one


def work_of(settings: Settings) -> Work:
    """How many vectors the estimator sends through the network for each prompt."""
    rank, samples = settings.num_singular_values, settings.trace_samples
    if settings.estimator == "sampled":
        return Work(settings.score_samples, rank, 1 + 2 * rank)
    if settings.estimator == "topk":
        return Work(settings.top_k_tokens + (0 if samples == "auto" else samples))
    return work_of_full(rank + settings.oversampling, settings.passes, TRACE_SAMPLES if samples == "auto" else samples)


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
    targets = work.targets or [1] * len(lengths)
    B, M, top = sum(targets), sum(lengths), len(blocks) - 1
    heads = getattr(config, "num_attention_heads", None)
    products: list[Product] = []

    def through(number: int, vectors: int, kind: str) -> None:
        block, many = blocks[number], max(vectors, 1)
        for matrix in _matrices(block, config):
            for part, everywhere in _parts(block, matrix, config) if number == top else [(matrix, True)]:
                weight = part.weight if vectors else part.weight.mT
                for experts, rows in part.spread(many * (M if everywhere else B)):
                    shape = Shape(experts, rows, *weight.shape[-2:])
                    usable = weight if weight.dim() == 2 else None
                    products.append(Product(f"{kind}, linear layers", shape, usable))
        if not isinstance(heads, int):
            return  # no attention: what replaces it has no large products
        groups = getattr(config, "num_key_value_heads", None) or heads
        for T, asked in zip(lengths, targets, strict=True):
            Q, S = attended(T, _window(config, number), last_query=number == top and asked == 1)
            Q = min(Q, asked) if number == top else Q
            shapes = _attention(Q, S, heads, groups, _head_width(block, config), vectors)
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

    def spread(self, rows: int) -> list[tuple[int, int]]:
        """How many experts take how many of these rows each; one without rows is left out."""
        if self.routed is None:
            return [(1, rows)]
        number, chosen, experts = self.routed
        few, more = divmod(rows * chosen, experts)
        # The first experts take what is left over; a matrix is one expert's, a stack all of theirs.
        of_all = [(more, few + 1), (experts - more, few)]
        sizes = [(1, few + (number < more))] if self.weight.dim() == 2 else of_all
        return [size for size in sizes if all(size)]


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
    found = re.match(r"((?:.*\.)?experts)\.(\d+)\b", owner)
    if found is None or not isinstance(experts := modules[found[1]], nn.ModuleList):
        return None
    return int(found[2]), min(chosen, len(experts)), len(experts)


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


def attended(T: int, window: int | None, *, last_query: bool) -> tuple[int, int]:
    """Queries and keys of the rectangle that holds as many pairs as a prompt of T tokens has.

    A query sees itself and what is before it, at most `window` tokens; the last block has the last query alone.
    """
    keys = min(T, window or T)
    unseen = keys * (keys - 1) // 2  # by the first queries, which have fewer tokens before them
    return (1 if last_query else (T * keys - unseen) // keys), keys


def _window(config: Any, number: int) -> int | None:
    """The sliding window of a block; None: it sees everything before."""
    types = getattr(config, "layer_types", None)
    slides = types is None or number >= len(types) or types[number] == "sliding_attention"
    window = getattr(config, "sliding_window", None)
    return window if slides and isinstance(window, int) and window > 0 else None


def _attention(Q: int, S: int, heads: int, groups: int, E: int, K: int) -> list[Shape]:
    """Attention's products of Q queries and S keys: the forward pass for K = 0, else the pullback of K vectors.

    Query heads that share keys, and vectors, are folded into the rows.
    """
    shared = heads // groups
    if K == 0:
        return [Shape(groups, shared * Q, E, S), Shape(groups, shared * Q, S, E)]  # Q K^T, P V
    return [
        Shape(groups, K * shared * Q, E, S),  # dP = dO V^T
        Shape(groups, K * shared * Q, S, E),  # dQ = dS K
        Shape(heads, S, Q, K * E),  # dV = P^T dO
        Shape(heads, K * S, Q, E),  # dK = dS^T Q
    ]


class BatchMemory(NamedTuple):
    """The bytes of a batch at its peak, by use: those of `pull_memory`."""

    prompts: int
    tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def batch_memory(
    skeleton: Skeleton,
    lengths: Sequence[int],
    cotangents: int,
    itemsize: int,
    device: torch.device,
    chunk_size: int | None = None,
    targets: int | None = None,
) -> BatchMemory:
    """The memory of a batch of prompts, besides the weights.

    Args:
        skeleton: of the model.
        lengths: tokens of each prompt.
        cotangents: K, the vectors that are pulled back together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on.
        chunk_size: as for `pull_memory`.
        targets: likewise.
    """
    config = skeleton.model.config.get_text_config()
    D, V = int(config.hidden_size), int(config.vocab_size)
    above = len(skeleton.blocks) - 1 - min(skeleton.hooks)
    widths = widths_of(skeleton.model, skeleton.blocks.values(), D, V, above, len(skeleton.widths))
    parts = pull_memory(widths, lengths, cotangents, itemsize, device, chunk_size, targets)
    return BatchMemory(len(lengths), sum(lengths), parts)
