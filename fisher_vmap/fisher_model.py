"""`FisherModel`: a model and its tokenizer, opened and probed once, from prompts to low-rank Fisher matrices."""

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fisher_vmap.completions import Completions
from fisher_vmap.data.batching import (
    Completion,
    Prompt,
    PromptNumbers,
    batch_tokens_for,
    in_windows,
    numbers_of,
    rows_apart,
    tell_of_halving,
    with_completions,
)
from fisher_vmap.data.conversations import SkippedPrompt, check_prompts
from fisher_vmap.data.pieces import Pieces
from fisher_vmap.data.render import MAX_LENGTH, Renderer
from fisher_vmap.data.sequences import Tokens, as_sequences, masked, padded, tokens_of
from fisher_vmap.estimators import Estimate, EstimatorOptions, check_fit, join_groups, topk
from fisher_vmap.fisher import check_inputs, fisher_scores
from fisher_vmap.fisher_record import FisherRecord, empty_record, record_of
from fisher_vmap.full_matrix import fisher_full, fisher_sampled
from fisher_vmap.kernels.hf_attention import attention_of
from fisher_vmap.linearize.block import cotangents_at_a_time
from fisher_vmap.linearize.linear_map import CommonOptions, KernelOptions, as_it_is, differentiable, undisturbed
from fisher_vmap.linearize.network import LinearizedNetwork, linearize
from fisher_vmap.linearize.probe import known_of, layer_widths, probe, signature
from fisher_vmap.linearize.scores import Scores
from fisher_vmap.model.layers import layers_of, resolve_layers
from fisher_vmap.model.layout import lay_out
from fisher_vmap.model.offload import input_device
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.validation import check_whole, forget_freed, in_halves, is_out_of_memory, most_positions
from fisher_vmap.model.wrappers import names_inside, tokenizer_of, unwrapped

log = logging.getLogger(__name__)

PAIRS_A_TOKEN = 4  # of several targets, this many times top_k (target, token) pairs are kept


