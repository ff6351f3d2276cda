"""How many positions a model has: where they are embedded one by one, in a table, there are no others."""

from typing import Any

from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode


class PositionTables(TorchFunctionMode):
    """Notes the tables of positions that a forward pass looks rows up in, while the context lasts.

    The tokens must be all alike: consecutive rows that are looked up are then no tokens but positions. A rotary
    embedding looks nothing up.
    """

    def __init__(self, tokens: int) -> None:
        """Watch for prompts of so many tokens."""
        super().__init__()
        self._tokens = tokens
        self._rooms: list[int] = []

    @property
    def room(self) -> int | None:
        """The most tokens that all tables that were seen have rows for; None: there was no table."""
        return min(self._rooms, default=None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what an embedding is asked for."""
        if func is embedding and len(args) >= 2:
            rows, table = args[:2]
            for_each_token = isinstance(rows, Tensor) and rows.dim() > 0 and rows.shape[-1] == self._tokens > 1
            if for_each_token and bool((rows.diff(dim=-1) == 1).all()):
                self._rooms.append(len(table) - int(rows[..., 0].max()))
        return func(*args, **(kwargs or {}))


def most_positions(model: Any) -> int | None:
    """The number of positions that a model was made for, by its config, or None where it has no such number.

    Where positions are embedded one by one there are no others; elsewhere what stands further on is noise.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
