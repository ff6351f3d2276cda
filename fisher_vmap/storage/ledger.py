"""index.json as one of several processes keeps it: what it has seen, what it has stored since, and when it writes."""

from collections.abc import Callable, Iterable
from pathlib import Path

from fisher_vmap.storage.entries import ShardEntry
from fisher_vmap.storage.fingerprint import compare_fingerprints
from fisher_vmap.storage.folding import fold
from fisher_vmap.storage.index import INDEX_NAME, Index, read_index, read_index_file, write_index
from fisher_vmap.storage.lock import folder_lock

LAG = 8  # index.json may lag behind by one in so many shards


class Ledger:
    """The index of a folder that other processes fill as well.

    index.json is replaced as a whole, so writing it for every shard would cost time that grows with the square of their
    number. What was stored since counts by its entry, and is listed when it makes up an eighth: all writing of
    index.json together then costs a few times the writing of the last one.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.listed = index
        """What index.json had when this process read or wrote it last."""
        self._waiting: dict[int, ShardEntry] = {}
        self._seen: object = None
        self._counted = 0

    @property
    def index(self) -> Index:
        """What the folder holds, as far as this process knows."""
        return self.listed.with_shards(self._waiting.values()) if self._waiting else self.listed

    def find(self, number: int) -> ShardEntry | None:
        """The entry of a shard, or None."""
        return self._waiting.get(number) or self.listed.find(number)

    def change(self, change: Callable[[Index], Index]) -> Index:
        """Apply a change to what the folder holds now, and write index.json if it is not that already.

        Raises:
            UserError: another run has taken the folder over, or it cannot be written.
        """
        with folder_lock(self.folder):
            before = read_index_file(self.folder)
            self._check(before)
            changed = change(read_index(self.folder))
            if changed != before:
                write_index(self.folder, changed)
            self.take(changed)
        return changed

    def follow(self) -> None:
        """See that the folder is still this run's, and what other processes have written to index.json: in the lock.

        Raises:
            UserError: another run has taken the folder over.
        """
        if _signature(self.folder) != self._seen:
            index, waiting = read_index_file(self.folder), self._waiting
            self._check(index)
            self.take(index)
            self._waiting = {n: entry for n, entry in waiting.items() if _is_news(index, entry)}

    def count(self, entries: Iterable[ShardEntry]) -> None:
        """Take stored shards in, fold what is ready if means alone are kept, and list them in time: in the lock.

        Raises:
            UserError: the folder cannot be written, or a shard that is folded is damaged.
        """
        for entry in entries:
            self._counted += 1
            if _is_news(self.listed, entry):
                self._waiting[entry.number] = entry
        if self.listed.layout.means_only:
            # Where several processes fill the folder, the shards in between are others'.
            index = read_index(self.folder) if self._counted % LAG == 0 else self.index
            folded = fold(self.folder, index)
            if folded is not index:
                self.take(folded)
        if self._waiting and len(self._waiting) * LAG >= len(self.listed.shards):
            index = self.index
            write_index(self.folder, index)
            self.take(index)

    def take(self, index: Index) -> None:
        """Hold this for what index.json says."""
        self.listed, self._waiting, self._seen = index, {}, _signature(self.folder)

    def _check(self, index: Index) -> None:
        compare_fingerprints(self.folder, index.fingerprint, self.listed.fingerprint)


def _signature(folder: Path) -> object:
    """Tells whether index.json has been replaced."""
    try:
        found = (folder / INDEX_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _is_news(index: Index, entry: ShardEntry) -> bool:
    listed = index.find(entry.number)
    return listed is None or (listed != entry and not listed.folded)
