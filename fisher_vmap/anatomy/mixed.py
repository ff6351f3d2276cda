"""A forward in float32 of a model whose weights are of a narrower format: exact, and without a second copy of it.

Every block's weights are widened when it is called and let go when it returns; embeddings are looked up as they are,
and what they return is widened, which is the same. So the extra memory is that of one block.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.recording import hooks

NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def float32_forward(model: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context the model's forward, as far as its last block, runs in float32."""
    widened: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def widen(module: nn.Module, whole: bool) -> None:
        tensors = [*module.parameters(whole), *module.buffers(whole)]
        before = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in NARROW]
        widened[id(module)] = before
        for tensor, data in before:
            tensor.data = data.float()

    def narrow(module: nn.Module) -> None:
        for tensor, data in widened.pop(id(module), ()):
            tensor.data = data

    def around(module: nn.Module, whole: bool) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda m, _args: widen(m, whole), prepend=True),
            module.register_forward_hook(lambda m, _args, _output: narrow(m), always_call=True),
        ]

    inside = {id(module) for block in blocks.values() for module in block.modules()}
    handles = [handle for block in blocks.values() for handle in around(block, whole=True)]
    for module in model.modules():
        own = [*module.parameters(False), *module.buffers(False)]
        if id(module) in inside or not any(tensor.dtype in NARROW for tensor in own):
            continue
        if type(module) is nn.Embedding:
            handles.append(module.register_forward_hook(lambda _m, _args, output: output.float()))
        else:
            handles += around(module, whole=False)
    try:
        with hooks(*handles):
            yield
    finally:
        for module in model.modules():  # of those that an error or the end of the blocks has kept from returning
            narrow(module)
