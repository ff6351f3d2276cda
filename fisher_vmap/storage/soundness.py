"""Which shards are as they were written. A checksum reads the whole shard, so a process compares each of them once."""

from collections.abc import Iterable
from pathlib import Path

from fisher_vmap.storage.entries import ShardEntry
from fisher_vmap.storage.reading import ShardReader
from fisher_vmap.storage.records import ShardLayout


class Soundness:
    """What this process knows of the shards of one run: those that it wrote, read or compared are known to be sound."""

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._folder, self._layout = folder, layout
        self._sound: set[ShardEntry] = set()

    def know(self, entries: Iterable[ShardEntry]) -> None:
        """Take the word of whoever has just written these shards, or read them whole."""
        self._sound.update(entries)

    def is_sound(self, entry: ShardEntry) -> bool:
        """Whether the shard is what its entry says, to the bit; of a known one, whether it is still there."""
        if entry in self._sound:
            return self.is_there(entry)
        sound = self._reader(entry).is_sound()
        if sound:
            self._sound.add(entry)
        return sound

    def is_there(self, entry: ShardEntry) -> bool:
        """Whether the shard's files are there, with the sizes that its entry has."""
        return self._reader(entry).is_there()

    def check_sizes(self, entry: ShardEntry) -> None:
        """Raise UserError, naming the file, where `is_there` says no."""
        self._reader(entry).check_sizes()

    def _reader(self, entry: ShardEntry) -> ShardReader:
        return ShardReader(self._folder, entry, self._layout)
