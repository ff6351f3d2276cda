"""The three forms of the kernel: layerwise, whole and loop. Each gives the scores of one batch; they agree to rounding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisher_vmap.head import Head, LogitsHead, Reading, UnembeddingHead
from fisher_vmap.layout import Layout
from fisher_vmap.network import pullback_blocks
from fisher_vmap.positions import sum_positions
from fisher_vmap.recording import record
from fisher_vmap.scores import Scores
from fisher_vmap.whole import (
    hooked_outputs,
    pullback_loop,
    pullback_whole,
    rows_from_blocks,
    rows_from_logits,
    with_biases,
)


@dataclass(frozen=True)
class Parts:
    """What the probe found in a model.

    Attributes:
        blocks: the decoder blocks by name.
        call_order: the names of the blocks in the order of their calls.
        head: the head taken apart; None where only the model itself can make its logits.
        vocabulary: V, the number of logits.
    """

    blocks: Mapping[str, nn.Module]
    call_order: Sequence[str]
    head: UnembeddingHead | None
    vocabulary: int


@dataclass(frozen=True)
class Wanted:
    """What is asked of a batch: K likeliest tokens or the tokens [B, K] given, and where the bias is added."""

    top_k: int
    token_ids: Tensor | None
    mask_BT: Tensor | None
    chunk_size: int | None


def layerwise(model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted) -> Scores:
    """Record one forward, read the head, and pull its cotangents through one block at a time."""
    assert parts.head is not None
    first = min(parts.call_order.index(layer) for layer in layers) + 1
    recording = record(model, parts.blocks, parts.call_order, first, layout.input_ids)
    reading = parts.head.read(layout.last(recording.top), wanted.top_k, wanted.token_ids)
    unit_KBD, norm_KB = unit_rows(reading.cotangents)
    cotangents_KBTD = layout.at_last(unit_KBD.to(recording.top.dtype))
    collected = Collected(layout, reading, norm_KB, wanted.mask_BT)
    for layer, hidden, arrived in pullback_blocks(recording, cotangents_KBTD, set(layers), wanted.chunk_size):
        collected.add(layer, hidden, arrived)
    return collected.scores(layers)


def whole(
    model: nn.Module, parts: Parts, layout: Layout, layers: Sequence[str], wanted: Wanted, *, loop: bool = False
) -> Scores:
    """One batched call of the pullback of the whole upper network; with `loop`, K backward passes of plain autograd."""
    modules = {layer: model.get_submodule(layer) for layer in layers}
    head: Head
    if parts.head is None:
        run, head = rows_from_logits(model, layout), LogitsHead()
    else:
        run, head = rows_from_blocks(model, parts.blocks, parts.call_order, layout), parts.head
    outputs = hooked_outputs(run, modules, layout)
    zeros = {layer: torch.zeros_like(hidden) for layer, hidden in outputs.items()}
    rows, pullback = (pullback_loop if loop else pullback_whole)(with_biases(run, modules), zeros)
    reading = head.read(rows, wanted.top_k, wanted.token_ids)
    unit_KBX, norm_KB = unit_rows(reading.cotangents)
    arrived = pullback(unit_KBX.to(rows.dtype), wanted.chunk_size)
    collected = Collected(layout, reading, norm_KB, wanted.mask_BT)
    for layer in layers:
        collected.add(layer, outputs[layer], arrived.pop(layer))
    return collected.scores(layers)


def unit_rows(cotangents_KBX: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents scaled to unit norm, and their norms [K, B]: low precision keeps its digits, linearity undoes it."""
    norm_KB = torch.linalg.vector_norm(cotangents_KBX, dim=-1)
    return cotangents_KBX / norm_KB.clamp(min=torch.finfo(norm_KB.dtype).tiny)[..., None], norm_KB


class Collected:
    """Gathers what arrives at each hooked layer; a layer called more than once adds up."""

    def __init__(self, layout: Layout, reading: Reading, norm_KB: Tensor, mask_BT: Tensor | None) -> None:
        self.layout, self.reading, self.norm_KB, self.mask_BT = layout, reading, norm_KB, mask_BT
        self.gradients: dict[str, Tensor] = {}
        self.energy: dict[str, Tensor] = {}
        self.residual_norm: dict[str, Tensor] = {}

    def add(self, layer: str, hidden_BTD: Tensor, cotangents_KBTD: Tensor) -> None:
        """Sum one arrival over its positions."""
        device = self.layout.lengths.device
        gradients, energy = sum_positions(cotangents_KBTD, self.norm_KB, self.reading.log_probs.exp(), self.mask_BT)
        length_BT = torch.linalg.vector_norm(hidden_BTD, dim=-1, dtype=energy.dtype).to(device)
        self.residual_norm[layer] = (length_BT * self.layout.real()).sum(1) / self.layout.lengths
        gradients, energy = gradients.to(device), self.layout.to_caller(energy.to(device))
        self.gradients[layer] = gradients + self.gradients.get(layer, 0)
        self.energy[layer] = energy + self.energy.get(layer, 0)

    def scores(self, layers: Sequence[str]) -> Scores:
        """The record, with the layers in the order given."""
        log_probs, token_ids, _ = self.reading
        device = self.layout.lengths.device
        return Scores(
            log_probs.to(device),
            token_ids.to(device),
            {layer: self.gradients[layer] for layer in layers},
            {layer: self.energy[layer] for layer in layers},
            {layer: self.residual_norm[layer] for layer in layers},
        )
