"""Which prompts are computed together, and the results of a batch as each prompt's arrays on the CPU."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fisher_vmap.data.conversations import Message, SkippedPrompt, answer_after
from fisher_vmap.data.render import Renderer, TokenizedPrompt
from fisher_vmap.data.sequences import TargetNumbers, Tokens, tokens_of
from fisher_vmap.decomposition import LowRank, compress_layers, quality
from fisher_vmap.estimators import Estimate, mean_over_samples
from fisher_vmap.linearize.blockwise import Widths, pull_memory, widths_of
from fisher_vmap.model.layers import block_numbers, decoder_blocks, layers_of
from fisher_vmap.model.offload import model_dtype
from fisher_vmap.model.targets import NO_TOKEN
from fisher_vmap.results.record import LayerResult

log = logging.getLogger(__name__)

# On a CPU larger batches gain nothing and no longer fit into its caches; on a GPU memory is the limit.
CPU_BATCH_TOKENS = 1024
GPU_MEMORY_SHARE = 0.6  # the rest is for what the allocator holds without use, and for an audit's plain autograd
NO_LOG_PROB = -100.0  # nats, of an outcome that pads: its share of every direction is zero
# Numbers of the targets' distributions, [M, V], that are computed at a time; the peak is five such tables.
TARGET_NUMBERS = {"cpu": 2**27, "cuda": 2**29}
SHORT_PROMPT = 32  # tokens; with shorter prompts a batch takes more memory for its logits, and is halved if need be


def pack(lengths: Sequence[int], batch_size: int, max_batch_tokens: int) -> list[list[int]]:
    """Indices of prompts in batches, longest first; the same for the same lengths, so that runs can be repeated.

    Args:
        lengths: the number of tokens of each prompt.
        batch_size: most prompts in a batch.
        max_batch_tokens: most tokens in a batch, with padding; a longer prompt is a batch by itself.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else []
        longest = lengths[current[0]] if current else 0
        if current and len(current) < batch_size and (len(current) + 1) * longest <= max_batch_tokens:
            current.append(index)
        else:
            batches.append([index])
    return batches


