"""The upper network of one batch, linearised in one of its forms, for as many products by J and J^T as are wanted."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from fisher_vmap.kernels.hf_attention import UnsupportedAttention, attention_set_to, prompts_packed
from fisher_vmap.linearize.block import Arrived
from fisher_vmap.linearize.blockwise import pullback_layers, pushforward_layer, record_forward, rows_and_head
from fisher_vmap.linearize.positions import Summed, position_mask, residual_norm, sum_positions, unit_rows
from fisher_vmap.linearize.probe import Probe, undisturbed
from fisher_vmap.linearize.whole import hooked_outputs, pullback_whole, with_biases, zero_biases
from fisher_vmap.model.head import Head
from fisher_vmap.model.layers import hooked
from fisher_vmap.model.layout import Layout, forget_lengths, pack_rows
from fisher_vmap.model.offload import weights_ready
from fisher_vmap.model.patches import modernised


class Choices(NamedTuple):
    """What the caller may choose of an upper network.

    Attributes:
        positions: where the bias is added.
        chunk_size: vectors at a time.
        precision: "model", "float32", or "mixed": the forward alone in float32.
    """

    positions: str | Tensor = "all"
    chunk_size: int | None = None
    precision: str = "model"


class Upper(ABC):
    """J of one batch for some hooked layers, in one form.

    Attributes:
        layout: the batch.
        layers: the names of the hooked layers.
        rows: [B, X], h: the last row's residual stream after the last block, or the logits.
        dtype: of what is pulled and pushed.
        head: what reads them.
        residual_norm: for each layer, [B].
        widths: D of each layer.
    """

    rows: Tensor
    dtype: torch.dtype
    head: Head
    residual_norm: dict[str, Tensor]
    widths: dict[str, int]
    _at_once = False  # whether all of the model's weights are needed at a time

    def __init__(
        self,
        model: nn.Module,
        known: Probe,
        layout: Layout,
        layers: Sequence[str],
        choices: Choices,
    ) -> None:
        self.layout, self.layers = layout, list(layers)
        self._model, self._known = model, known
        self._chunk_size, self._precision = choices.chunk_size, choices.precision
        self._mask_N = position_mask(choices.positions, layout)
        with self._prepared():
            forget_lengths(model)
            self._open()

    def pull(
        self, cotangents_BKX: Tensor, layers: Collection[str] | None = None, weights_BK: Tensor | None = None
    ) -> dict[str, Summed]:
        """J^T u for each cotangent u of h, at several layers in one pass.

        Args:
            cotangents_BKX: [B, K, X].
            layers: which; None: all.
            weights_BK: of the position energy, sum_k w_k |J_pos^T u_k|^2; None: ones.

        Returns:
            For each layer the gradients, [B, K, D], and the energy of each position in the caller's columns, [B, T].
        """
        unit_KBX, norm_KB = unit_rows(cotangents_BKX.transpose(0, 1))
        weights_BK = torch.ones_like(norm_KB.T) if weights_BK is None else weights_BK
        pending: dict[str, Tensor] = {}
        found: dict[str, Summed] = {}

        def finish(layer: str) -> None:
            summed = sum_positions(pending.pop(layer), self.layout, norm_KB, weights_BK, self._mask_N)
            device = self.layout.device
            found[layer] = Summed(summed.gradients.to(device), self.layout.to_caller(summed.energy.to(device)))

        wanted = set(self.layers if layers is None else layers)
        called_often = {layer for layer in wanted if self._known.parts.call_order.count(layer) > 1}
        with self._prepared(), closing(self._pull(unit_KBX)) as arrivals:
            for layer, _hidden, arrived in arrivals:
                if layer in wanted:
                    pending[layer] = arrived + pending[layer] if layer in pending else arrived
                    if layer not in called_often:
                        finish(layer)
                if set(found) == wanted:
                    break  # further down there is nothing that is asked for
        for layer in list(pending):
            finish(layer)
        return found

    def push(self, tangents_BKD: Tensor, layer: str) -> Tensor:
        """J v for each direction v of the bias, [B, K, D] -> [B, K, X], in float32 or wider."""
        length_BK = torch.linalg.vector_norm(tangents_BKD, dim=-1)
        unit_BKD = tangents_BKD / length_BK.clamp(min=torch.finfo(length_BK.dtype).tiny)[..., None]
        with self._prepared():
            moved_KBX = self._push(layer, self.layout.everywhere(unit_BKD.to(self.dtype), self._mask_N))
        wide = torch.promote_types(moved_KBX.dtype, torch.float32)
        moved_BKX: Tensor = moved_KBX.transpose(0, 1).to(length_BK.device, wide)
        scaled: Tensor = moved_BKX * length_BK[..., None].to(wide)
        return scaled

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model as it must be while its parts are run."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(undisturbed(self._model, self._precision))
            if self._at_once:
                stack.enter_context(weights_ready(self._model))
            stack.enter_context(attention_set_to(self._model, self._known.attention))
            stack.enter_context(prompts_packed(self.layout))
            stack.enter_context(modernised(self._known.parts.old_functions))
            yield

    def _describe(self, outputs: dict[str, Tensor]) -> None:
        self.residual_norm = {layer: residual_norm(hidden, self.layout) for layer, hidden in outputs.items()}
        self.widths = {layer: hidden.shape[-1] for layer, hidden in outputs.items()}

    @abstractmethod
    def _open(self) -> None:
        """Run the model; set rows, dtype and head, and describe the layers' outputs."""

    @abstractmethod
    def _pull(self, unit_KBX: Tensor) -> Generator[Arrived, None, None]:
        """What arrives at each layer, [b, T, K, D]; at a block that is called several times, once for each call."""

    @abstractmethod
    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        """Tangents of the bias at every position, [b, T, K, D], to those of h, [K, B, X]."""


