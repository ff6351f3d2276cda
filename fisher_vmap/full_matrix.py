"""`fisher_full` and `fisher_sampled`: Fisher matrices of the whole vocabulary, for a batch of prompts on tensors."""

from collections.abc import Callable, Sequence
from typing import Unpack

from torch import Tensor, inference_mode, nn, no_grad

from fisher_vmap.estimators import SCORE_SAMPLES, Estimate, full, join_groups, sampled
from fisher_vmap.fisher import broken_off, check_inputs, prompt_seeds
from fisher_vmap.linearize.linear_map import KernelOptions, Options, as_it_is, differentiable
from fisher_vmap.linearize.network import LinearizedNetwork, OneAtATime, linearize
from fisher_vmap.linearize.probe import probe
from fisher_vmap.linearize.select import choose_forms, give_up
from fisher_vmap.model.layers import resolve_layers
from fisher_vmap.model.layout import Layout, lay_out, select
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.rope_scaling import batches_apart
from fisher_vmap.model.validation import check_whole
from fisher_vmap.model.wrappers import names_inside, unwrapped


def fisher_full(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: str | int | Sequence[str | int],
    rank: int = 10,
    oversampling: int = 6,
    passes: int = 1,
    top_k: int = 10,
    trace_samples: int = 4,
    **options: Unpack[Options],
) -> Estimate:
    """Close to the best rank-R approximation of the Fisher matrix of the whole vocabulary, for a batch of prompts.

    F = sum over all tokens of p_t g_t g_t^T = J^T C J, by two pullbacks and one pushforward of rank + oversampling
    vectors for each pass [Halko, Martinsson and Tropp, SIAM Review 2011]. With several layers the first pullback is
    shared; each layer has its own push and second pull. If rank + oversampling is D or more, the result is F itself; of
    one target, for all layers by one pullback of D vectors. With several targets F is the sum of their matrices, and
    the number of vectors is the same; each target adds the head's work for its own row.

    Args:
        model: as for `fisher_scores`.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: as for `fisher_scores`.
        rank: R, the rank wanted; `compress(factor, rank)` cuts the result to it.
        oversampling: vectors beyond R; more of them bring the result closer to the best possible.
        passes: rounds of push and pull.
        top_k: K, how many of the likeliest tokens to report as well.
        trace_samples: S, random vectors for estimating the remainder; they join the first pullback.
        options: positions, targets, kernel ("auto", "layerwise" or "whole"), chunk_size, precision and audit, as for
            `fisher_scores`.

    Returns:
        Estimate, with factors [B, R + oversampling, D].

    Raises:
        ValueError: an argument is not as described, or the model has no forward derivatives.
    """
    bounds = (("rank", rank, 1), ("oversampling", oversampling, 0), ("passes", passes, 1), ("top_k", top_k, 1))
    for name, value, least in (*bounds, ("trace_samples", trace_samples, 0)):
        check_whole(name, value, least)
    vectors = rank + oversampling

    def estimated(net: LinearizedNetwork, seeds: Sequence[int]) -> Estimate:
        return full(net, vectors=vectors, seeds=seeds, passes=passes, top_k=top_k, samples=trace_samples)

    products = 2 * passes * vectors + trace_samples
    return _by_groups(model, input_ids, attention_mask, layers, KernelOptions(**options), products, estimated)


def fisher_sampled(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    layers: str | int | Sequence[str | int],
    samples: int = SCORE_SAMPLES,
    rank: int = 10,
    top_k: int = 10,
    **options: Unpack[Options],
) -> Estimate:
    """An unbiased estimate of the Fisher matrix of the whole vocabulary, from drawn scores, for a batch of prompts.

    F ~ 1/S sum_s g_s g_s^T with g_s = sum_j J_j^T a_{j, y_j}, the gradient of the log-probability of tokens y_j, one
    drawn from the model's own distribution at each target j. It takes one pullback of S vectors and a push of R,
    whatever the number of targets. `trace_error` is the standard error of the trace, sqrt(Var |g|^2 / S). The same
    prompt always gives the same draws.

    Args:
        model: as for `fisher_scores`.
        input_ids: [B, T] int64, padded on either side.
        attention_mask: [B, T], 1 for real tokens; None: no padding.
        layers: as for `fisher_scores`.
        samples: S, the number of drawn scores, at least 2.
        rank: R, of how many leading directions the tokens' shares are found.
        top_k: K, how many of the likeliest tokens to report as well.
        options: as for `fisher_full`.

    Returns:
        Estimate, with factors [B, S, D].

    Raises:
        ValueError: an argument is not as described, or the model has no forward derivatives.
    """
    for name, value, least in (("samples", samples, 2), ("rank", rank, 1), ("top_k", top_k, 1)):
        check_whole(name, value, least)

    def estimated(net: LinearizedNetwork, seeds: Sequence[int]) -> Estimate:
        return sampled(net, samples=samples, rank=rank, seeds=seeds, top_k=top_k)

    return _by_groups(model, input_ids, attention_mask, layers, KernelOptions(**options), samples + rank, estimated)


def _by_groups(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    layers: str | int | Sequence[str | int],
    how: KernelOptions,
    products: int,
    estimated: Callable[[LinearizedNetwork, Sequence[int]], Estimate],
) -> Estimate:
    """An estimate of a batch, in groups of prompts that may share a linear map; `products` is how many it takes."""
    if how.kernel == "loop":
        raise ValueError("kernel loop has no forward derivatives, which the full matrix needs; use auto or whole")
    layout = lay_out(input_ids, attention_mask, how.positions, how.targets)
    given, model = model, unwrapped(model)
    how = how.on(model)
    with inference_mode(False), no_grad(), as_it_is(model, how.precision):
        with differentiable(model):
            names = resolve_layers(model, names_inside(given, model, layers))
            check_inputs(model, layout)
            known = probe(model, layout._replace(targets=None))

        def of_group(group: list[int]) -> Estimate:
            part = select(layout, group)
            last = part._replace(targets=None)

            def run() -> Estimate:
                net = linearize(model, known, part, names, how, products)
                return estimated(net, prompt_seeds(part))

            try:
                return run()
            except StructureChanged as reason:
                with differentiable(model):
                    forms = choose_forms(model, known, last, names, how.kernel)
                    give_up(model, known, last, how.kernel, broken_off(known, forms, names, how.kernel, reason))
                return run()

        groups = _alike(batches_apart(model, layout.lengths), layout)
        try:
            parts = [of_group(group) for group in groups]
        except OneAtATime:
            groups = [[b] for b in range(len(layout.lengths))]
            parts = [of_group(group) for group in groups]
        return join_groups(parts, groups)


def _alike(groups: list[list[int]], layout: Layout) -> list[list[int]]:
    """The same groups, with prompts of one target apart: the search starts from other vectors for several."""
    if layout.targets is None:
        return groups
    several = [len(places) > 1 for places in layout.targets]
    parts = [[b for b in group if several[b] == kind] for group in groups for kind in (True, False)]
    return [part for part in parts if part]
