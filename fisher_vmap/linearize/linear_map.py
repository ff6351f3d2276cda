"""`LinearMap`: J = dh / dtheta of one batch, for any number of products by J and J^T.

theta is a bias at a hooked layer, h the last block's output at the targets of each prompt: its last token, unless the
layout says otherwise. `pull` is J^T times cotangents, `push` is J times directions. `blockwise` and `whole` are the two
ways to compute them. The bias is one vector for all positions, so its gradient is a sum over positions. Choosing
tokens, estimators and text are left to other modules.

`KernelOptions` holds the arguments that all public functions share. The model is computed in contexts that restore it
afterwards: `as_it_is` changes nothing that the model computes, and plain autograd, the reference, runs in it;
`differentiable` makes every layer one that `torch.func` can transform; `undisturbed` is both.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from fisher_vmap.kernels.hf_attention import attention_set_to, prompts_packed
from fisher_vmap.kernels.quantized import quantized_pullbacks
from fisher_vmap.linearize.block import Arrived
from fisher_vmap.linearize.model_info import Parts
from fisher_vmap.linearize.residual_norms import residual_norm
from fisher_vmap.model.head import Head
from fisher_vmap.model.layout import Layout
from fisher_vmap.model.offload import placed, weights_ready
from fisher_vmap.model.patches import OldFunction, autocast_off, experts_apart, modernised, one_at_a_time, own_forwards
from fisher_vmap.model.precision import choose_precision
from fisher_vmap.model.recording import primals_checked_together
from fisher_vmap.model.rope_scaling import forget_lengths
from fisher_vmap.model.validation import check_whole
from fisher_vmap.model.widening import in_float32

log = logging.getLogger(__name__)

_INSIDE: ContextVar[frozenset[tuple[str, int]]] = ContextVar("inside", default=frozenset())

Found = TypeVar("Found")

KERNELS = ("auto", "layerwise", "whole", "loop")
AUDITS = ("auto", "always", "off")


@contextmanager
def as_it_is(model: nn.Module, precision: str = "model") -> Iterator[None]:
    """The model in evaluation mode and the chosen precision, otherwise unchanged; every module is restored afterwards.

    Threads that compute on the same model wait for each other here. `precision` is as `choose_precision` returns it.
    """
    widened = in_float32(model) if precision == "float32" else nullcontext()
    with _entering("as_it_is", model) as first:
        if not first:
            with widened:
                yield
            return
        with one_at_a_time(model):
            training = [module for module in model.modules() if module.training]
            try:
                model.eval()
                with autocast_off(), own_forwards(model), widened:
                    yield
            finally:
                for module in training:
                    module.training = True


@contextmanager
def undisturbed(model: nn.Module, precision: str = "model") -> Iterator[None]:
    """`as_it_is` and `differentiable` together."""
    with as_it_is(model, precision), differentiable(model):
        yield


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within the context `torch.func` can transform every layer, and inputs and weights are moved by this package."""
    with _entering("differentiable", model) as first:
        if not first:
            yield
            return
        with placed(model), quantized_pullbacks(model), experts_apart(model):
            yield


@contextmanager
def _entering(context: str, owner: object) -> Iterator[bool]:
    """Whether this thread enters a context for the first time: inside it, entering it again has nothing to do."""
    key, inside = (context, id(owner)), _INSIDE.get()
    token = _INSIDE.set(inside | {key})
    try:
        yield key not in inside
    finally:
        _INSIDE.reset(token)


