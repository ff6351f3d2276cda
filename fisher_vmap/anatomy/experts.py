"""Mixture-of-experts layers, one expert at a time: the grouped product that takes all at once has no batching rule.

Under `vmap` torch would run it once for each cotangent, and say so in a warning. An expert's own products have rules,
and serve all cotangents of the tokens that were sent to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ONE_AT_A_TIME = "eager"


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Within the context the model's experts run one after another, whatever the model was told before."""
    # The attribute behind the property, which would change nested configurations as well.
    name = "_experts_implementation_internal"
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if getattr(config, name, None) is not None}
    before = [(config, getattr(config, name)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, name, ONE_AT_A_TIME)
        yield
    finally:
        for config, value in before:
            setattr(config, name, value)