def rows_apart(targets: Sequence[int], vocabulary: int, device: torch.device) -> list[list[int]]:
    """The sequences of a batch, in their order, in groups whose distributions are computed together.

    `targets` is the number of each. A sequence of more targets than `TARGET_NUMBERS` allows is a group by itself.
    """
    most = max(1, TARGET_NUMBERS.get(device.type, TARGET_NUMBERS["cpu"]) // vocabulary)
    if sum(targets) == len(targets):  # one each: the batch's size is limited by its tokens
        return [list(range(len(targets)))]
    groups: list[list[int]] = []
    held = 0
    for b, count in enumerate(targets):
        if groups and held + count <= most:
            groups[-1].append(b)
            held += count
        else:
            groups.append([b])
            held = count
    return groups


def target_rows(lengths: Sequence[int], targets: str | int, vocabulary: int, device: torch.device) -> int:
    """The most distributions that a batch of such sequences computes at a time, [., V], one for each target."""
    if targets == "last":
        return len(lengths)
    each = [min(length, targets) if isinstance(targets, int) else length for length in lengths]
    return max(sum(each[b] for b in group) for group in rows_apart(each, vocabulary, device))


def batch_tokens_for(
    model: nn.Module, device: torch.device, vectors: int, layers: Mapping[str, int], targets: str | int = "last"
) -> int:
    """How many tokens fit in this device's memory when `vectors` cotangents are pulled back to these layers of width D.

    The most whose peak, by `pull_memory`, is `GPU_MEMORY_SHARE` of the free memory, as one prompt or as short ones.
    `targets` is as for `FisherModel`.
    """
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    devices = {device} | {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    free = min(torch.cuda.mem_get_info(each)[0] for each in devices)
    return most_tokens(
        int(GPU_MEMORY_SHARE * free),
        model_widths(model, layers),
        vectors,
        model_dtype(model).itemsize,
        device,
        targets,
    )


def model_widths(model: nn.Module, layers: Mapping[str, int]) -> Widths:
    """The sizes of a model that `pull_memory` asks for, with these layers hooked, each of its width D."""
    blocks = decoder_blocks(model)
    above = len(blocks) - 1 - min(block_numbers(blocks, layers))
    return widths_of(model, blocks.values(), max(layers.values()), layers_of(model).vocabulary, above, len(layers))


def most_tokens(
    limit: int, widths: Widths, vectors: int, itemsize: int, device: torch.device, targets: str | int = "last"
) -> int:
    """The most tokens of a batch whose peak is at most `limit` bytes; 256 at least.

    Args:
        limit: bytes, besides the weights.
        widths: of the model.
        vectors: K, the cotangents pulled back together.
        itemsize: bytes of a number of the pullback.
        device: that it runs on.
        targets: as for `FisherModel`.
    """

    def fits(tokens: int) -> bool:
        short = [SHORT_PROMPT] * (tokens // SHORT_PROMPT)
        return all(
            sum(pull_memory(widths, lengths, vectors, itemsize, device, targets=rows).values()) <= limit
            for lengths in ([tokens], short)
            for rows in [target_rows(lengths, targets, widths.V, device) if lengths else 0]
        )

    low, high = 256, 2**20
    while high - low > low // 64:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class PromptNumbers(NamedTuple):
    """One prompt's results as arrays on the CPU: token_ids [K], log_probs [K], and each layer's low-rank matrix.

    `reason` says which numbers are not finite, or is None. `targets` are there if several may be.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    layers: dict[str, LayerResult]
    reason: str | None
    targets: TargetNumbers | None = None


def numbers_of(
    found: Estimate,
    lengths: Sequence[int],
    rank: int,
    *,
    samples: int = 1,
    pairs: int | None = None,
    unbiased: bool = False,
) -> list[PromptNumbers]:
    """Compress a batch's factors, all layers in one batch.

    Args:
        found: the batch's estimate, of every `samples` rows one prompt.
        lengths: the number of positions of each prompt's energy, which is padded on the right.
        rank: R, singular values to keep.
        samples: S, completions of a prompt.
        pairs: how many (target, token) pairs to keep of several targets; None: there is one target.
        unbiased: whether the matrix before its cut is an unbiased estimate of the whole vocabulary's.
    """
    m = found.targets.columns.shape[1]
    found = mean_over_samples(found, samples)
    low_ranks = compress_layers(found.factors, rank)
    tensors = {layer: _layer_tensors(found, layer, low_rank, unbiased) for layer, low_rank in low_ranks.items()}
    of_targets = [*found.targets, *found.target_trace.values(), *found.trace_error.values()]
    every = [found.token_ids, found.log_probs.float(), *(x.float() for of in tensors.values() for x in of)]
    token_ids, log_probs, *rest = _on_host([*every, *of_targets])
    arrays = {layer: [rest.pop(0) for _ in of] for layer, of in tensors.items()}
    columns, next_log_probs, entropy = (rest.pop(0) for _ in found.targets)
    traces = {layer: rest.pop(0) for layer in found.target_trace}
    errors = {layer: rest.pop(0) for layer in found.trace_error}
    numbers = []
    for b, length in enumerate(lengths):
        layers = {
            layer: LayerResult(S[b], V[b], Q[b], float(norm[b]), energy[b, :length], *(float(x[b]) for x in more))
            for layer, (S, V, Q, norm, energy, *more) in arrays.items()
        }
        if pairs is None:
            numbers.append(PromptNumbers(token_ids[b], log_probs[b], layers, _not_finite(log_probs[b], layers)))
            continue
        kept = _weightiest(layers, log_probs[b], pairs)
        there = columns[b] >= 0
        number = np.cumsum(there) - 1  # of each target among those that are there
        of_outcome = number[kept // (len(token_ids[b]) // len(columns[b]))]
        targets = TargetNumbers(
            columns[b][there],
            (np.arange(len(columns[b])) // m)[there],
            next_log_probs[b][there],
            entropy[b][there],
            np.pad(of_outcome, (0, pairs - len(kept)), constant_values=-1),
            {layer: x[b][there] for layer, x in traces.items()},
            {layer: float(errors[layer][b]) if layer in errors else np.nan for layer in layers},
        )
        layers = {layer: result._replace(Q=_some(result.Q, kept, pairs, 0)) for layer, result in layers.items()}
        ids, log_p = _some(token_ids[b], kept, pairs, NO_TOKEN), _some(log_probs[b], kept, pairs, NO_LOG_PROB)
        numbers.append(PromptNumbers(ids, log_p, layers, _not_finite(log_p, layers), targets))
    return numbers


def _weightiest(layers: Mapping[str, LayerResult], log_probs: np.ndarray, pairs: int) -> np.ndarray:
    """The outcomes that the stored matrices weigh most, over all layers, heaviest first."""
    weight = np.zeros(len(log_probs))
    for result in layers.values():
        part = np.nan_to_num(result.Q.astype(np.float64)) ** 2 @ np.nan_to_num(result.S.astype(np.float64))
        weight += part / max(part.sum(), np.finfo(np.float64).tiny)
    weight[~np.isfinite(log_probs)] = -1
    heaviest = np.argsort(-weight, kind="stable")[:pairs]
    return heaviest[weight[heaviest] >= 0]


def _some(x: np.ndarray, chosen: np.ndarray, count: int, fill: float) -> np.ndarray:
    """Chosen entries of the first dimension, padded to `count`."""
    padding = [(0, count - len(chosen)), *[(0, 0)] * (x.ndim - 1)]
    return np.pad(x[chosen], padding, constant_values=fill)


def _layer_tensors(found: Estimate, layer: str, low: LowRank, unbiased: bool) -> tuple[Tensor, ...]:
    """S, V, Q, residual norm, position energy, and then the numbers of a `LayerResult` in their order."""
    how_good = quality(found.factors[layer], low, found.remainder[layer])
    if unbiased:
        how_good = how_good._replace(trace_full=low.trace, trace_full_error=found.trace_error[layer])
    Q_BKR = low.left_vectors
    if layer in found.loadings:
        Q_BKR = found.loadings[layer].to(Q_BKR) @ Q_BKR
    parts = (low.singular_values, low.vectors, Q_BKR, found.residual_norm[layer], found.position_energy[layer])
    return (*parts, low.trace, *how_good)


def _on_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """The tensors as arrays; a GPU copies them all before it is waited for."""
    copies = [x.to("cpu", non_blocking=x.is_cuda) for x in tensors]
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.synchronize(device)
    return [x.numpy() for x in copies]


def _not_finite(log_probs: np.ndarray, layers: dict[str, LayerResult]) -> str | None:
    if np.isnan(log_probs).any() or not np.isfinite(log_probs[:1]).all():  # a banned token has probability 0
        return "the logits are not finite"
    for layer, result in layers.items():
        if not (np.isfinite(result.S).all() and np.isfinite(result.V).all()):
            return f"the scores at {layer} are not finite"
    return None


WINDOW = 32  # prompts that are sorted by length at a time


Prompt = str | Sequence[Message] | Mapping[str, Any]
"""A text, a list of messages, or a mapping of "messages" and "tools"."""


Completion = str | Message | SkippedPrompt | None
"""A text, an assistant message, why there is none, or None where none is wanted."""


class Computed(NamedTuple):
    """A prompt's tokens, its sequences and its numbers."""

    tokenized: TokenizedPrompt
    sequences: list[Tokens]
    numbers: PromptNumbers


def in_windows(
    prompts: Iterable[tuple[Prompt, Completion]],
    renderer: Renderer,
    compute: Callable[[list[list[Tokens]]], list[PromptNumbers]],
    sequences: Callable[[list[Tokens]], list[list[Tokens]]],
    batch_size: int,
    max_batch_tokens: int,
) -> Iterator[Computed | SkippedPrompt]:
    """Render and compute prompts in batches of similar length, a window at a time, and yield them in order.

    Args:
        prompts: texts or lists of messages, each with its completion or None.
        renderer: makes a prompt's tokens, or says why it has none.
        compute: computes a batch, from the sequences of each prompt.
        sequences: a prompt's sequences: itself, or with the completions that the model writes.
        batch_size: most prompts in a batch.
        max_batch_tokens: most tokens in a batch, padding included.

    Yields:
        Each prompt's tokens, sequences and numbers, or why it is skipped.
    """
    stream = iter(prompts)
    while window := [_rendered(prompt, completion, renderer) for prompt, completion in islice(stream, WINDOW)]:
        tokenized = {i: prompt for i, prompt in enumerate(window) if not isinstance(prompt, SkippedPrompt)}
        places = list(tokenized)
        made = dict(zip(places, sequences([Tokens(tokenized[i].ids, tokenized[i].start) for i in places]), strict=True))
        numbers: dict[int, PromptNumbers] = {}
        for batch in pack([tokens_of(made[i]) for i in places], batch_size, max_batch_tokens):
            members = [places[j] for j in batch]
            numbers.update(zip(members, compute([made[i] for i in members]), strict=True))
        for i, prompt in enumerate(window):
            yield prompt if isinstance(prompt, SkippedPrompt) else Computed(prompt, made[i], numbers[i])


def with_completions(
    prompts: Iterable[Prompt], completions: Iterable[str] | None, wanted: bool
) -> Iterator[tuple[Prompt, Completion]]:
    """Each prompt with its completion: one of the given ones, or the assistant turn that follows it, if one is wanted.

    Raises:
        ValueError: there are more or fewer completions than prompts, or one is no text.
    """
    if completions is not None:
        missing = object()
        both: Iterator[tuple[Any, Any]] = zip_longest(prompts, completions, fillvalue=missing)
        for number, (prompt, completion) in enumerate(both):
            if prompt is missing or completion is missing:
                raise ValueError(f"expected as many completions as prompts, but one of the two ends after {number}")
            if not isinstance(completion, str | dict):
                raise ValueError(f"completion {number} is a {type(completion).__name__}; expected a text")
            yield prompt, completion
        return
    for prompt in prompts:
        try:
            yield prompt, answer_after(prompt) if wanted else None
        except SkippedPrompt as reason:
            yield prompt, reason


def _rendered(prompt: Prompt, completion: Completion, renderer: Renderer) -> TokenizedPrompt | SkippedPrompt:
    if isinstance(completion, SkippedPrompt):
        return completion
    try:
        return renderer.render(prompt, completion)
    except SkippedPrompt as reason:
        return reason


def tell_of_halving(prompts: Sequence[Sequence[Tokens]]) -> None:
    """Say that a batch did not fit in memory, for `in_halves`."""
    log.warning("out of memory on %d prompts of up to %d tokens", len(prompts), max(map(tokens_of, prompts)))