class Blockwise(Upper):
    """One block at a time, from a recorded forward."""

    def _open(self) -> None:
        parts, layout = self._known.parts, self.layout
        assert parts.head is not None
        first = min(parts.call_order.index(layer) for layer in self.layers) + 1
        self._recording = record_forward(self._model, parts, layout, first, self._precision)
        self.rows, self.head, self.dtype = layout.last(self._recording.top), parts.head, self._recording.dtype
        calls = self._recording.calls
        outputs = [*(call.hidden for call in calls), self._recording.top]
        names = [self._recording.below, *(call.name for call in calls)]
        last_outputs = dict(zip(names, outputs, strict=True))
        self._describe({layer: last_outputs[layer] for layer in self.layers})

    def _pull(self, unit_KBX: Tensor) -> Generator[Arrived, None, None]:
        recording = self._recording.copy()
        return pullback_layers(self._known.parts, recording, self.layout, self.layers, unit_KBX, self._chunk_size)

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        return pushforward_layer(self._known.parts, self._recording, self.layout, layer, tangents, self._chunk_size)


class Whole(Upper):
    """The whole upper network in one piece."""

    _at_once = True

    def _open(self) -> None:
        if self._precision == "mixed":
            raise ValueError(
                f"precision {self._precision} needs the layerwise kernel, which {self.layers[0]} cannot have; "
                "use precision float32"
            )
        modules = hooked(self._model, self.layers)
        run, self.head = rows_and_head(self._model, self._known.parts, self.layout, modules)
        self._outputs = hooked_outputs(run, modules, self.layout)
        self._zeros = zero_biases(self._outputs)
        self._function = with_biases(run, modules)
        rows, self._pullback = pullback_whole(self._function, self._zeros)
        self.rows, self.dtype = rows.detach(), rows.dtype
        self._describe(self._outputs)

    def _pull(self, unit_KBX: Tensor) -> Generator[Arrived, None, None]:
        arrived = self._pullback(unit_KBX.to(self.rows.dtype), self._chunk_size)
        for layer, hidden in self._outputs.items():
            yield Arrived(layer, hidden, arrived.pop(layer))

    def _push(self, layer: str, tangents: Tensor) -> Tensor:
        def push(tangent: Tensor) -> Tensor:
            moved = {other: torch.zeros_like(zero) for other, zero in self._zeros.items()}
            moved[layer] = tangent
            return jvp(self._function, (self._zeros,), (moved,))[1]  # type: ignore[no-any-return]

        moved: Tensor = vmap(push, in_dims=2, chunk_size=self._chunk_size)(tangents.to(self._zeros[layer]))
        return moved


def open_upper(
    form: str,
    model: nn.Module,
    known: Probe,
    layout: Layout,
    layers: Sequence[str],
    choices: Choices,
) -> Upper:
    """The upper network in the form of that name; a batch that cannot be packed is padded instead, to the same result.

    Raises:
        ValueError: the form is the loop, which has no derivatives but one backward pass at a time.
    """
    if form == "loop":
        raise ValueError(
            "the kernel of this model is the loop, plain autograd token by token, so that its upper network cannot be "
            "linearised: use estimator topk"
        )
    if form == "packed":
        try:
            return Blockwise(model, known, pack_rows(layout), layers, choices)
        except UnsupportedAttention:
            form = "layerwise"
    kind = Blockwise if form == "layerwise" else Whole
    return kind(model, known, layout, layers, choices)
