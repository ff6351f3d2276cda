"""What a step does to the next token, for `benchmarks.steering`: by plain torch, without the package's own numbers.

A step is a vector added at all positions of a prompt to the output of a block. The blocks below it need not be run
again: they are left out, and the model is given the residual stream with the step in place of the embedding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor, nn

from fisher_vmap.model.recording import hooks

AT_ONCE = 2048  # tokens in one pass
LOGITS_AT_ONCE = 2**25  # numbers in the logits of one pass


class LeftOut(nn.Module):
    """In place of a block: gives back what it was given."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """The same."""
        return hidden_states


class Site(NamedTuple):
    """A model, the names of its blocks, and the number of the block whose output gets the steps."""

    model: Any
    blocks: list[str]
    number: int

    @property
    def layer(self) -> str:
        """The block's name."""
        return self.blocks[self.number]

    @contextmanager
    def above(self) -> Iterator[None]:
        """Within the context the model begins after the block."""
        names = self.blocks[: self.number + 1]
        taken = [self.model.get_submodule(name) for name in names]
        for name in names:
            self.model.set_submodule(name, LeftOut())
        try:
            yield
        finally:
            for name, block in zip(names, taken, strict=True):
                self.model.set_submodule(name, block)

    def logits(self, stream_bTD: Tensor, keep: int = 1) -> Tensor:
        """[b, keep, V] at the last positions, from the residual stream; within `above`."""
        # Of the rows cut out of a batch as they are, torch would multiply one after the other by the unembedding.
        head = self.model.get_output_embeddings()
        with hooks(head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(),))):
            logits: Tensor = self.model(inputs_embeds=stream_bTD, use_cache=False, logits_to_keep=keep).logits
        return logits


class Split(NamedTuple):
    """Logits as wanted tokens and others. [n] the log-odds; [n, V - wanted] log p of the others, renormalised."""

    odds: Tensor
    others: Tensor


def between(wanted: Tensor, V: int) -> list[tuple[int, int]]:
    """The ranges of tokens that are not wanted."""
    ends = [-1, *sorted(wanted.tolist()), V]
    return [(a + 1, b) for a, b in pairwise(ends) if b > a + 1]


def split(logits_nV: Tensor, wanted: Tensor) -> Split:
    """In float64."""
    others = torch.cat(
        [logits_nV[..., start:stop] for start, stop in between(wanted, logits_nV.shape[-1])], -1
    ).double()
    inside = logits_nV[..., wanted].double()
    total = others.logsumexp(-1)
    return Split(inside.logsumexp(-1) - total, others - total[..., None])


class Prompt(NamedTuple):
    """A prompt at a layer.

    Attributes:
        ids: T of them.
        stream: [T, D], the output of the block.
        before: its next token.
        gradient: [D] float64, of the log-odds of the wanted tokens with respect to a step at all positions.
    """

    ids: list[int]
    stream: Tensor
    before: Split
    gradient: Tensor


class Effect(NamedTuple):
    """What each of n steps does to a prompt: [n] each, in nats.

    Attributes:
        gain: the change of the log-odds of the wanted tokens.
        off_target: KL(p || p_step) of the distributions renormalised without them.
    """

    gain: NDArray[np.float64]
    off_target: NDArray[np.float64]


def streams(model: nn.Module, layers: Sequence[str], ids: Sequence[int]) -> dict[str, Tensor]:
    """[T, D] the outputs of blocks, by hooks."""
    seen: dict[str, Tensor] = {}

    def keep(layer: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            seen[layer] = (output if isinstance(output, Tensor) else output[0])[0]

        return model.get_submodule(layer).register_forward_hook(hook)

    handles = [keep(layer) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def prompt_at(site: Site, ids: Sequence[int], stream_TD: Tensor, wanted: Tensor) -> Prompt:
    """A prompt with its gradient, by plain autograd."""
    theta_D = torch.zeros(stream_TD.shape[1], requires_grad=True)
    with site.above(), torch.enable_grad():
        before = split(site.logits((stream_TD + theta_D)[None])[0, -1], wanted)
        (gradient_D,) = torch.autograd.grad(before.odds, theta_D)
    return Prompt(list(ids), stream_TD, Split(*(x.detach() for x in before)), gradient_D.double())


def effects(site: Site, prompt: Prompt, steps_nD: Tensor, wanted: Tensor) -> Effect:
    """The effect of each step on the next token."""
    at_once = max(1, min(AT_ONCE // len(prompt.ids), LOGITS_AT_ONCE // len(prompt.before.others)))
    p_V, gains, off_target = prompt.before.others.exp(), [], []
    with site.above(), torch.no_grad():
        for some_bD in steps_nD.float().split(at_once):
            for row_V in site.logits(prompt.stream + some_bD[:, None])[:, -1]:
                after = split(row_V, wanted)
                gains.append(float(after.odds - prompt.before.odds))
                off_target.append(float(divergence(p_V, after.others - prompt.before.others)))
    return Effect(np.array(gains), np.array(off_target))


def divergence(p_nV: Tensor, change_nV: Tensor) -> Tensor:
    """KL(p || q) as sum p (e^d - 1 - d) with d = log q - log p: no term is negative."""
    kl_n: Tensor = (p_nV * (torch.expm1(change_nV) - change_nV)).sum(-1)
    return kl_n


def along(site: Site, prompt: Prompt, sweeps: Sequence[tuple[Tensor, Tensor]], wanted: Tensor) -> list[Effect]:
    """The effects of several sweeps in one: of each (direction [D], lengths [n])."""
    rows = torch.cat([lengths[:, None] * direction for direction, lengths in sweeps])
    found = effects(site, prompt, rows, wanted)
    ends = np.cumsum([len(lengths) for _, lengths in sweeps])[:-1]
    parts = zip(np.split(found.gain, ends), np.split(found.off_target, ends), strict=True)
    return [Effect(*part) for part in parts]


def at_gain(effect: Effect, wanted: Sequence[float], values: NDArray[np.float64] | None = None) -> list[float]:
    """The off-target KL (or another positive value) where a sweep of growing lengths first reaches each gain.

    Interpolated in the logarithms of both by monotone cubics, over the points that go further than all before them.
    Below the first point KL is taken to grow with the square of the gain, as it does for small steps. Infinite if a
    gain is never reached.
    """
    values = effect.off_target if values is None else values
    furthest = np.maximum.accumulate(np.concatenate([[0.0], effect.gain]))
    chosen = np.flatnonzero((effect.gain > furthest[:-1]) & (values > 0))
    if not len(chosen):
        return [np.inf] * len(wanted)
    x, y = np.log(effect.gain[chosen]), np.log(values[chosen])
    curve = PchipInterpolator(x, y) if len(chosen) > 1 else None
    found = []
    for gain in wanted:
        at = np.log(gain)
        if at > x[-1]:
            found.append(np.inf)
        elif at < x[0] or curve is None:
            found.append(float(np.exp(y[0] + 2 * (at - x[0]))))
        else:
            found.append(float(np.exp(curve(at))))
    return found


def lengths_for(prompt: Prompt, direction: Tensor, unit: float, points: int, least: float = 0.2) -> Tensor:
    """[n] growing lengths, each twice the one before: by the gradient, the first would gain `least` nats.

    The first is never more than what makes the last one four times `unit`, the norm of the residual stream.
    """
    slope = float(prompt.gradient @ direction.double())
    first = 4 * unit / 2 ** (points - 1)
    if slope > 0:
        first = min(first, least / slope)
    doubled: Tensor = first * 2.0 ** torch.arange(points, dtype=torch.float64)
    return doubled
