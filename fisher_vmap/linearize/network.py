"""The upper network as the linear map J that it is to first order, with its two products open to any vectors.

J = dh / dtheta for each prompt: theta a bias at a hooked layer, h the last token's residual stream after the last
block, before the final norm. `pullback` is J^T times vectors, `pushforward` is J times vectors. Where a model's head
cannot be told from the rest of it, h is its logits.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fisher_vmap.linearize.audit import Found, plan_audit, remember_reach, why_wrong
from fisher_vmap.linearize.compare import budget_of
from fisher_vmap.linearize.output import Metric, metric
from fisher_vmap.linearize.probe import Choice, Probe, differentiable, excerpt
from fisher_vmap.linearize.select import choose_forms, give_up
from fisher_vmap.linearize.upper import Choices, Upper, open_upper
from fisher_vmap.model.layout import Layout, as_given, batches_apart
from fisher_vmap.model.patches import autocast_off
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.recording import StructureChanged
from fisher_vmap.model.validation import check_tensor, is_out_of_memory
from fisher_vmap.model.wrappers import is_hooked

AUDITED = 2  # of the likeliest tokens that are read off for the audit
PROOF_TOKENS = 64  # of each of the two prompts that J and J^T are compared on


class OneAtATime(ValueError):
    """The prompts of a batch cannot be linearised together."""


class LinearizedNetwork:
    """J = dh / dtheta of one batch of prompts, for each hooked layer: `FisherModel.linearize` makes it.

    theta is the bias at the hooked layer, h the last token's residual stream after the last block, before the final
    norm.
    """

    def __init__(self, uppers: Mapping[str, Upper]) -> None:
        self._uppers = dict(uppers)
        self._metrics: dict[int, Metric] = {}

    @property
    def layers(self) -> list[str]:
        """The names of the hooked layers."""
        return list(self._uppers)

    @property
    def output(self) -> Tensor:
        """The h of each prompt at bias zero, [B, D]; [B, V] where h is the logits."""
        return next(iter(self._uppers.values())).rows

    @autocast_off()
    def pullback(
        self, cotangents: Tensor | None = None, layer: str | None = None, *, token_ids: Tensor | None = None
    ) -> Tensor:
        """J^T u for each cotangent u of h; or the scores of tokens, J^T (d log p_t / dh).

        Args:
            cotangents: [B, K, D], any K.
            layer: which hooked layer's J; may be left out where there is one.
            token_ids: [B, K] int64, in place of cotangents: the gradients of the log p of these tokens.

        Returns:
            [B, K, D], the gradients of u . h, or of log p, with respect to the bias; float32 or wider.

        Raises:
            ValueError: shapes that do not fit, a layer that is not hooked, or not exactly one of the two is given.
        """
        name = self._layer(layer)
        if (cotangents is None) == (token_ids is None):
            raise ValueError("pullback takes either cotangents or token_ids; give one of the two")
        if cotangents is None:
            cotangents = self._token_rows(name, token_ids)
        self._check(cotangents, self._uppers[name].rows.shape[-1])
        return self._uppers[name].pull(cotangents, [name])[name].gradients

    @autocast_off()
    def pushforward(self, tangents: Tensor, layer: str | None = None, *, token_ids: Tensor | None = None) -> Tensor:
        """J v for each direction v of the bias; or what v does to the log-probabilities of tokens.

        Args:
            tangents: [B, K, D], any K.
            layer: at which hooked layer the bias is; may be left out where there is one.
            token_ids: [B, n] int64: give the derivatives of the log p of these tokens in place of those of h.

        Returns:
            [B, K, D], the derivatives of h along v; or [B, K, n], those of log p. float32 or wider.

        Raises:
            ValueError: shapes that do not fit, or a layer that is not hooked.
        """
        name = self._layer(layer)
        self._check(tangents, self._uppers[name].widths[name])
        moved_BKX = self._uppers[name].push(tangents, name)
        if token_ids is None:
            return moved_BKX
        return torch.einsum("bkx,bnx->bkn", moved_BKX, self._token_rows(name, token_ids).to(moved_BKX))

    @autocast_off()
    def metric(self, layer: str | None = None) -> Metric:
        """The output metric C at h, with which F = J^T C J is the Fisher matrix of the whole vocabulary."""
        upper = self._uppers[self._layer(layer)]
        if id(upper) not in self._metrics:
            with torch.no_grad():
                self._metrics[id(upper)] = metric(upper.head, upper.rows)
        return self._metrics[id(upper)]

    def sharing(self) -> list[Upper]:
        """The upper networks behind the layers: those of one form share a forward pass and their pullbacks."""
        return list({id(upper): upper for upper in self._uppers.values()}.values())

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
        if layer is None and len(self._uppers) == 1:
            return next(iter(self._uppers))
        if layer is None or layer not in self._uppers:
            raise ValueError(f"layer is {layer!r}; expected one of the hooked layers, {self.layers}")
        return layer

    def _check(self, vectors: Tensor, width: int) -> None:
        B = len(self.output)
        check_tensor("the vectors", vectors, f"[{B}, K, {width}]")
        if vectors.dim() != 3 or vectors.shape[0] != B or vectors.shape[2] != width:
            raise ValueError(f"the vectors have shape {tuple(vectors.shape)}; expected [{B}, K, {width}]")


def linearize(
    model: nn.Module,
    known: Probe,
    layout: Layout,
    layers: Sequence[str],
    *,
    positions: str | Tensor = "all",
    chunk_size: int | None = None,
    kernel: str = "auto",
    precision: str = "auto",
    audit: str = "auto",
    vectors: int = 16,
) -> LinearizedNetwork:
    """Open the upper network of a batch, in the form that each layer is trusted with; the model must be `as_it_is`.

    Args:
        model: the causal LM.
        known: what the probe found.
        layout: the batch, padded.
        layers: the names of the hooked layers.
        positions: where the bias is added.
        chunk_size: vectors at a time.
        kernel: the form asked for.
        precision: as for `fisher_scores`.
        audit: as for `fisher_scores`.
        vectors: about how many will be pulled and pushed.

    Raises:
        OneAtATime: the prompts can be computed one at a time alone.
        ValueError: no form of the model has both products, or they are not adjoint to each other.
    """
    precision = choose_precision(model, precision).name
    if len(batches_apart(model, layout.lengths)) > 1:
        raise ValueError(
            "this model's rotary embedding depends on the longest prompt of a batch, and these prompts would differ: "
            "linearise those that are longer than the model was first trained on one at a time"
        )
    while True:
        with differentiable(model):
            forms = choose_forms(model, known, layout, layers, kernel)
            _prove(model, known, layout, layers, forms, precision)
        net = _opened(model, known, layout, layers, forms, Choices(positions, chunk_size, precision))
        plan = plan_audit(model, known, layout, forms, vectors, audit)
        wrong: dict[str, str] = {}
        if plan.scores or plan.log_probs:
            for upper in net.sharing():
                found = _found(upper, scores=bool(plan.scores))
                wrong |= why_wrong(model, known, layout, found, plan, positions)
        if not wrong:
            remember_reach(known, kernel, forms, layout, plan)
            return net
        with differentiable(model):
            give_up(model, known, layout, kernel, wrong)


def _found(upper: Upper, scores: bool) -> Found:
    """The likeliest tokens of each prompt, and their scores where these are wanted, for the audit."""
    reading = upper.head.read(upper.rows, AUDITED, None)
    summed = upper.pull(reading.cotangents.transpose(0, 1)) if scores else {}
    device = upper.layout.device
    gradients = {layer: summed[layer].gradients if scores else upper.rows[:, :0] for layer in upper.layers}
    return Found(reading.log_probs.to(device), reading.token_ids.to(device), gradients, upper.residual_norm, True)


def _opened(
    model: nn.Module,
    known: Probe,
    layout: Layout,
    layers: Sequence[str],
    forms: Mapping[str, Choice],
    choices: Choices,
) -> LinearizedNetwork:
    uppers: dict[str, Upper] = {}
    for key in dict.fromkeys(forms[layer].key for layer in layers):
        group = [layer for layer in layers if forms[layer].key == key]
        choice = forms[group[0]]
        if choice.prompts == "alone" and len(layout.lengths) > 1:
            raise OneAtATime(f"these prompts can only be linearised one at a time ({choice.why}); give one a batch")
        stands = as_given(layout) if choice.prompts == "given" else layout
        upper = open_upper(choice.form, model, known.under(choice.attention), stands, group, choices)
        uppers |= dict.fromkeys(group, upper)
    return LinearizedNetwork({layer: uppers[layer] for layer in layers})


def _prove(
    model: nn.Module, known: Probe, layout: Layout, layers: Sequence[str], forms: Mapping[str, Choice], precision: str
) -> None:
    """U . (J v) = (J^T u) . v on an excerpt of the batch, once for each layer and form."""
    new = [layer for layer in layers if (layer, forms[layer].key) not in known.adjoint]
    if not new:
        return
    few = layout if is_hooked(model) else excerpt(layout, PROOF_TOKENS)
    generator = torch.Generator().manual_seed(0)
    try:
        net = _opened(model, known, few, new, forms, Choices(precision="model" if precision == "mixed" else precision))
        for layer in new:
            upper = net._uppers[layer]
            rows = upper.rows
            u = torch.randn(len(rows), 2, rows.shape[1], generator=generator, device="cpu").to(rows)
            v = torch.randn(len(rows), 2, upper.widths[layer], generator=generator, device="cpu").to(rows)
            moved, pulled = net.pushforward(v, layer).to(u.device), net.pullback(u, layer).to(u.device)
            left = torch.einsum("bix,bjx->bij", u.double(), moved.double())
            right = torch.einsum("bid,bjd->bij", pulled.double(), v.double())
            gap = float((left - right).norm() / right.norm().clamp(min=1e-30))
            budget = budget_of(model, layer, known).scores
            if bool(right.isfinite().all()) and not gap <= budget:
                raise ValueError(
                    f"at {layer} the forward derivatives are {gap:.1e} away from the backward ones, more than "
                    f"{budget:.0e}; use estimator topk"
                )
            known.adjoint.add((layer, forms[layer].key))
    except (StructureChanged, RuntimeError, NotImplementedError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"this model has no forward derivatives ({type(error).__name__}: {str(error).splitlines()[0][:160]}); use "
            "estimator topk"
        ) from error