@dataclass(frozen=True, kw_only=True)
class KernelOptions:
    """How the linear map is computed.

    Attributes:
        positions: where the bias is added: "all", "last" (the last real token) or a mask [B, T].
        targets: whose next-token distribution is read: "last", "all" or a mask [B, T].
        kernel: "auto", or a form by name: "layerwise", "whole" or "loop".
        chunk_size: how many vectors to pull or push at a time; None: as many as suit the device.
        precision: the format to compute in, from the same weights: "model", their own; "float32"; "mixed", only the
            forward in float32; or "auto", float32 if this processor is faster in it, else "model".
        audit: how often results are compared with the unchanged model and plain autograd: "auto", rarely enough to cost
            next to nothing; "always", in every call; "off", only when a batch is larger than any proven one.

    Raises:
        ValueError: a value is not one of these.
    """

    positions: str | Tensor = "all"
    targets: str | Tensor = "last"
    kernel: str = "auto"
    chunk_size: int | None = None
    precision: str = "auto"
    audit: str = "auto"

    def __post_init__(self) -> None:
        """Check the values that need no model."""
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {self.kernel!r}; expected 'auto', 'layerwise', 'whole' or 'loop'")
        if self.audit not in AUDITS:
            raise ValueError(f"audit is {self.audit!r}; expected 'auto', 'always' or 'off'")
        if self.chunk_size is not None:
            check_whole("chunk_size", self.chunk_size, 1)

    def on(self, model: nn.Module) -> "KernelOptions":
        """The same options with precision "auto" resolved for this model and processor."""
        return replace(self, precision=choose_precision(model, self.precision).name)


class CommonOptions(TypedDict, total=False):
    """`KernelOptions` as keyword arguments, without targets."""

    positions: str | Tensor
    kernel: str
    chunk_size: int | None
    precision: str
    audit: str


class Options(CommonOptions, total=False):
    """`KernelOptions` as keyword arguments."""

    targets: str | Tensor


class Summed(NamedTuple):
    """The result of a pull at one layer.

    Attributes:
        gradients: [B, K, D], float32 or wider.
        energy: [B, T] in the caller's columns: sum_k w_k |J_pos^T u_k|^2, with J_pos the map of that position alone.
    """

    gradients: Tensor
    energy: Tensor


class Derived(NamedTuple):
    """One more cotangent for each prompt, a combination of the pulled ones, so that only its energy is computed.

    Attributes:
        combination: [B, K], its coefficients.
        weight: [B], the weight of its energy.
    """

    combination: Tensor
    weight: Tensor


