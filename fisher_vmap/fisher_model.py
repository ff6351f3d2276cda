"""`FisherModel`: a model and its tokenizer, opened and probed once, from prompts to low-rank Fisher matrices.

`FisherRecord` holds one prompt's Fisher matrices, as `FisherModel.fisher` yields them.
"""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from fisher_vmap.data.batching import Prompt, PromptNumbers, batch_tokens_for, in_windows, numbers_of
from fisher_vmap.data.conversations import SkippedPrompt, check_prompts
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.render import MAX_LENGTH, Renderer, TokenizedPrompt
from fisher_vmap.estimators import Estimate, EstimatorOptions, check_fit, fisher_full, topk
from fisher_vmap.fisher import check_inputs, fisher_scores
from fisher_vmap.kernels.hf_attention import attention_of
from fisher_vmap.linearize.audit import ShardForms, due_batch, one_shard
from fisher_vmap.linearize.block import cotangents_at_a_time
from fisher_vmap.linearize.linear_map import KernelOptions, Options, as_it_is, differentiable, undisturbed
from fisher_vmap.linearize.network import LinearizedNetwork, linearize
from fisher_vmap.linearize.probe import known_of, layer_widths, probe, signature
from fisher_vmap.linearize.scores import Scores
from fisher_vmap.model.layers import layers_of, resolve_layers
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.offload import input_device
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.validation import check_whole, forget_freed, is_out_of_memory, most_positions
from fisher_vmap.model.wrappers import names_inside, tokenizer_of, unwrapped
from fisher_vmap.results.record import LayerResult, PromptRecord, covered_mass, how_good

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FisherRecord:
    """One prompt's Fisher matrices: a `PromptRecord` (S, V, U, Q, matrix(), matvec(x), scores()) for each layer."""

    index: int
    layers: dict[str, PromptRecord]

    def __getattr__(self, name: str) -> Any:
        """The attributes of the only layer's record; with several layers, use `record.layers[name]`."""
        if name.startswith("_") or len(self.layers) != 1:
            raise AttributeError(f"{name}: this record has {len(self.layers)} layers; use record.layers[layer].{name}")
        return getattr(next(iter(self.layers.values())), name)


def record_of(
    index: int, prompt: TokenizedPrompt, numbers: PromptNumbers, pieces: Pieces | None, status: str = "failed"
) -> FisherRecord:
    """The record of a prompt's numbers and tokens; `status` is the status of numbers with a reason."""
    row: dict[str, Any] = {
        "text": prompt.text,
        "status": "ok" if numbers.reason is None else status,
        "reason": numbers.reason,
        "tokens": len(prompt.ids),
        "truncated": prompt.truncated,
        "mass": covered_mass(numbers.log_probs, numbers.token_ids),
        "top_tokens": None if pieces is None else [pieces.single(int(token)) for token in numbers.token_ids],
        "prompt_tokens": None if pieces is None else pieces.each(prompt.ids),
        **{f"{layer}/trace": result.trace for layer, result in numbers.layers.items()},
        **{
            f"{layer}/{name}": value
            for layer, result in numbers.layers.items()
            for name, value in how_good(result).items()
        },
    }
    records = {
        layer: PromptRecord(
            index=index,
            layer=layer,
            S=result.S,
            V=result.V,
            Q=result.Q,
            residual_norm=result.residual_norm,
            position_energy=result.position_energy,
            token_ids=numbers.token_ids,
            log_probs=numbers.log_probs,
            row=row,
        )
        for layer, result in numbers.layers.items()
    }
    return FisherRecord(index, records)


def empty_record(index: int, reason: str, widths: Mapping[str, int], outcomes: int, rank: int) -> FisherRecord:
    """The record of a prompt that was not computed: NaN everywhere, and the reason; K is `outcomes`."""

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan, np.float32)

    layers = {
        layer: LayerResult(nan(rank), nan(rank, D), nan(outcomes, rank), float("nan"), nan(0), float("nan"))
        for layer, D in widths.items()
    }
    numbers = PromptNumbers(np.full(outcomes, -1), nan(outcomes), layers, reason)
    return record_of(index, TokenizedPrompt([], "", False), numbers, None, status="skipped")


