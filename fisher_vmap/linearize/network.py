"""`LinearizedNetwork`: the linear map of a batch for users, and for estimators that need both of its products.

J = dh / dtheta for each prompt: theta a bias at a hooked layer, h the last token's residual stream after the last
block, before the final norm. If a model's head cannot be taken apart, h is its logits. Layers that share a form share a
`LinearMap`.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fisher_vmap.linearize.audit import Found, plan_audit, remember_reach, why_wrong
from fisher_vmap.linearize.compare import budget_of
from fisher_vmap.linearize.linear_map import KernelOptions, LinearMap, differentiable
from fisher_vmap.linearize.model_info import Choice, ModelInfo
from fisher_vmap.linearize.output import Asked, Distribution, distribution
from fisher_vmap.linearize.probe import excerpt
from fisher_vmap.linearize.scores import groups_of, opened
from fisher_vmap.linearize.select import choose_forms, give_up
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.rope_scaling import batches_apart
from fisher_vmap.model.targets import at_one_target, grid_of
from fisher_vmap.model.validation import check_tensor, in_float64, is_our_fault, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked

AUDITED = 2  # how many of the likeliest tokens are read for the audit
PROOF_TOKENS = 64  # tokens of each of the two prompts on which J and J^T are compared


class OneAtATime(ValueError):
    """The prompts of a batch cannot be linearised together."""


class LinearizedNetwork:
    """J = dh / dtheta of one batch of prompts, for each hooked layer; made by `FisherModel.linearize`.

    theta is the bias at the hooked layer, h the last token's residual stream after the last block, before the final
    norm. With several targets a prompt, h has a row for each, prompt by prompt: what is [B, ...] on the side of h
    below is then [M, ...].
    """

    def __init__(self, maps: Mapping[str, LinearMap]) -> None:
        self._maps = dict(maps)
        self._metrics: dict[int, Distribution] = {}

    @property
    def layers(self) -> list[str]:
        """The names of the hooked layers."""
        return list(self._maps)

    @property
    def output(self) -> Tensor:
        """The h of each prompt at bias zero, [B, D]; [B, V] if h is the logits."""
        return next(iter(self._maps.values())).rows

    @autocast_off()
    def pullback(
        self, cotangents: Tensor | None = None, layer: str | None = None, *, token_ids: Tensor | None = None
    ) -> Tensor:
        """J^T u for each cotangent u of h; or the scores of tokens, J^T (d log p_t / dh).

        Args:
            cotangents: [B, K, D], any K.
            layer: which hooked layer's J; may be left out if there is only one.
            token_ids: [B, K] int64, instead of cotangents: give the gradients of the log p of these tokens.

        Returns:
            [B, K, D], the gradients of u . h, or of log p, with respect to the bias; float32 or wider.

        Raises:
            ValueError: wrong shapes, a layer that is not hooked, or not exactly one of cotangents and token_ids.
        """
        name = self._layer(layer)
        if (cotangents is None) == (token_ids is None):
            raise ValueError("pullback takes either cotangents or token_ids; give one of the two")
        if cotangents is None:
            cotangents = self._token_rows(name, token_ids)
        self._check(cotangents, len(self.output), self._maps[name].rows.shape[-1])
        return self._maps[name].pull(cotangents, [name])[name].gradients

    @autocast_off()
    def pushforward(self, tangents: Tensor, layer: str | None = None, *, token_ids: Tensor | None = None) -> Tensor:
        """J v for each direction v of the bias; or the derivatives of the log-probabilities of tokens along v.

        Args:
            tangents: [B, K, D], any K.
            layer: the hooked layer of the bias; may be left out if there is only one.
            token_ids: [B, n] int64: give the derivatives of the log p of these tokens instead of those of h.

        Returns:
            [B, K, D], the derivatives of h along v; or [B, K, n], those of log p. float32 or wider.

        Raises:
            ValueError: wrong shapes, or a layer that is not hooked.
        """
        name = self._layer(layer)
        self._check(tangents, len(self._maps[name].layout.lengths), self._maps[name].widths[name])
        moved_BKX = self._maps[name].push(tangents, name)
        if token_ids is None:
            return moved_BKX
        return torch.einsum("bkx,bnx->bkn", moved_BKX, self._token_rows(name, token_ids).to(moved_BKX))

    @autocast_off()
    def metric(self, layer: str | None = None) -> Distribution:
        """The output metric C at h; F = J^T C J is the Fisher matrix of the whole vocabulary."""
        net = self._maps[self._layer(layer)]
        if id(net) not in self._metrics:
            with torch.no_grad():
                self._metrics[id(net)] = distribution(net.head, net.rows)
        return self._metrics[id(net)]

    def maps(self) -> list[LinearMap]:
        """The linear maps, one for all layers that share a form, a forward pass and its pullbacks."""
        return list({id(net): net for net in self._maps.values()}.values())

    def _token_rows(self, layer: str, token_ids: Tensor | None) -> Tensor:
        B = len(self.output)
        check_tensor("token_ids", token_ids, f"[{B}, K] int64")
        assert token_ids is not None
        if token_ids.dim() != 2 or len(token_ids) != B or token_ids.is_floating_point():
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}, dtype {token_ids.dtype}; expected [{B}, K] int64"
            )
        c = self.metric(layer)
        if bool(((token_ids < 0) | (token_ids >= c.probs.shape[1])).any()):
            raise ValueError(f"token_ids has an entry outside 0 to {c.probs.shape[1] - 1}, the model's vocabulary")
        with torch.no_grad():
            return c.rows(token_ids)

    def _layer(self, layer: str | None) -> str:
        if layer is None and len(self._maps) == 1:
            return next(iter(self._maps))
        if layer is None or layer not in self._maps:
            raise ValueError(f"layer is {layer!r}; expected one of the hooked layers, {self.layers}")
        return layer

    def _check(self, vectors: Tensor, B: int, width: int) -> None:
        check_tensor("the vectors", vectors, f"[{B}, K, {width}]")
        if vectors.dim() != 3 or vectors.shape[0] != B or vectors.shape[2] != width:
            raise ValueError(f"the vectors have shape {tuple(vectors.shape)}; expected [{B}, K, {width}]")


def linearize(
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    options: KernelOptions,
    vectors: int = 16,
    pull_only: bool = False,
) -> LinearizedNetwork:
    """Open the linear map of a padded batch, each layer in its proven form; the model must be in `as_it_is`.

    `vectors` is about how many vectors will be pulled and pushed. With `pull_only` nothing will be pushed, so that a
    form without forward derivatives will do.

    Raises:
        OneAtATime: the prompts can only be computed one at a time.
        ValueError: no form of the model has both products, or they are not adjoint to each other.
    """
    options, last = options.on(model), layout._replace(targets=None)  # forms are chosen on the last tokens
    if len(batches_apart(model, layout.lengths)) > 1:
        raise ValueError(
            "this model's rotary embedding depends on the longest prompt of a batch, which would change these prompts' "
            "results; linearise prompts longer than the model's original training length one at a time"
        )
    while True:
        with differentiable(model):
            forms = choose_forms(model, known, last, layers, options.kernel)
            if not pull_only:
                _prove(model, known, last, layers, forms, options)
        net = _opened(model, known, layout, layers, forms, options)
        plan = plan_audit(model, known, layout, forms, vectors, options.audit)
        wrong: dict[str, str] = {}
        if plan.scores or plan.log_probs:
            for one in net.maps():
                wrong |= why_wrong(model, known, *_to_audit(one, layout, scores=bool(plan.scores)), plan)
        if not wrong:
            remember_reach(known, options.kernel, forms, layout, plan)
            return net
        with differentiable(model):
            give_up(model, known, last, options.kernel, wrong)


def _to_audit(net: LinearMap, layout: Layout, scores: bool) -> tuple[Layout, Found]:
    """The likeliest tokens at one target of each prompt, the least certain, and if asked for their scores."""
    with net.prepared():
        reading = distribution(net.head, net.rows, Asked(AUDITED)).reading
        grid = grid_of(net.layout)
        rank_B = grid.spread(-reading.log_probs[:, 0], -torch.inf).nan_to_num().argmax(1).tolist()
        chosen = [i for i, (b, rank) in enumerate(zip(grid.prompts, grid.ranks, strict=True)) if rank == rank_B[b]]
        u_MKX = torch.zeros_like(reading.cotangents.transpose(0, 1))
        u_MKX[chosen] = reading.cotangents.transpose(0, 1)[chosen]
        summed = net.pull(u_MKX) if scores else {}
    device = net.layout.device
    gradients = {layer: summed[layer].gradients if scores else net.rows[:0] for layer in net.layers}
    log_probs, token_ids = reading.log_probs[chosen].to(device), reading.token_ids[chosen].to(device)
    return at_one_target(layout, rank_B), Found(log_probs, token_ids, gradients, net.residual_norm, True)


def _opened(
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    forms: Mapping[str, Choice],
    options: KernelOptions,
) -> LinearizedNetwork:
    maps: dict[str, LinearMap] = {}
    for key in dict.fromkeys(forms[layer].key for layer in layers):
        group = [layer for layer in layers if forms[layer].key == key]
        choice = forms[group[0]]
        if choice.form == "loop":
            raise ValueError(
                "the kernel of this model is the loop, plain autograd token by token, so that its upper network cannot "
                "be linearised: use estimator topk"
            )
        groups = groups_of(choice, model, layout)
        if len(groups) > 1:
            raise OneAtATime(f"these prompts can only be linearised one at a time ({choice.why}); give one a batch")
        with opened(choice, model, known, groups[0][1], group, options) as net:
            maps |= dict.fromkeys(group, net)
    return LinearizedNetwork({layer: maps[layer] for layer in layers})


def _prove(
    model: nn.Module,
    known: ModelInfo,
    layout: Layout,
    layers: Sequence[str],
    forms: Mapping[str, Choice],
    options: KernelOptions,
) -> None:
    """Check u . (J v) = (J^T u) . v on an excerpt of the batch, once for each layer and form."""
    new = [layer for layer in layers if (layer, forms[layer].key) not in known.adjoint]
    if not new:
        return
    few = layout if is_hooked(model) else excerpt(layout, PROOF_TOKENS)
    generator = torch.Generator().manual_seed(0)
    try:
        precision = "model" if options.precision == "mixed" else options.precision
        net = _opened(model, known, few._replace(positions="all"), new, forms, KernelOptions(precision=precision))
        for layer in new:
            rows = net._maps[layer].rows
            u = torch.randn(len(rows), 2, rows.shape[1], generator=generator, device="cpu").to(rows)
            v = torch.randn(len(rows), 2, net._maps[layer].widths[layer], generator=generator, device="cpu").to(rows)
            moved, pulled = net.pushforward(v, layer).to(u.device), net.pullback(u, layer).to(u.device)
            left = torch.einsum("bix,bjx->bij", in_float64(u), in_float64(moved))
            right = torch.einsum("bid,bjd->bij", in_float64(pulled), in_float64(v))
            gap = float((left - right).norm() / right.norm().clamp(min=1e-30))
            budget = budget_of(model, layer, known).scores
            if bool(right.isfinite().all()) and not gap <= budget:
                raise ValueError(
                    f"at {layer} the forward derivatives are {gap:.1e} away from the backward ones, more than "
                    f"{budget:.0e}; use estimator topk"
                )
            known.adjoint.add((layer, forms[layer].key))
    except (StructureChanged, RuntimeError, NotImplementedError, TypeError) as error:
        if is_out_of_memory(error) or is_our_fault(error):
            raise
        raise ValueError(
            f"this model has no forward derivatives ({type(error).__name__}: {str(error).splitlines()[0][:160]}); use "
            "estimator topk"
        ) from error