class LinearMap(ABC):
    """J of one batch for some hooked layers, in one form.

    Attributes:
        layout: the batch, with its targets and its biased positions.
        live: the layout of the rows at which `_pull` and `_push` take vectors: all of the batch, or the live ones.
        layers: the names of the hooked layers.
        rows: [M, X], h at the targets, or the logits there.
        dtype: the format of the vectors that are pulled and pushed.
        head: the function of the rows.
        residual_norm: for each layer, [B], the median norm of its output over the prompt's tokens.
        widths: D of each layer.
    """

    rows: Tensor
    dtype: torch.dtype
    head: Head
    residual_norm: dict[str, Tensor]
    widths: dict[str, int]
    _at_once = False  # whether all weights of the model are needed at the same time

    def __init__(
        self,
        model: nn.Module,
        parts: Parts,
        attention: str | None,
        layout: Layout,
        layers: Sequence[str],
        options: KernelOptions,
        *,
        vectors: int | None = None,
    ) -> None:
        """Prepare a map; `open` runs the model.

        `attention` is the implementation that the model runs under, None for its own. The precision of `options` must
        be resolved. `vectors` announces a single pull, of so many, and no push: memory is freed on the way.
        """
        self.layout, self.live, self.layers = layout, layout, list(layers)
        self._model, self._parts, self._attention = model, parts, attention
        self._chunk_size, self._precision, self._vectors = options.chunk_size, options.precision, vectors
        self.note: Callable[[str, str], None] = lambda _what, line: log.info(line)  # reports a slower path taken

    @property
    def model(self) -> nn.Module:
        """The model, without its wrapper."""
        return self._model

    def open(self) -> None:
        """Run the model."""
        with self.prepared():
            forget_lengths(self._model)
            self._open()

    def pull(
        self,
        cotangents_MKX: Tensor,
        layers: Collection[str] | None = None,
        weights_BK: Tensor | None = None,
        derived: Derived | None = None,
    ) -> dict[str, Summed]:
        """J^T u for each of K cotangents u, at several layers in one pass.

        Args:
            cotangents_MKX: [M, K, X], the cotangents at the targets.
            layers: which layers; None: all.
            weights_BK: [B, K], the weights of the energy; None: ones.
            derived: one more cotangent, whose energy is added.
        """
        unit_KMX, norm_KB = self._unit_fields(cotangents_MKX.transpose(0, 1))
        weights_BK = torch.ones_like(norm_KB.T) if weights_BK is None else weights_BK
        mask_N = self.live.bias_mask()

        def summed(cotangents: Tensor) -> Summed:
            layout = self.live
            found = sum_positions(cotangents, layout, norm_KB, weights_BK, mask_N)
            energy_N = found.energy
            if derived is not None:
                energy_N = energy_N + energy_of_one(cotangents, layout, norm_KB, *derived, mask_N)
            energy_BT = layout.to_caller(energy_N.to(layout.device))
            return Summed(found.gradients.to(layout.device), energy_BT)

        return self._at_layers(unit_KMX, layers, summed)

    def pull_sums(self, cotangents_MKX: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """As `pull`, the gradients [B, K, D] alone."""
        unit_KMX, norm_KB = self._unit_fields(cotangents_MKX.transpose(0, 1))
        mask_N = self.live.bias_mask()
        if mask_N is not None and bool(mask_N.all()):
            mask_N = None  # as where the live rows are those of the bias: no copy of all cotangents at each layer

        def summed(cotangents: Tensor) -> Tensor:
            return sum_of_positions(cotangents, self.live, norm_KB, mask_N).to(self.live.device)

        return self._at_layers(unit_KMX, layers, summed)

    def _at_layers(
        self, unit_KMX: Tensor, layers: Collection[str] | None, made: Callable[[Tensor], Found]
    ) -> dict[str, Found]:
        """For each layer what `made` makes of the cotangents at its live rows, [b, n, K, D], of all its calls."""
        pending: dict[str, Tensor] = {}
        found: dict[str, Found] = {}
        wanted = set(self.layers if layers is None else layers)
        called_often = {layer for layer in wanted if self._parts.call_order.count(layer) > 1}
        with self.prepared(), primals_checked_together(), closing(self._pull(unit_KMX)) as arrivals:
            for layer, arrived in arrivals:
                if layer in wanted:
                    pending[layer] = arrived + pending[layer] if layer in pending else arrived
                    if layer not in called_often:
                        found[layer] = made(pending.pop(layer))
                if set(found) == wanted:
                    break  # no layer further down is asked for
        return found | {layer: made(arrived) for layer, arrived in pending.items()}

    def push(self, tangents_BKD: Tensor, layer: str) -> Tensor:
        """J v for each direction v of the bias, [B, K, D] -> [M, K, X], float32 or wider."""
        length_BK = torch.linalg.vector_norm(tangents_BKD, dim=-1)
        unit_BKD = tangents_BKD / length_BK.clamp(min=torch.finfo(length_BK.dtype).tiny)[..., None]
        with self.prepared(), primals_checked_together():
            moved_KMX = self._push(layer, self.live.at_bias(unit_BKD.to(self.dtype)))
        wide = torch.promote_types(moved_KMX.dtype, torch.float32)
        prompt_M = self.layout.prompt_of_target(length_BK.device)
        length_MK = length_BK if prompt_M is None else length_BK[prompt_M]
        scaled: Tensor = moved_KMX.transpose(0, 1).to(length_MK.device, wide) * length_MK[..., None].to(wide)
        return scaled

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """The model prepared to run its parts; entering once around several products saves time."""
        with _entering("prepared", self) as first, ExitStack() as stack:
            if not first:
                yield
                return
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(undisturbed(self._model, self._precision))
            if self._at_once:
                stack.enter_context(weights_ready(self._model))
            stack.enter_context(attention_set_to(self._model, self._attention))
            stack.enter_context(prompts_packed(self.layout))
            stack.enter_context(modernised(self._old_functions()))
            yield

    def _unit_fields(self, cotangents_KMX: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents scaled to unit norm, so that low precision keeps its digits, and the norms [K, B] to undo it."""
        norm_KM = torch.linalg.vector_norm(cotangents_KMX, dim=-1)
        prompt_M = self.layout.prompt_of_target(norm_KM.device)
        norm_KB = norm_KM
        if prompt_M is not None:  # all targets of a prompt share a scale
            squared_KB = norm_KM.new_zeros(len(norm_KM), len(self.layout.lengths))
            norm_KB = squared_KB.index_add_(1, prompt_M, norm_KM.square()).sqrt()
            norm_KM = norm_KB[:, prompt_M]
        return cotangents_KMX / norm_KM.clamp(min=torch.finfo(norm_KM.dtype).tiny)[..., None], norm_KB

    def _describe(self, outputs: dict[str, Tensor]) -> None:
        self.residual_norm = {layer: residual_norm(hidden, self.layout) for layer, hidden in outputs.items()}
        self.widths = {layer: hidden.shape[-1] for layer, hidden in outputs.items()}

    def _old_functions(self) -> Sequence[OldFunction]:
        return self._parts.old_functions

    @abstractmethod
    def _open(self) -> None:
        """Run the model; set rows, dtype and head, and describe the layers' outputs."""

    @abstractmethod
    def _pull(self, unit_KMX: Tensor) -> Generator[Arrived, None, None]:
        """Yield the cotangents at the live rows of each layer, [b, n, K, D], once for each call of the layer."""

    @abstractmethod
    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        """From tangents of the bias at the live rows, [b, n, K, D], to those of h, [K, M, X]."""


def sum_positions(
    cotangents: Tensor, layout: Layout, norm_KB: Tensor, probs_BK: Tensor, mask_N: Tensor | None
) -> Summed:
    """Sum over each prompt's biased positions, in float32, and undo the scaling of the cotangents.

    `cotangents` is [b, T, K, D] in the model's dtype, zero at padding; `norm_KB` are the norms by which they were
    divided, `probs_BK` the weights of the energy, `mask_N` the positions of the bias, or None for all.
    """
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    gradients_BKD = sum_of_positions(cotangents, layout, norm_KB, mask_N)
    squared_NK = torch.linalg.vector_norm(cotangents.flatten(0, 1), dim=-1, dtype=wide) ** 2
    if mask_N is not None:
        squared_NK = squared_NK * mask_N.to(squared_NK)[:, None]
    weight_BK = probs_BK.to(device, wide) * norm_KB.T.to(device, wide) ** 2
    energy_N = squared_NK.new_zeros(len(squared_NK))
    for b, (first, stop) in enumerate(layout.ranges()):
        energy_N[first:stop] = squared_NK[first:stop] @ weight_BK[b]
    return Summed(gradients_BKD, energy_N)


def sum_of_positions(cotangents: Tensor, layout: Layout, norm_KB: Tensor, mask_N: Tensor | None) -> Tensor:
    """The gradients of `sum_positions` alone, [B, K, D]."""
    wide = torch.promote_types(cotangents.dtype, norm_KB.dtype)
    cotangents_NKD = cotangents.flatten(0, 1)
    if mask_N is not None:
        cotangents_NKD = cotangents_NKD * mask_N.to(cotangents.device, cotangents.dtype)[:, None, None]
    return layout.sum_prompts(cotangents_NKD, wide) * norm_KB.T.to(cotangents.device, wide)[:, :, None]


def energy_of_one(
    cotangents: Tensor, layout: Layout, norm_KB: Tensor, combination_BK: Tensor, weight_B: Tensor, mask_N: Tensor | None
) -> Tensor:
    """The energy of each row, [N], of one `Derived` cotangent for each prompt; other arguments as `sum_positions`."""
    device, wide = cotangents.device, torch.promote_types(cotangents.dtype, norm_KB.dtype)
    cotangents_NKD = cotangents.flatten(0, 1)
    factor_BK = (combination_BK.to(norm_KB.device) * norm_KB.T).to(device, wide)
    energy_N = cotangents_NKD.new_zeros(len(cotangents_NKD), dtype=wide)
    for b, (first, stop) in enumerate(layout.ranges()):
        row_nD = torch.einsum("nkd,k->nd", cotangents_NKD[first:stop].to(wide), factor_BK[b])
        energy_N[first:stop] = row_nD.square().sum(1) * weight_B[b].to(device, wide)
    return energy_N if mask_N is None else energy_N * mask_N.to(device, wide)
