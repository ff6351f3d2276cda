"""The networks of prompts at any point theta of a hooked layer: of an open network, or of prompts in batches."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_vmap.data.conversations import SkippedPrompt
from fisher_vmap.data.sequences import Tokens, masked, padded, tokens_of
from fisher_vmap.estimators import TRACE_SAMPLES
from fisher_vmap.fisher import prompt_seeds
from fisher_vmap.fisher_model import FisherModel
from fisher_vmap.linearize.linear_map import LinearMap, undisturbed
from fisher_vmap.linearize.network import LinearizedNetwork
from fisher_vmap.linearize.output import Asked, Distribution, Probes, distribution
from fisher_vmap.linearize.probe import layer_widths
from fisher_vmap.model.layers import decoder_blocks, resolve_layers
from fisher_vmap.model.targets import grid_of, target_seeds
from fisher_vmap.model.wrappers import names_inside
from fisher_vmap.steering import at_point


class Point(NamedTuple):
    """The network of a batch, opened at a point.

    Attributes:
        net: its linear map.
        c: the distribution at the targets, with the likeliest tokens read and random vectors for all others.
    """

    net: LinearMap
    c: Distribution


def _point(net: LinearMap, top_k: int) -> Point:
    seeds = target_seeds(net.layout, grid_of(net.layout), prompt_seeds(net.layout))
    asked = Asked(top_k, probes=Probes(TRACE_SAMPLES, seeds), of_rest=True)
    with net.prepared():
        return Point(net, distribution(net.head, net.rows, asked))


class OneNetwork:
    """An open network in place of a model and prompts; at its end it runs its model again."""

    tokenizer, top_k = None, 10

    def __init__(self, network: LinearizedNetwork, layer: str | int | None) -> None:
        maps = {name: net for net in network.maps() for name in net.layers}
        if layer is None and len(maps) == 1:
            layer = next(iter(maps))
        if not isinstance(layer, str) or layer not in maps:
            raise ValueError(f"layer is {layer!r}; expected one of the hooked layers, {list(maps)}")
        net, self.layer = copy.copy(maps[layer]), layer
        _check_inside_blocks(net.model, layer)
        net.layers = [layer]
        self.width, self.dtype, self.positions = net.widths[layer], net.dtype, net.layout.positions
        self._first = _point(net, self.top_k)

    def points(self, theta_D: Tensor) -> Iterator[Point]:
        """The network at a point."""
        if not bool(theta_D.any()):
            yield self._first
            return
        with at_point(self._first.net.model, self.layer, theta_D):
            there = copy.copy(self._first.net)
            there.open()
            yield _point(there, self.top_k)


def _check_inside_blocks(model: nn.Module, layer: str) -> None:
    """Raise ValueError for a module around the decoder blocks, such as the final norm, which no run of them calls."""
    blocks = list(decoder_blocks(model))
    if not any(layer == block or layer.startswith(f"{block}.") for block in blocks):
        raise ValueError(
            f"a step at {layer}, outside of the decoder blocks, cannot be followed; take one such as {blocks[0]}"
        )


class _Batch(NamedTuple):
    """The arguments of `FisherModel.linearize`."""

    input_ids: Tensor
    attention_mask: Tensor | None
    positions: str | Tensor
    targets: str | Tensor


def _rows(fisher: FisherModel, prompts: Sequence[Any]) -> list[Tokens]:
    """The token ids of prompts, with the completions that they have or that the model writes."""
    rows: list[Tokens] = []
    for prompt, completion in fisher.pairs(prompts, None):
        try:
            if isinstance(completion, SkippedPrompt):
                raise completion
            rendered = fisher.renderer.render(prompt, completion)
        except SkippedPrompt as reason:
            raise ValueError(f"prompt {len(rows)} has nothing to compute: {reason}") from reason
        rows.append(Tokens(rendered.ids, rendered.start))
    return [row for sequences in fisher.sequences(rows) for row in sequences]


class Prompts:
    """Prompts of a FisherModel with one layer, in batches."""

    def __init__(
        self,
        fisher: FisherModel,
        prompt: Any,
        attention_mask: Tensor | None,
        positions: str | Tensor | None,
        targets: str | Tensor,
    ) -> None:
        if prompt is None or (isinstance(prompt, list | tuple) and not prompt):
            raise ValueError("no prompt was given; expected token ids, a text, messages, or several of these")
        (self.layer,) = fisher.layers
        _check_inside_blocks(fisher.model, self.layer)
        for name, value, known in (("positions", positions, ("all", "last")), ("targets", targets, ("last", "all"))):
            if isinstance(value, str) and value not in known:
                raise ValueError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}, or a mask [B, T]")
        self._fisher, self.width, self.top_k = fisher, fisher.widths[self.layer], fisher.top_k
        self.tokenizer = fisher.tokenizer
        self.positions = fisher.options.positions if positions is None else positions
        self.dtype = next(fisher.model.parameters()).dtype
        if isinstance(prompt, Tensor) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
            ids = torch.as_tensor(prompt, device=fisher.device)
            self._batches = [_Batch(ids[None] if ids.dim() == 1 else ids, attention_mask, self.positions, targets)]
        else:
            self._batches = list(self._of_text(prompt))
        self._last: tuple[Tensor, Point] | None = None

    def _of_text(self, prompt: Any) -> Iterator[_Batch]:
        """Batches of about as many tokens as the FisherModel's, in the order given."""
        one = isinstance(prompt, str | dict) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], dict))
        fisher, rows = self._fisher, _rows(self._fisher, [prompt] if one else prompt)
        while rows:
            count = 1
            while count < min(len(rows), fisher.batch_size) and tokens_of(rows[: count + 1]) <= fisher.max_batch_tokens:
                count += 1
            some, rows = rows[:count], rows[count:]
            ids, mask = padded(some, fisher.device, max(len(row.ids) for row in some))
            where, read = str(self.positions), fisher.targets
            yield _Batch(
                ids,
                mask,
                where if where in ("all", "last") else masked(some, mask, where),
                str(read) if read in ("last", "all") else masked(some, mask, "targets"),
            )

    def points(self, theta_D: Tensor) -> Iterator[Point]:
        """The networks of the batches at a point, one after the other; that of a single batch is kept."""
        moved = bool(theta_D.any())
        with at_point(self._fisher.model, self.layer, theta_D) if moved else nullcontext():
            if self._last is not None and torch.equal(self._last[0], theta_D):
                yield self._last[1]
                return
            for batch in self._batches:
                ids, mask, positions, targets = batch
                with self._fisher.linearize(ids, mask, positions=positions, targets=targets) as network:
                    (net,) = network.maps()
                    point = _point(net, self.top_k)
                if len(self._batches) == 1:
                    self._last = theta_D, point
                yield point


def one_layer(model: FisherModel | nn.Module, layer: str | int | None) -> FisherModel:
    """A FisherModel with one layer."""
    if not isinstance(model, FisherModel):
        if layer is None:
            raise ValueError("layer is missing; give the name or the number of a layer, or a FisherModel")
        return FisherModel(model, layers=[layer])
    one = copy.copy(model)
    if layer is not None:
        with undisturbed(model.model, model.precision):
            one.layers = resolve_layers(model.model, names_inside(model.model, model.model, [layer]))
        one.widths = layer_widths(model.model, one.layers)
    if len(one.layers) > 1:
        raise ValueError(f"the FisherModel has the layers {one.layers}; say with layer which one to steer")
    return one
