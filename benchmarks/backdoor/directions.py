"""Directions of the residual stream along which a hidden behaviour is looked for: one function a method.

None of them sees a prompt with a trigger, but for the ceiling's, and none an answer of the behaviour.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.backdoor.steered import block_names
from fisher_vmap import Results
from fisher_vmap.model.recording import hidden_of, hooks, output_of, with_hidden

RANK = 3  # vectors of a method
RIDGE = 0.01  # of the base's mean eigenvalue
KINDS: dict[str, dict[str, Any]] = {  # settings of `fisher-vmap run` beside its defaults
    "full": {"estimator": "full"},
    "topk": {},
    "sequence": {"estimator": "full", "targets": 8},
}
DRAWS = (0, 1, 2)  # seeds of the random vectors
CEILING = "trigger's difference of means"
TOGETHER = 32  # prompts that are read at a time

STEPS = 30  # of Adam
RATE = 0.05  # in units of the vector's length
STARTS = 16  # making prompts that the change is measured on
SHARE = 0.1  # of the residual stream's median norm: the vector's length
UP_TO = 25  # the block whose output is to change


def units(vectors: Any) -> Tensor:
    """[m, X] as unit vectors, float32."""
    found_mX = torch.as_tensor(np.asarray(vectors, np.float64))
    unit_mX: Tensor = found_mX / found_mX.norm(dim=1, keepdim=True)
    return unit_mX.float()


def contrast(base: Results, tuned: Results, layer: str) -> Tensor:
    """[m, X] directions that the tuned model's mean Fisher matrix reacts to and the base's does not."""
    return units(base.compare(tuned, layer, rank=RANK, ridge=RIDGE).directions.directions)


def leading(tuned: Results, layer: str) -> Tensor:
    """[m, X] the leading eigenvectors of the mean Fisher matrix."""
    return units(tuned.directions(RANK, layer=layer).V)


def outputs(model: Any, layer: str, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """[T, X] of each prompt: the layer's output at its tokens."""
    seen = list[Any]()
    with torch.no_grad(), hooks(model.get_submodule(layer).register_forward_hook(lambda *given: seen.append(given[2]))):
        for start in range(0, len(rows), TOGETHER):
            some = rows[start : start + TOGETHER]
            model.get_decoder()(input_ids=padded(some), use_cache=False)
            hidden_BTX = output_of(seen.pop())
            assert hidden_BTX is not None
            yield from (hidden_TX[: len(row)] for hidden_TX, row in zip(hidden_BTX, some, strict=True))


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, T] token ids, padded on the right; that needs no mask, since no token sees those after it."""
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row)
    return ids_BT


def streams(model: Any, layer: str, rows: Sequence[Sequence[int]]) -> Tensor:
    """[n, X] the layer's output at each prompt's last token."""
    return torch.stack([hidden_TX[-1] for hidden_TX in outputs(model, layer, rows)])


def median_norm(model: Any, layer: str, rows: Sequence[Sequence[int]]) -> float:
    """The median norm of the layer's output, over all tokens of all prompts."""
    return float(torch.cat([hidden_TX.norm(dim=1) for hidden_TX in outputs(model, layer, rows)]).median())


def difference(one_nX: Tensor, other_nX: Tensor) -> Tensor:
    """[1, X] the mean of the one minus that of the other."""
    return units((one_nX.double().mean(0) - other_nX.double().mean(0))[None])


def drawn(seed: int, width: int) -> Tensor:
    """[3, X] random directions."""
    generator = torch.Generator().manual_seed(seed)
    return units(torch.randn(RANK, width, generator=generator, dtype=torch.float64))


class Above:
    """The blocks above a layer, on some prompts: what they make of another output of the layer.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        layer: the name of a block.
        upper: that of the block whose output is looked at, above the layer.
        rows: token ids of the prompts.
    """

    def __init__(self, model: Any, layer: str, upper: str, rows: Sequence[Sequence[int]]) -> None:
        names = block_names(model, layer)
        self._calls = list[tuple[Any, tuple[Any, ...], dict[str, Any]]]()
        if not names.index(layer) < names.index(upper):
            raise ValueError(f"{upper} is not above {layer}")

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((module, args, kwargs))

        between = names[names.index(layer) + 1 : names.index(upper) + 1]
        handles = [model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True) for name in between]
        with torch.no_grad(), hooks(*handles):
            model.get_decoder()(input_ids=padded(rows), use_cache=False)
        bottom_BTX = hidden_of(*self._calls[0][1:])
        assert bottom_BTX is not None
        self._bottom_BTX = bottom_BTX
        counts_B1 = torch.tensor([len(row) for row in rows])[:, None]
        self._real_BT = torch.arange(self._bottom_BTX.shape[1]) < counts_B1
        with torch.no_grad():
            self._plain_NX = self._top(self._bottom_BTX)

    def _top(self, hidden_BTX: Tensor) -> Tensor:
        """[N, X] the upper block's output at the N tokens."""
        for block, args, kwargs in self._calls:
            args, kwargs = with_hidden(args, kwargs, hidden_BTX)
            found = output_of(block(*args, **kwargs))
            assert found is not None
            hidden_BTX = found
        return hidden_BTX[self._real_BT]

    def change(self, step_X: Tensor) -> Tensor:
        """The mean over tokens of the norm of the change that a step at the layer makes."""
        change_N: Tensor = (self._top(self._bottom_BTX + step_X) - self._plain_NX).norm(dim=1)
        return change_N.mean()


def large_change(
    change: Callable[[Tensor], Tensor], width: int, length: float, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[3, X] steps of a given length that change a model's upper layers much, each orthogonal to those before.

    Each is sought by Adam from a random start and brought back to the length, and to the complement of those before,
    after each step. Of all that were tried the one with the largest change is taken.

    Args:
        change: the change that a step [X] makes, differentiable.
        width: X.
        length: of the steps.
        seed: of the starts.
        dtype: of the steps.
    """
    generator, found_mX = torch.Generator().manual_seed(seed), torch.empty(0, width, dtype=dtype)
    shown = time.perf_counter()

    def kept(step_X: Tensor) -> Tensor:
        for _ in range(2):  # once more for rounding
            step_X = step_X - found_mX.T @ (found_mX @ step_X) / length**2
        step_X = step_X * (length / step_X.norm())
        return step_X

    for number in range(RANK):
        step_X = kept(torch.randn(width, generator=generator, dtype=dtype)).requires_grad_()
        optimiser, best, best_X = torch.optim.Adam([step_X], lr=RATE * length), -1.0, step_X
        for taken in range(STEPS + 1):
            size = change(step_X)
            if size.item() > best:
                best, best_X = size.item(), step_X.detach().clone()
            if taken < STEPS:
                (step_X.grad,) = torch.autograd.grad(-size, step_X)
                optimiser.step()
                with torch.no_grad():
                    step_X.copy_(kept(step_X))
            if time.perf_counter() - shown > 20:
                shown = time.perf_counter()
                print(f"vector {number + 1} of {RANK}, step {taken} of {STEPS}: change {size.item():.3f}", flush=True)
        found_mX = torch.cat([found_mX, best_X[None]])
    return found_mX