class ModelOptions(CommonOptions, total=False):
    """The options of a `FisherModel` as keyword arguments."""

    estimator: str
    include_rest: bool
    oversampling: int
    passes: int
    trace_samples: int | None
    score_samples: int


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
        targets: str | int = "last",
        samples: int = 1,
        temperature: float | None = None,
        seed: int = 0,
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
            targets: the positions whose next-token distribution is read: "last" (the default); "completion", those that
                predict the tokens of a given completion; "all"; or a number N: the model writes N tokens itself, and
                the positions that predict these are read.
            samples: with a number as targets: S completions of each prompt are written; the matrix is their mean.
            temperature: of these; None: the likeliest tokens for one completion, 1 for several. 0 is the likeliest too.
            seed: of the completions that are drawn.
            options: kernel, chunk_size, precision (the one chosen is an attribute) and audit, as for `fisher_scores`;
                and any of the following.
            positions: where the bias is added: "all" (the default), "last", "prompt" or "completion".
            estimator: "topk" (the default), the matrix of the K likeliest tokens of each target; "full", close to the
                best approximation of the whole vocabulary's matrix with the rank asked for, at a price that hardly
                grows with the targets; or "sampled", an unbiased estimate of that matrix from drawn scores.
            include_rest: for topk: treat "any other token" as one more outcome.
            oversampling: for full: vectors beyond the rank (6).
            passes: for full: rounds of push and pull (1).
            trace_samples: random vectors for estimating what the matrix lacks; None (the default): 4 for full, else 0.
            score_samples: for sampled: how many scores are drawn (64).

        Raises:
            ValueError: a layer that the model does not have or whose output is not [B, T, D], top_k above V, or
                settings that exclude each other.
        """
        own = {name: value for name, value in options.items() if name in CommonOptions.__annotations__}
        others = {name: value for name, value in options.items() if name not in own}
        self.options, how = KernelOptions(**own), EstimatorOptions(**others)  # type: ignore[arg-type]
        self.estimator, self.include_rest = how.estimator, how.include_rest
        self.oversampling, self.passes, self.trace_samples = how.oversampling, how.passes, how.samples
        check_fit(how, self.options.kernel)
        check_whole("top_k", top_k)
        for name, value in {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}.items():
            if value is not None:
                check_whole(name, value, 1)
        self.score_samples, self.targets = how.score_samples, targets
        self.completions = Completions(targets, samples, temperature, seed)
        if self.several and how.include_rest:
            raise ValueError("include_rest is for one target; leave it out, or use estimator full")
        given, model = model, unwrapped(model)
        self.completions.check(model, self.options.positions)
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
        self.top_k, self.batch_size = top_k, sys.maxsize if batch_size is None else batch_size
        self.max_batch_tokens = max_batch_tokens or self.batch_tokens(rank=top_k)
        self._renderer, self._template_kwargs = renderer, chat_template_kwargs
        if not 1 <= top_k <= self.vocabulary:
            raise ValueError(f"top_k is {top_k}; expected 1 to {self.vocabulary}, the size of this model's vocabulary")
        if self.include_rest and top_k == self.vocabulary:
            raise ValueError(f"include_rest with all {top_k} tokens leaves no other one; lower top_k")

    @property
    def forms(self) -> dict[str, dict[str, str]]:
        """What ran, in words, for each layer that has been computed.

        "form" of the kernel, "why", "attention", "prompts" (how they are laid out), "rules" (the blocks pulled back by
        a rule, and why others are not), "last_block" (whether only its last row is run), "precision", "audit" (how many
        batches were compared with plain autograd), "audit_attention" (that of the unchanged model there).
        """
        with undisturbed(self.model, self.precision):
            known = known_of(self.model)
            if known is None or known.made_of != signature(self.model):
                return {}
            ran = {layer: known.ran(layer, self.options.kernel) for layer in self.layers}
        told = {"precision": self.precision, "audit_attention": attention_of(self.model)}
        return {layer: {**found, **told} for layer, found in ran.items() if found is not None}

    def scores(self, input_ids: Tensor, attention_mask: Tensor | None = None, **choices: Any) -> Scores:
        """`fisher_scores` with this model's layers and settings.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T], 1 for real tokens; None: no padding.
            choices: arguments of `fisher_scores` that replace this model's; `targets` is "last" if not given.
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
        """The factors of the batch's Fisher matrices at the last tokens, by this model's estimator and settings.

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
            return topk(self.scores(input_ids, attention_mask, **vars(options)))
        if self.estimator == "sampled":
            return fisher_sampled(
                self.model,
                input_ids,
                attention_mask,
                layers=self.layers,
                samples=self.score_samples,
                rank=rank,
                top_k=self.top_k,
                **vars(options),
            )
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

    def sequences(self, prompts: Sequence[Tokens]) -> list[list[Tokens]]:
        """The sequences of each prompt: itself, or with each of the completions that the model writes to it."""
        if not isinstance(self.targets, int):
            return [[prompt] for prompt in prompts]
        written = self.completions.write(self.model, [prompt.ids for prompt in prompts])
        return [[prompt.completed(ids) for ids in each] for prompt, each in zip(prompts, written, strict=True)]

    @property
    def several(self) -> bool:
        """Whether a prompt may have several targets."""
        return self.targets != "last"

    @property
    def outcomes(self) -> int:
        """How many outcomes of a prompt are kept: tokens of its target, or (target, token) pairs of several."""
        return PAIRS_A_TOKEN * self.top_k if self.several else self.top_k + self.include_rest

    @autocast_off()
    def numbers(self, prompts: Sequence[Sequence[int] | Tokens | Sequence[Tokens]], rank: int) -> list[PromptNumbers]:
        """One batch from token ids to compressed matrices.

        Args:
            prompts: of each prompt of the batch the token ids, of any length; these with a completion; or a list of
                sequences that differ in their completions, as many for each prompt.
            rank: R, how many singular values to keep.

        A single prompt that runs out of memory is tried again with half as many cotangents at a time, down to one.

        Returns:
            For each prompt its token_ids [K], log_probs [K] and each layer's S, V and Q, as numpy arrays.
        """
        chunk, sequences = self.options.chunk_size, [as_sequences(prompt) for prompt in prompts]
        while True:
            try:
                numbers = self._numbers(sequences, rank, chunk)
                if chunk != self.options.chunk_size:
                    tokens = len(sequences[0][0].ids)
                    log.warning("out of memory on a prompt of %d tokens: cotangent_chunk %d was used", tokens, chunk)
                return numbers
            except (MemoryError, RuntimeError) as error:  # torch's OutOfMemoryError is a RuntimeError
                vectors = self._vectors(rank)
                whole = chunk or cotangents_at_a_time(vectors, sum(map(tokens_of, sequences)), self.device) or vectors
                if not is_out_of_memory(error) or len(sequences) > 1 or whole <= 1:
                    raise
            # Outside of the handler, whose traceback keeps the tensors alive.
            chunk = (whole + 1) // 2
            forget_freed()

    def batch_tokens(self, rank: int) -> int:
        """How many tokens a batch may have on this device for matrices of rank R."""
        return batch_tokens_for(self.model, self.device, self._vectors(rank), self.widths, self.targets)

    def _vectors(self, rank: int) -> int:
        """How many vectors of a prompt are pulled back together."""
        targets = self.targets if isinstance(self.targets, int) else 1  # of data: not known beforehand
        vectors = {"topk": self.top_k * targets, "full": rank + self.oversampling, "sampled": self.score_samples}
        return vectors[self.estimator] + self.trace_samples

    def _numbers(self, prompts: Sequence[Sequence[Tokens]], rank: int, chunk_size: int | None) -> list[PromptNumbers]:
        rows, samples = [row for sequences in prompts for row in sequences], len(prompts[0])
        width, where = max(len(row.ids) for row in rows), str(self.options.positions)
        parts: list[Estimate] = []
        groups = rows_apart([row.targets(self.targets) for row in rows], self.vocabulary, self.device)
        for some in ([rows[b] for b in group] for group in groups):
            input_ids, mask = padded(some, self.device, width)
            options = replace(
                self.options,
                chunk_size=chunk_size,
                positions=where if where in ("all", "last") else masked(some, mask, where),
                targets=str(self.targets) if self.targets in ("last", "all") else masked(some, mask, "targets"),
            )
            parts.append(self._estimate(input_ids, mask, rank, options))
        found = join_groups(parts, groups)
        # Completions differ, so that of several only the prompt's own positions have a mean.
        lengths = [len(one.ids) if samples == 1 else one.start or len(one.ids) for one, *_ in prompts]
        pairs = self.outcomes if self.several else None
        return numbers_of(found, lengths, rank, samples=samples, pairs=pairs, unbiased=self.estimator == "sampled")

    def fisher(
        self, prompts: Iterable[Prompt], rank: int = 10, *, completions: Iterable[str] | None = None
    ) -> Iterator[FisherRecord]:
        """Yield the Fisher matrix of each prompt, in order, as it is computed.

        A prompt that is longer than the model's positions is cut (`record.row["truncated"]`). The status of a record is
        "skipped" for a prompt without text, "failed" if its numbers are not finite.

        Args:
            prompts: an iterable of texts, lists of messages ({"role": ..., "content": ...}), such lists as JSON, or
                mappings of "messages" and "tools".
            rank: R, how many singular values to keep.
            completions: with targets "completion", the completion of each prompt; None: the assistant turn that follows
                the last user turn of each conversation.

        Raises:
            ValueError: one prompt was given instead of several, or the model was opened without a tokenizer.
        """
        check_whole("rank", rank, 1)
        return self._records(self.pairs(prompts, completions), rank)

    @property
    def renderer(self) -> Renderer:
        """What turns prompts into tokens, made when it is first needed; raises ValueError without a tokenizer."""
        if self._renderer is None:
            if self.tokenizer is None:
                raise ValueError("this FisherModel has no tokenizer; give FisherModel(model, tokenizer, ...) one")
            limits = [limit for limit in (most_positions(self.model), layers_of(self.model).positions) if limit]
            room = min([MAX_LENGTH, *map(self.completions.room, limits)])
            self._renderer = Renderer(self.tokenizer, max_length=room, chat_template_kwargs=self._template_kwargs)
        return self._renderer

    def pairs(self, prompts: Iterable[Prompt], completions: Iterable[str] | None) -> Iterator[tuple[Any, Completion]]:
        """Prompts for the renderer, with the completion of each; arguments and errors as `fisher`."""
        check_prompts(prompts)
        from_turns = self.targets == "completion"
        if completions is not None and not from_turns:
            raise ValueError(f"completions are for targets 'completion', not {self.targets!r}; leave them out")
        return with_completions(map(self.renderer.given, prompts), completions, from_turns)

    def _records(self, pairs: Iterable[tuple[Prompt, Completion]], rank: int) -> Iterator[FisherRecord]:
        found = in_windows(
            pairs,
            self.renderer,
            lambda batch: in_halves(lambda some: self.numbers(some, rank), batch, tell_of_halving),
            self.sequences,
            self.batch_size,
            self.max_batch_tokens,
        )
        for index, prompt in enumerate(found):
            if isinstance(prompt, SkippedPrompt):
                yield empty_record(index, str(prompt), self.widths, self.outcomes, rank)
            else:
                yield record_of(index, prompt.tokenized, prompt.numbers, self.pieces, prompt.sequences)

    @contextmanager
    def linearize(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: str | Tensor | None = None,
        targets: str | Tensor = "last",
        pull_only: bool = False,
    ) -> Iterator[LinearizedNetwork]:
        """The linear map of a batch, for products by any vectors within the context.

        Args:
            input_ids: [B, T] int64, padded on either side.
            attention_mask: [B, T], 1 for real tokens.
            positions: where the bias is added, as for `fisher_scores`; None: as this model was opened.
            targets: the positions whose h is the output, as for `fisher_scores`.
            pull_only: nothing is pushed, so that a model needs no forward derivatives.

        Raises:
            ValueError: no form of this model has both products, or they are not adjoint to each other.
        """
        with torch.inference_mode(False), torch.no_grad(), as_it_is(self.model, self.precision):
            where = self.options.positions if positions is None else positions
            layout = lay_out(input_ids, attention_mask, where, targets)
            check_inputs(self.model, layout)
            with differentiable(self.model):
                known = probe(self.model, layout._replace(targets=None))
            network = linearize(self.model, known, layout, self.layers, self.options, pull_only=pull_only)
        yield network
