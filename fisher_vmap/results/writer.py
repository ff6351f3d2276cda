"""Writing a results folder: opened new or resumed, filled shard by shard in any order, then finished.

What is on the disk is a valid state at every moment. A shard counts once its entry stands beside it, so that several
processes can fill one folder. index.json takes the entries in now and then: written for every shard, its cost would
grow with the square of their number.

index.json as one of several processes keeps it: what it has seen, what it has stored since, and when it writes.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from fisher_vmap.results.files import folder_lock
from fisher_vmap.results.folder import Soundness, begin_folder, compare_fingerprints, plain_values
from fisher_vmap.results.index import (
    INDEX_NAME,
    Index,
    ShardEntry,
    read_entry,
    read_index,
    read_index_file,
    remove_entries,
    write_index,
)
from fisher_vmap.results.mean import fold, sum_is_sound
from fisher_vmap.results.outputs import Save, finish_folder
from fisher_vmap.results.shard import stage_shard
from fisher_vmap.results.table import PromptResult, ShardLayout

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


logger = logging.getLogger(__name__)


class ShardRange(NamedTuple):
    """A shard that is to be computed: its number and its prompts [start, stop)."""

    number: int
    start: int
    stop: int


class ResultsWriter:
    """A results folder that is being filled. Make one with `ResultsWriter.open`."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self._ledger = Ledger(folder, index)
        self._shards = Soundness(folder, index.layout)

    @property
    def index(self) -> Index:
        """What the folder holds, as this process saw it last."""
        return self._ledger.index

    @classmethod
    def attach(cls, folder: str | Path) -> Self:
        """The run that others have begun in `folder`, whatever its settings are.

        Raises:
            UserError: there is none, or its index is damaged.
        """
        return cls(Path(folder), read_index(Path(folder)))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        layout: ShardLayout,
        shard_size: int,
        fingerprint: dict[str, Any],
        resolved: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Self:
        """Begin a run in `folder`, or carry on the one that is there.

        Args:
            folder: made if it does not exist, with its parents.
            layout: shapes and dtypes of the results.
            shard_size: prompts in a shard; the unit of work and of what a killed run loses.
            fingerprint: every setting that changes results, as JSON can hold them; not the number of prompts.
            resolved: what was chosen automatically; what a resumed folder has stored wins (see `settle`).
            settings: the settings used, for whoever finishes the run.
            overwrite: start anew. Only files of ours are removed, and only once the new run is on the disk. Never for
                one of several processes that fill a folder together.

        Raises:
            UserError: the folder holds results of other settings (all differences are named) or files of something
                else, its index is damaged, or it cannot be written.
        """
        folder = Path(folder)
        index = begin_folder(
            folder,
            layout=layout,
            shard_size=shard_size,
            fingerprint=fingerprint,
            resolved=resolved,
            settings=settings,
            overwrite=overwrite,
        )
        writer = cls(folder, index)
        if resolved is not None:
            writer.settle(resolved)
        return writer

    @property
    def resolved(self) -> dict[str, Any] | None:
        """What the run chose automatically when it began; None as long as nothing is stored."""
        return self._ledger.listed.resolved

    def settle(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """Store what was chosen automatically, unless the folder has it already. Returns what is stored.

        A resumed run takes its choices from here, and so repeats the same batches to the same bits.
        """
        stored = self._ledger.change(
            lambda index: (
                index if index.resolved is not None else index.model_copy(update={"resolved": plain_values(resolved)})
            )
        ).resolved
        return stored or {}

    def note(self, name: str, items: Iterable[Any]) -> None:
        """Add to a list of that name in `resolved` what the run learns on its way, such as batches that were split."""
        plain = plain_values({name: list(items)})[name]

        def change(index: Index) -> Index:
            known = (index.resolved or {}).get(name, [])
            news = [item for item in plain if item not in known]
            return index.model_copy(update={"resolved": {**(index.resolved or {}), name: sorted([*known, *news])}})

        self._ledger.change(change)

    def missing_shards(self, num_prompts: int, among: Callable[[int], bool] | None = None) -> list[ShardRange]:
        """The shards that are still to be computed for the first `num_prompts` prompts, in order.

        Every stored shard is compared with its SHA-256; one that is damaged or deleted counts as missing. A folder that
        holds more prompts than asked for keeps them. With more prompts than before, a finished folder is unfinished
        again until they are there: its old shards stay, except a last one that was not full, which is computed again
        since a shard is one file.

        Args:
            num_prompts: of the whole run.
            among: tells the numbers of the shards that this process answers for; None: all of them.
        """
        self.refresh()
        mine = [entry for entry in self._ledger.listed.shards if among is None or among(entry.number)]
        broken = {entry.number: entry for entry in mine if not self._shards.is_sound(entry)}
        for entry in broken.values():
            logger.warning("%s in %s is damaged or missing, and is computed again", entry.file, self.folder)
        folded = self._ledger.listed.folded
        sum_is_lost = not sum_is_sound(self.folder, self._ledger.listed) or any(e.folded for e in broken.values())
        if sum_is_lost:
            logger.warning("the sum over the first %d shards in %s cannot be used: they are computed again",
                           folded, self.folder)  # fmt: skip

        def change(index: Index) -> Index:
            if sum_is_lost and index.folded == folded:
                remove_entries(self.folder, list(range(folded)))
                index = index.unfolded()
            gone = [number for number, entry in broken.items() if index.find(number) == entry]
            remove_entries(self.folder, gone)
            return (index.with_shards(removed=gone) if gone else index).expecting(num_prompts)

        index = self._ledger.change(change)
        total, size = index.num_prompts or 0, index.shard_size
        if total > num_prompts:
            logger.info("%s already holds %d prompts; they are kept", self.folder, total)
        ranges = [ShardRange(n, n * size, min((n + 1) * size, total)) for n in index.missing(total)]
        return [shard for shard in ranges if among is None or among(shard.number)]

    def expect(self, num_prompts: int) -> None:
        """Say how many prompts the run has, for those that learn it on their way."""
        self._ledger.change(lambda index: index.expecting(num_prompts))

    def is_stored(self, number: int, start: int, stop: int) -> bool:
        """Is shard `number` there with the prompts [start, stop), to the bit?

        For runs that do not know their number of prompts beforehand; others ask `missing_shards` once.
        """
        entry = self._ledger.find(number) or read_entry(self.folder, number, self._ledger.listed.mark)
        return entry is not None and entry.start == start and entry.stop >= stop and self._shards.is_sound(entry)

    def add(self, number: int, results: Sequence[PromptResult]) -> ShardEntry:
        """Store a computed shard; afterwards it survives whatever happens to the process.

        If another process stored it meanwhile, that one stays.

        Raises:
            ValueError: the prompts are not those of shard `number`, or an array is not as the layout has it.
            UserError: the folder cannot be written, the disk is full, or another run has taken the folder over.
        """
        size = self._ledger.listed.shard_size
        if not 0 < len(results) <= size or results[0].index != number * size:
            raise ValueError(f"shard {number} begins with prompt {number * size} and holds at most {size}")
        with stage_shard(self.folder, number, results, self._ledger.listed.layout) as shard, folder_lock(self.folder):
            self._ledger.follow()
            listed = self._ledger.listed.find(number)
            if listed is not None and listed.stop >= shard.entry.stop and self._shards.is_there(listed):
                return listed
            entry = shard.commit(self.folder, self._ledger.listed.mark)
            if entry == shard.entry:
                self._shards.know([entry])
            self._count([entry])
            return entry

    def record(self, entries: Iterable[ShardEntry]) -> None:
        """List shards that workers have stored with `write_shard`.

        Raises:
            UserError: a shard's files are not there, or another run has taken the folder over.
        """
        added = list(entries)
        for entry in added:
            self._shards.check_sizes(entry)
        with folder_lock(self.folder):
            self._ledger.follow()
            self._count(added)

    def refresh(self) -> Index:
        """What the folder holds now, other processes' shards included; index.json lists all of it afterwards.

        Raises:
            UserError: another run has taken the folder over.
        """
        return self._ledger.change(lambda index: index)

    def finish(
        self,
        num_prompts: int | None = None,
        *,
        settings: dict[str, Any] | None = None,
        save: Save = "both",
        export_npz: bool = True,
    ) -> None:
        """Write the files made from all shards and mark the folder complete: `finish_folder`, with its arguments."""
        marks = self._ledger.listed.fingerprint
        self._ledger.take(
            finish_folder(self.folder, marks, num_prompts, settings=settings, save=save, export_npz=export_npz)
        )

    def _count(self, entries: Iterable[ShardEntry]) -> None:
        folded = self._ledger.listed.folded
        self._ledger.count(entries)
        index = self._ledger.listed
        if index.folded > folded:  # what was folded was read, and compared with its checksums
            self._shards.know(index.shards[: index.folded])