class ModelOptions(Options, total=False):
    """The options of a `FisherModel` as keyword arguments."""

    estimator: str
    include_rest: bool
    oversampling: int
    passes: int
    trace_samples: int | None


class FisherModel:
    """A causal LM with hooked layers, opened and checked once, for the matrices of any number of prompts or batches.

    Attributes:
        layers: the names of the hooked modules.
        widths: the width D of each.
        vocabulary: V, the number of tokens of the model.
        pieces: tokens as text; None without a tokenizer.
        precision: the format to compute in: "model", "mixed" or "float32".
        precision_why: the reason for it.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        layers: str | int | Sequence[str | int],
        top_k: int = 10,
        batch_size: int | None = 8,
        max_batch_tokens: int | None = None,
        renderer: Renderer | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[ModelOptions],
    ) -> None:
        """Open a model: resolve its layers and check everything that needs no prompt.

        Args:
            model: as for `fisher_scores`, on its device or devices.
            tokenizer: its tokenizer, needed by `fisher` only; None: that of nnsight or the TransformerBridge.
            layers: names of modules, numbers of decoder blocks (negative from the top), or "all" blocks.
            top_k: K, how many of the likeliest tokens.
            batch_size: most prompts that `fisher` computes at once; None: as many of those sorted together as
                `max_batch_tokens` allows.
            max_batch_tokens: most tokens computed at once, padding included; None: by memory.
            renderer: turns prompts into tokens; None: uses the tokenizer's chat template if it has one.
            chat_template_kwargs: for renderer None: variables of the template, such as {"enable_thinking": False}.
            options: positions ("all" or "last"), kernel, chunk_size, precision (the one chosen is an attribute) and
                audit, as for `fisher_scores`; and any of the following.
            estimator: "topk" (the default), the matrix of the K likeliest tokens, or "full", close to the best
                approximation of the whole vocabulary's matrix with the rank asked for.
            include_rest: for topk: treat "any other token" as one more outcome.
            oversampling: for full: vectors beyond the rank (6).
            passes: for full: rounds of push and pull (1).
            trace_samples: random vectors for estimating what the matrix lacks; None (the default): 4 for full, 0 for
                topk.

        Raises:
            ValueError: a layer that the model does not have or whose output is not [B, T, D], top_k above V, or
                settings that exclude each other.
        """
        own = {name: value for name, value in options.items() if name in Options.__annotations__}
        others = {name: value for name, value in options.items() if name not in own}
        self.options, how = KernelOptions(**own), EstimatorOptions(**others)  # type: ignore[arg-type]
        self.estimator, self.include_rest = how.estimator, how.include_rest
        self.oversampling, self.passes, self.trace_samples = how.oversampling, how.passes, how.samples
        check_fit(how, self.options.kernel)
        check_whole("top_k", top_k)
        for name, value in {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}.items():
            if value is not None:
                check_whole(name, value, 1)
        if self.options.positions not in ("all", "last"):
            raise ValueError(f"positions is {self.options.positions!r}; expected 'all' or 'last'")
        given, model = model, unwrapped(model)
        if isinstance(tokenizer, nn.Module):
            raise ValueError(f"the tokenizer is a {type(tokenizer).__name__}, a model; expected the model's tokenizer")
        self.tokenizer = tokenizer_of(given) if tokenizer is None else tokenizer
        self.pieces = None if self.tokenizer is None else Pieces(self.tokenizer)
        self.model = model
        self.device: torch.device = input_device(model)
        self.precision, self.precision_why, _ = choose_precision(model, self.options.precision)
        self.options = replace(self.options, precision=self.precision)
        with undisturbed(model, self.precision):
            self.layers = resolve_layers(model, names_inside(given, model, layers))
            self.widths = layer_widths(model, self.layers)
            self.vocabulary = layers_of(model).vocabulary
        self.top_k = top_k
        self.batch_size = sys.maxsize if batch_size is None else batch_size
        self.max_batch_tokens = max_batch_tokens or self.batch_tokens(rank=top_k)
        self._renderer, self._template_kwargs = renderer, chat_template_kwargs
        if not 1 <= top_k <= self.vocabulary:
            raise ValueError(f"top_k is {top_k}; expected 1 to {self.vocabulary}, the size of this model's vocabulary")
        if self.include_rest and top_k == self.vocabulary:
            raise ValueError(f"include_rest with all {top_k} tokens leaves no other one; lower top_k")

    @property
    def forms(self) -> dict[str, dict[str, str]]:
        """What ran, in words, for each layer that has been computed.

        "form" is the kernel's form and "why" the reason for it; "attention", "prompts" (how they are laid out), "rules"
        (the blocks pulled back by a rule, and why others are not), "last_block" (whether only its last row is run),
        "precision", "audit" (how many batches were compared with plain autograd), and "audit_attention" (the attention
        of transformers that the unchanged model ran with in that comparison).
        """
        with undisturbed(self.model, self.precision):
            known = known_of(self.model)
            if known is None or known.made_of != signature(self.model):
                return {}
            ran = {layer: known.ran(layer, self.options.kernel) for layer in self.layers}
        told = {"precision": self.precision, "audit_attention": attention_of(self.model)}
        return {layer: {**found, **told} for layer, found in ran.items() if found is not None}

    @contextmanager
    def one_shard(self, number: int, batches: Sequence[Sequence[int]]) -> Iterator[ShardForms]:
        """Compute the batches of one shard of a run within the context.

        `number` is the shard's, and `batches` are the prompt lengths of each of its batches, longest first.
        """
        with torch.no_grad(), undisturbed(self.model, self.precision):
            # Nothing is known yet if all values at the opening of the run were not finite.
            known = known_of(self.model) or probe(self.model, lay_out(torch.arange(4, device=self.device)[None], None))
            due = due_batch(self.model, known, self.layers, self.top_k + self.trace_samples, number, batches)
        with one_shard(known, due) as forms:
            yield forms

    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None, **choices: Any) -> Scores:
        """`fisher_scores` with this model's layers and settings.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T], 1 for real tokens; None: no padding.
            choices: arguments of `fisher_scores` that replace this model's.
        """
        settings: dict[str, Any] = {
            "layers": self.layers,
            "top_k": self.top_k,
            "include_rest": self.include_rest,
            "trace_samples": self.trace_samples if self.estimator == "topk" else 0,
            **vars(self.options),
        }
        return fisher_scores(self.model, input_ids, attention_mask, **(settings | choices))

    @autocast_off()
    def estimate(self, input_ids: Tensor, attention_mask: Tensor | None = None, rank: int = 10) -> Estimate:
        """The factors of the batch's Fisher matrices, by this model's estimator and settings.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T], 1 for real tokens.
            rank: R; the factors of estimator full have `oversampling` more rows, and `compress` cuts them to R.

        Returns:
            Estimate, whose factors A are [B, K, D] (of estimator full [B, R + oversampling, D]) for each layer.
        """
        return self._estimate(input_ids, attention_mask, rank, self.options)

    def _estimate(
        self, input_ids: Tensor, attention_mask: Tensor | None, rank: int, options: KernelOptions
    ) -> Estimate:
        if self.estimator == "topk":
            return topk(self.scores(input_ids, attention_mask, chunk_size=options.chunk_size))
        return fisher_full(
            self.model,
            input_ids,
            attention_mask,
            layers=self.layers,
            rank=rank,
            oversampling=self.oversampling,
            passes=self.passes,
            top_k=self.top_k,
            trace_samples=self.trace_samples,
            **vars(options),
        )

    @autocast_off()
    def numbers(self, prompts_ids: Sequence[Sequence[int]], rank: int) -> list[PromptNumbers]:
        """One batch from token ids to compressed matrices.

        Args:
            prompts_ids: the token ids of each prompt of the batch, of any lengths.
            rank: R, how many singular values to keep.

        A single prompt that runs out of memory is tried again with half as many cotangents at a time, down to one.

        Returns:
            For each prompt its token_ids [K], log_probs [K] and each layer's S, V and Q, as numpy arrays.
        """
        chunk = self.options.chunk_size
        while True:
            try:
                numbers = self._numbers(prompts_ids, rank, chunk)
                if chunk != self.options.chunk_size:
                    tokens = len(prompts_ids[0])
                    log.warning("out of memory on a prompt of %d tokens: cotangent_chunk %d was used", tokens, chunk)
                return numbers
            except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
                vectors = self._vectors(rank)
                whole = chunk or cotangents_at_a_time(vectors, sum(map(len, prompts_ids)), self.device) or vectors
                if not is_out_of_memory(error) or len(prompts_ids) > 1 or whole <= 1:
                    raise
            # Outside of the handler, whose traceback keeps the tensors alive.
            chunk = (whole + 1) // 2
            forget_freed()

    def batch_tokens(self, rank: int) -> int:
        """How many tokens a batch may have on this device for matrices of rank R."""
        return batch_tokens_for(self.model, self.device, self._vectors(rank), self.widths)

    def _vectors(self, rank: int) -> int:
        """How many vectors of a prompt are pulled back together."""
        return (self.top_k if self.estimator == "topk" else rank + self.oversampling) + self.trace_samples

    def _numbers(self, prompts_ids: Sequence[Sequence[int]], rank: int, chunk_size: int | None) -> list[PromptNumbers]:
        lengths = [len(ids) for ids in prompts_ids]
        input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(input_ids)
        for b, ids in enumerate(prompts_ids):
            input_ids[b, : len(ids)], mask[b, : len(ids)] = torch.tensor(ids, device="cpu"), 1
        options = replace(self.options, chunk_size=chunk_size)
        found = self._estimate(input_ids.to(self.device), mask.to(self.device), rank, options)
        return numbers_of(found, lengths, rank)

    def _in_halves(self, prompts_ids: list[list[int]], rank: int) -> list[PromptNumbers]:
        """The numbers of a batch; out of memory it is halved."""
        try:
            return self.numbers(prompts_ids, rank)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or len(prompts_ids) == 1:
                raise
        log.warning("out of memory on %d prompts of up to %d tokens", len(prompts_ids), max(map(len, prompts_ids)))
        forget_freed()
        half = (len(prompts_ids) + 1) // 2
        return self._in_halves(prompts_ids[:half], rank) + self._in_halves(prompts_ids[half:], rank)

    def fisher(self, prompts: Iterable[Prompt], rank: int = 10) -> Iterator[FisherRecord]:
        """Yield the Fisher matrix of each prompt, in order, as it is computed.

        A prompt that is longer than the model's positions is cut (`record.row["truncated"]`), as in the command.

        Args:
            prompts: an iterable of texts, lists of messages ({"role": ..., "content": ...}), such lists as JSON, or
                mappings of "messages" and "tools".
            rank: R, how many singular values to keep.

        Yields:
            One record for each prompt. Its status is "skipped" for a prompt without text, "failed" if its numbers are
            not finite.

        Raises:
            ValueError: one prompt was given instead of several, or the model was opened without a tokenizer.
        """
        check_prompts(prompts)
        check_whole("rank", rank, 1)
        if self._renderer is None:
            if self.tokenizer is None:
                raise ValueError("this FisherModel has no tokenizer; give FisherModel(model, tokenizer, ...) one")
            rooms = (MAX_LENGTH, most_positions(self.model), layers_of(self.model).positions)
            room = min(room for room in rooms if room is not None)
            self._renderer = Renderer(self.tokenizer, max_length=room, chat_template_kwargs=self._template_kwargs)
        return self._records(map(self._renderer.given, prompts), self._renderer, rank)

    def _records(self, prompts: Iterable[Prompt], renderer: Renderer, rank: int) -> Iterator[FisherRecord]:
        found = in_windows(
            prompts, renderer, lambda ids: self._in_halves(ids, rank), self.batch_size, self.max_batch_tokens
        )
        for index, prompt in enumerate(found):
            if isinstance(prompt, SkippedPrompt):
                yield empty_record(index, str(prompt), self.widths, self.top_k + self.include_rest, rank)
            else:
                yield record_of(index, prompt.tokenized, prompt.numbers, self.pieces)

    @contextmanager
    def linearize(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[LinearizedNetwork]:
        """The linear map of a batch, for products by any vectors within the context.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T], 1 for real tokens.

        Raises:
            ValueError: no form of this model has both products, or they are not adjoint to each other.
        """
        with torch.inference_mode(False), torch.no_grad(), as_it_is(self.model, self.precision):
            layout = lay_out(input_ids, attention_mask, self.options.positions)
            check_inputs(self.model, layout)
            with differentiable(self.model):
                known = probe(self.model, layout)
            network = linearize(self.model, known, layout, self.layers, self.options)
        yield network
