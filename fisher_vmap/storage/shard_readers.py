"""The shards of a folder for whoever reads it: one after the other, or by prompt, the latest few of them kept open."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fisher_vmap.storage.index import Index
from fisher_vmap.storage.reading import ShardReader

KEPT_OPEN = 8  # file handles are few, and a reader that was used holds its shard's table


def readers(folder: Path, index: Index, verify: bool = True) -> Iterator[ShardReader]:
    """The shards of an index in order, each opened when its turn comes and not kept."""
    return (ShardReader(folder, entry, index.layout, verify) for entry in index.shards)


class OpenShards:
    """The shards that hold single prompts: prompts are asked for in any order, and mostly near to one another."""

    def __init__(self, folder: Path, index: Index, verify: bool) -> None:
        self._folder, self._index, self._verify = folder, index, verify
        self._starts = [entry.start for entry in index.shards]
        self._kept: OrderedDict[int, ShardReader] = OrderedDict()  # by place among the shards, the latest used last

    def holding(self, prompt: int) -> ShardReader | None:
        """The shard that holds the prompt of this index, or None."""
        place = bisect_right(self._starts, prompt) - 1
        if place < 0 or prompt >= self._index.shards[place].stop:
            return None
        if place not in self._kept:
            entry = self._index.shards[place]
            self._kept[place] = ShardReader(self._folder, entry, self._index.layout, self._verify)
            if len(self._kept) > KEPT_OPEN:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind when the object goes to another process.
        return {**self.__dict__, "_kept": OrderedDict()}
