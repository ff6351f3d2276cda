"""The hook of a step: a vector added to a module's output at chosen positions, whatever way the model is called.

Which rows of an output are those positions depends on the call. In a run of this package a `Layout` says where each
prompt lies. In a call by the user, such as each pass of `generate`, `Passes` follows how far the sequences have come.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.model.layout import Layout, on_device
from fisher_vmap.model.recording import StructureChanged, output_of, running, with_output

POSITIONS = ("all", "last", "prompt", "completion")
OF_THE_BIAS = "bias"  # the positions at which the layout of a run has its bias


class Passes:
    """A pre-hook of a causal LM, which says what positions each of its passes holds.

    The prompt is what the first pass over a sequence takes; what later passes add to it is its completion. Without a
    cache a pass takes the whole sequence again.
    """

    def __init__(self) -> None:
        self.columns = range(0)
        """The columns of the sequences that the last pass has taken."""
        self.prompt_mask: Tensor | None = None
        """[B, T], true at the tokens of the prompts; false at their padding."""
        self._ids: Tensor | None = None
        self._cache: Any = None

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a pass takes."""
        if running() is not None:
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        taken = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(taken, Tensor):
            raise ValueError("a step at some positions needs the model to be called with input_ids or inputs_embeds")
        T, cache = taken.shape[1], kwargs.get("past_key_values", kwargs.get("cache_params"))
        if cache is not None and self._goes_on(cache):
            self.columns = range(self.columns.stop, self.columns.stop + T)
        elif cache is None and self._is_longer(ids):
            self.columns = range(T)
        else:
            mask = kwargs.get("attention_mask")
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                mask = torch.ones(taken.shape[:2], device=taken.device)
            self.columns, self.prompt_mask = range(T), mask[:, -T:] != 0
        self._ids, self._cache = ids, cache

    def _goes_on(self, cache: Any) -> bool:
        """Whether the cache holds the sequences of the passes before."""
        if self.prompt_mask is None:
            return False
        length = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        return length == self.columns.stop or (length == 0 and cache is self._cache and not _keeps_keys(cache))

    def _is_longer(self, ids: Tensor | None) -> bool:
        """Whether the tokens are those of the pass before and one more."""
        before = self._ids
        if ids is None or before is None or ids.shape[0] != before.shape[0] or ids.shape[1] != before.shape[1] + 1:
            return False
        return torch.equal(ids[:, :-1], before)

    def mask(self, positions: str | Tensor) -> Tensor:
        """[B, T] bool: which positions of the last pass are among these."""
        prompt_BT = self.prompt_mask
        if prompt_BT is None:
            raise ValueError("a step at some positions needs the causal LM itself to be called, not a part of it")
        if isinstance(positions, Tensor):
            if positions.shape != prompt_BT.shape:
                raise ValueError(f"positions has shape {tuple(positions.shape)}; expected {tuple(prompt_BT.shape)}")
            first_BT = positions.to(prompt_BT.device) != 0
        elif positions == "last":
            place = torch.arange(prompt_BT.shape[1], device=prompt_BT.device)
            first_BT = place == (place * prompt_BT).amax(1, keepdim=True)
        else:
            first_BT = prompt_BT & (positions == "prompt")
        new = max(0, self.columns.stop - first_BT.shape[1])
        later_BT = first_BT.new_full((len(first_BT), new), positions == "completion")
        return torch.cat([first_BT, later_BT], 1)[:, self.columns.start : self.columns.stop]


def _keeps_keys(cache: Any) -> bool:
    """Whether a cache counts tokens: one of states alone, as mamba's, does not."""
    return any(getattr(layer, "keys", None) is not None for layer in getattr(cache, "layers", ()))


class AddStep:
    """A forward hook that adds a step to the output of its module.

    Attributes:
        fits_any_batch: whether it acts alike on any batch, so that what is known of a model holds with it as without.
    """

    def __init__(self, name: str, step_D: Tensor, positions: str | Tensor, in_norms: bool, passes: Passes) -> None:
        """Make the hook.

        Args:
            name: the module's, for messages.
            step_D: [D] float64, the step.
            positions: `POSITIONS`, `OF_THE_BIAS`, or a mask [B, T].
            in_norms: whether the step is in units of each position's own norm.
            passes: the model's.
        """
        self._name, self._step_D, self._positions = name, step_D, positions
        self._in_norms, self._passes = in_norms, passes
        self.fits_any_batch = isinstance(positions, str) and positions in ("all", OF_THE_BIAS)

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """The output with the step."""
        # Checked here, since running the model beforehand would call the user's hooks.
        stream = output_of(output)
        if stream is None or stream.shape[-1] != len(self._step_D):
            shape = None if stream is None else tuple(stream.shape)
            raise ValueError(
                f"the direction has {len(self._step_D)} entries, but {self._name} gives {shape}; expected as many"
            )
        step = self._step_D.to(stream.device, stream.dtype)
        if self._in_norms:
            step = step * stream.norm(dim=-1, keepdim=True)
        if (where := self._where()) is not None:
            step = step * _beside(where.to(stream), stream, self._name)
        return with_output(output, stream + step)

    def _where(self) -> Tensor | None:
        """[b, T], the positions of the current call; None: all."""
        positions, layout = self._positions, running()
        if isinstance(positions, str) and positions == "all":
            return None
        if layout is None:
            if isinstance(positions, str) and positions == OF_THE_BIAS:
                raise StructureChanged(f"{self._name} was called outside of a run")
            return self._passes.mask(positions)
        rows_N = _rows(layout, positions)
        return None if rows_N is None else rows_N.view(layout.input_ids.shape)


def _beside(where_bT: Tensor, stream: Tensor, name: str) -> Tensor:
    """The positions in the shape of an output, [b, T, ..., 1] or [b T, ..., 1]."""
    for dims in (2, 1):
        where = where_bT if dims == 2 else where_bT.flatten()
        if stream.shape[:dims] == where.shape:
            return where.view(*where.shape, *(1,) * (stream.dim() - dims))
    raise StructureChanged(f"{name} gives {tuple(stream.shape)} for {tuple(where_bT.shape)} positions")


def _rows(layout: Layout, positions: str | Tensor) -> Tensor | None:
    """[N] of 0 and 1: the rows of a layout at these positions; None: all."""
    if isinstance(positions, Tensor):
        return layout.from_caller((positions.to(layout.device) != 0).float())
    if positions == OF_THE_BIAS:
        return layout.bias_mask()
    if positions == "prompt":
        return None
    rows_N = torch.zeros(layout.input_ids.numel(), device=layout.device)
    if positions == "last":
        rows_N[on_device([stop - 1 for _, stop in layout.ranges()], layout.device)] = 1
    return rows_N
