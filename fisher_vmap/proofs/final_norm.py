"""What a model does between its last block and its unembedding, as a function of single rows in float32 or wider.

Mostly that is a chain of modules: a final norm. Where the model has code of its own between them, it is the model's own
forward from the last block on, run again on the rows.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisher_vmap.anatomy.blocks import forward_inputs, output_embedding, with_output
from fisher_vmap.anatomy.layout import Layout
from fisher_vmap.anatomy.placement import placed
from fisher_vmap.anatomy.recording import StructureChanged, hooks
from fisher_vmap.pullbacks.attention_interface import prompts_packed


@dataclass(frozen=True)
class Chain:
    """Modules as a function of float32 (or float64) rows, their few parameters upcast at each call."""

    chain: tuple[nn.Module, ...]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows [N, D] -> [N, D']; the modules' weights must be at hand."""
        rows = rows[:, None]  # as [B, 1, D], which is what a model gives them
        for module in self.chain:
            wide = {name: p.detach().to(rows.dtype) for name, p in module.named_parameters()}
            rows = rows.to(next((p.device for p in wide.values()), rows.device))
            with placed(module):
                rows = functional_call(module, wide, (rows,))
        return rows[:, 0]


class _Entered(Exception):
    """Leaves the model's forward where it unembeds."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class Replay:
    """What the model does between its last block and its unembedding, as a function of float32 (or float64) rows.

    It is the model's own forward on prompts of one token, a row a prompt, whose last block returns the row instead of
    what it computed. The few parameters above the blocks are upcast at each call. The model is held weakly: what is
    remembered of it must not keep it alive.
    """

    model: "weakref.ref[nn.Module]"
    blocks: Mapping[str, nn.Module]
    call_order: Sequence[str]
    above: Collection[int]

    @property
    def runs(self) -> tuple[nn.Module, ...]:
        """The modules that are run."""
        model = self.model()
        return () if model is None else (model,)

    def __call__(self, rows: Tensor) -> Tensor:
        """[N, D] to [N, D']."""
        model = self.model()
        assert model is not None
        unembedding = output_embedding(model)
        assert unembedding is not None
        wide = {
            name: p.detach().to(rows.dtype)
            for name, p in model.named_parameters()
            if id(model.get_submodule(name.rpartition(".")[0])) in self.above
            and not any(p is own for own in unembedding.parameters())
        }
        seen = 0

        def put(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal seen
            seen += 1
            return with_output(output, rows[:, None]) if seen == len(self.call_order) else None

        def leave(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Entered(args[0])

        # Written out, not laid out: in torch 2.9 numbers cannot be read off tensors inside a transform.
        B, ids_B1 = len(rows), torch.zeros(len(rows), 1, dtype=torch.int64, device=rows.device)
        one_each = Layout(ids_B1, None, (1,) * B, tuple(range(B)), (0,) * B, 1)
        handles = [block.register_forward_hook(put) for block in self.blocks.values()]
        with hooks(*handles, unembedding.register_forward_pre_hook(leave)), prompts_packed(one_each):
            try:
                functional_call(model, wide, kwargs=forward_inputs(model, one_each.input_ids))
            except _Entered as entered:
                return entered.rows[:, 0]
        raise StructureChanged("the model did not reach its output embedding")
