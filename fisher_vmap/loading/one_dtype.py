"""Unpacked weights, and the others beside them, in one number format: a quantised checkpoint's others keep their own.

transformers leaves the embeddings, norms and biases of a checkpoint that is quantised already in the format they were
saved in, whatever `dtype` asks for. Beside unpacked matrices of another format they do not run.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from fisher_vmap.anatomy.placement import FLOATS


def to_one_dtype(model: Any, dtype: torch.dtype) -> list[str]:
    """Give every weight the format that it has where an ordinary checkpoint is loaded in `dtype`.

    That is `dtype`, but for what the model's class makes in a format of its own or keeps in float32. Tensors that are
    packed, and buffers that are computed and not saved, stay as they are.

    Args:
        model: of transformers, its linear layers unpacked.
        dtype: float32, bfloat16 or float16, as the user asked.

    Returns:
        The names of those that had another.
    """
    with torch.device("meta"):
        made = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    wanted = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    kept = _kept_in_float32(model, dtype)
    changed = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        to = torch.float32 if kept is not None and kept.search(name) else wanted.get(name)
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS
        if plain and to in FLOATS and tensor.dtype != to:
            tensor.data = tensor.data.to(to)
            changed.append(name)
    return changed


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The names that transformers keeps in float32: some beside float16 alone, some beside any narrow format."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return re.compile("|".join(name.replace("*", ".*") for name in sorted(names))) if names else None
