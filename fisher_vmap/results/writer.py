"""Writing a results folder: open or resume it, store shards in any order, list them in index.json, and finish it.

The files are valid at every moment, so that a process may be killed at any time. A shard counts as stored once its
entry file exists, so that several processes can fill one folder. index.json lists the entries later: to write it for
every shard would take time that grows with the square of their number. It is written when the shards that it lacks make
up an eighth of those it lists, so that all its writes together cost only a few times the last one.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from fisher_vmap.errors import UserError
from fisher_vmap.progress import step
from fisher_vmap.results.files import check_sha256, folder_lock, passes, readable_write_errors
from fisher_vmap.results.folder import (
    RETIRED,
    compare_fingerprints,
    inspect_folder,
    plain_values,
    remove_leftovers,
    remove_stale,
)
from fisher_vmap.results.index import (
    INDEX_NAME,
    SHARD_FOLDER,
    Index,
    ShardEntry,
    ShardLayout,
    installed_versions,
    read_entry,
    read_index,
    read_index_file,
    remove_entries,
    write_index,
)
from fisher_vmap.results.means import check_means_only, fold, sum_is_intact, why_no_mean
from fisher_vmap.results.outputs import Save, product_names, write_product
from fisher_vmap.results.record import PromptResult
from fisher_vmap.results.shard import check_sizes, stage_shard
from fisher_vmap.results.shard_reader import ShardReader

LAG = 8  # index.json may lack one in so many shards

logger = logging.getLogger(__name__)


class ShardRange(NamedTuple):
    """A shard to compute: its number and its prompts [start, stop)."""

    number: int
    start: int
    stop: int


class ResultsWriter:
    """A results folder that is being filled. Make one with `ResultsWriter.open`.

    Every method raises UserError if the folder cannot be written, or if another run has replaced this one.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self._listed = index  # index.json as this process last read or wrote it
        self._signature: object = None  # identifies that version of the file
        self._unlisted: dict[int, ShardEntry] = {}  # stored shards that index.json lacks
        self._stored = 0  # shards stored through this writer
        self._intact: set[ShardEntry] = set()  # shards that this process wrote, or compared with their checksums

    @classmethod
    def attach(cls, folder: str | Path) -> Self:
        """The run in `folder`, whatever its settings are."""
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
        """Begin a run in `folder`, or resume the one that is there.

        Args:
            folder: created with its parents if it does not exist.
            layout: shapes and dtypes of the results.
            shard_size: prompts in a shard, which is what a killed run loses at most.
            fingerprint: every setting that changes results, as JSON can hold them; not the number of prompts.
            resolved: what was chosen automatically; a resumed folder keeps what it has stored (see `settle`).
            settings: the settings used, stored for `fisher-vmap finish`.
            overwrite: start anew. Only our own files are removed, and only after the new run is on the disk. Not for
                several processes that fill a folder together.

        Raises:
            UserError: the folder holds results of other settings (all differences are named) or other files, its index
                is damaged, or it cannot be written.
        """
        layout.check()
        check_means_only(layout)
        folder, fingerprint = Path(folder), plain_values(fingerprint)
        inspect_folder(folder, fingerprint, overwrite)
        with readable_write_errors(folder):
            (folder / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        with folder_lock(folder):
            # Inspected again, because another process may have begun the same run meanwhile.
            index = inspect_folder(folder, fingerprint, overwrite)
            if index is None:
                index = Index(
                    shard_size=shard_size,
                    layout=layout,
                    fingerprint=fingerprint,
                    resolved=None if resolved is None else plain_values(resolved),
                    versions=installed_versions(),
                    settings=None if settings is None else plain_values(settings),
                )
                write_index(folder, index)
            else:
                compare_fingerprints(folder, _shape(index.shard_size, index.layout), _shape(shard_size, layout))
                if settings is not None and plain_values(settings) != index.settings:
                    index = index.model_copy(update={"settings": plain_values(settings)})
                    write_index(folder, index)
            if overwrite:
                remove_leftovers(folder, index)
            else:  # shards without an entry are kept, because a worker may be storing them now
                remove_stale(folder)
        _warn_of_other_versions(folder, index)
        writer = cls(folder, index)
        if resolved is not None:
            writer.settle(resolved)
        return writer

    @property
    def index(self) -> Index:
        """What the folder holds, as far as this process knows."""
        return self._listed.with_shards(self._unlisted.values()) if self._unlisted else self._listed

    @property
    def resolved(self) -> dict[str, Any] | None:
        """What the run chose automatically when it began; None as long as nothing is stored."""
        return self._listed.resolved

    def settle(self, resolved: dict[str, Any]) -> dict[str, Any]:
        """Store what was chosen automatically, unless the folder has it already. Returns what is stored.

        A resumed run uses the stored choices, and so repeats the same batches to the same bits.
        """

        def change(index: Index) -> Index:
            new = {} if index.resolved is not None else {"resolved": plain_values(resolved)}
            return index.model_copy(update=new)

        return self._change(change).resolved or {}

    def note(self, name: str, items: Iterable[Any]) -> None:
        """Add what the run learns later, such as batches that were split, to a list of that name in `resolved`."""
        plain = plain_values({name: list(items)})[name]

        def change(index: Index) -> Index:
            known = (index.resolved or {}).get(name, [])
            new = [item for item in plain if item not in known]
            return index.model_copy(update={"resolved": {**(index.resolved or {}), name: sorted([*known, *new])}})

        self._change(change)

    def expect(self, num_prompts: int) -> None:
        """Store the number of prompts, for runs that learn it only at the end of the data."""
        self._change(lambda index: index.expecting(num_prompts))

    def refresh(self) -> Index:
        """List all stored shards in index.json, those of other processes too, and return it."""
        return self._change(lambda index: index)

    def missing_shards(self, num_prompts: int, among: Callable[[int], bool] | None = None) -> list[ShardRange]:
        """The shards still to be computed for the first `num_prompts` prompts, in order.

        Every stored shard is compared with its SHA-256; one that is damaged or deleted is missing. A folder with more
        prompts keeps them. If a finished folder has too few, it becomes unfinished: its full shards are kept, but a
        last one that was not full is computed again, since a shard is one file.

        Args:
            num_prompts: of the whole run.
            among: tells whether this process computes the shard of a number; None: it computes all.
        """
        listed = self.refresh()
        mine = [entry for entry in listed.shards if among is None or among(entry.number)]
        broken = {entry.number: entry for entry in mine if not self._is_intact(entry)}
        for entry in broken.values():
            logger.warning("%s in %s is damaged or missing, and is computed again", entry.file, self.folder)
        sum_is_lost = not sum_is_intact(self.folder, listed) or any(entry.folded for entry in broken.values())
        if sum_is_lost:
            logger.warning("the sum over the first %d shards in %s cannot be used: they are computed again",
                           listed.folded, self.folder)  # fmt: skip

        def change(index: Index) -> Index:
            if sum_is_lost and index.folded == listed.folded:
                remove_entries(self.folder, range(listed.folded))
                index = index.unfolded()
            gone = [number for number, entry in broken.items() if index.find(number) == entry]
            remove_entries(self.folder, gone)
            return (index.with_shards(removed=gone) if gone else index).expecting(num_prompts)

        index = self._change(change)
        total, size = index.num_prompts or 0, index.shard_size
        if total > num_prompts:
            logger.info("%s already holds %d prompts; they are kept", self.folder, total)
        ranges = [ShardRange(n, n * size, min((n + 1) * size, total)) for n in index.missing(total)]
        return [shard for shard in ranges if among is None or among(shard.number)]

    def is_stored(self, number: int, start: int, stop: int) -> bool:
        """Whether shard `number` is stored intact with the prompts [start, stop)."""
        entry = self._unlisted.get(number) or self._listed.find(number)
        entry = entry or read_entry(self.folder, number, self._listed.mark)
        return entry is not None and entry.start == start and entry.stop >= stop and self._is_intact(entry)

    def add(self, number: int, results: Sequence[PromptResult]) -> ShardEntry:
        """Store a computed shard on the disk. If another process has stored it meanwhile, that one is kept.

        Raises:
            ValueError: the prompts are not those of shard `number`, or an array does not fit the layout.
            UserError: the folder cannot be written, the disk is full, or another run has replaced this one.
        """
        size = self._listed.shard_size
        if not 0 < len(results) <= size or results[0].index != number * size:
            raise ValueError(f"shard {number} begins with prompt {number * size} and holds at most {size}")
        with stage_shard(self.folder, number, results, self._listed.layout) as shard, folder_lock(self.folder):
            self._read_if_changed()
            listed = self._listed.find(number)
            if listed is not None and listed.stop >= shard.entry.stop and passes(check_sizes, self.folder, listed):
                return listed
            entry = shard.commit(self.folder, self._listed.mark)
            if entry == shard.entry:
                self._intact.add(entry)
            self._list([entry])
            return entry

    def record(self, entries: Iterable[ShardEntry]) -> None:
        """List shards that workers have stored with `write_shard`; raises UserError if a file is missing."""
        added = list(entries)
        for entry in added:
            check_sizes(self.folder, entry)
        with folder_lock(self.folder):
            self._read_if_changed()
            self._list(added)

    def finish(
        self,
        num_prompts: int | None = None,
        *,
        settings: dict[str, Any] | None = None,
        save: Save = "both",
        export_npz: bool = True,
    ) -> Index:
        """Write prompts.parquet, mean.safetensors, the npz and metadata.yaml, and mark the folder complete.

        Files that are there already and intact are kept, so that a process killed here can simply be run again.

        Args:
            num_prompts: by default the number that `missing_shards` was called with.
            settings: the settings used, for metadata.yaml; None: those in the index.
            save: "both", "prompts" to leave the mean out, or "mean" to leave the prompts' matrices out.
            export_npz: write the npz, about twice as large as the shards.

        Returns:
            The index of the finished folder.

        Raises:
            UserError: a shard is missing or damaged, the disk is full, or another run has replaced this one.
        """
        folder = self.folder
        with step("finishing the folder"), folder_lock(folder):
            index = read_index(folder)
            compare_fingerprints(folder, index.fingerprint, self._listed.fingerprint)
            total = max(index.num_prompts or 0 if num_prompts is None else num_prompts, index.stop)
            if missing := index.missing(total):
                numbers = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
                raise UserError(
                    f"{folder} lacks {len(missing)} shards ({numbers}) of its {total} prompts; give the command of its "
                    f"run again, with num_prompts {total} or more"
                )
            names = product_names(index, save, export_npz)
            index = fold(folder, index, least=1)
            intact = {
                name: entry
                for name in names
                if (entry := index.files.get(name)) and passes(check_sha256, folder / name, entry.bytes, entry.sha256)
            }
            if not (index.complete and set(intact) == set(names) == set(index.files)):
                # metadata.yaml, the last, is written again with any other file, since the settings may have changed.
                files = {name: entry for name, entry in intact.items() if name != names[-1]}
                index = index.model_copy(update={"complete": False, "num_prompts": total, "files": files})
                write_index(folder, index)
                used = (index.settings or {}) if settings is None else settings
                for line in why_no_mean(index.layout):
                    logger.info(line)
                for name in names:
                    if name not in files:
                        files = dict(sorted({**files, name: write_product(folder, name, index, used)}.items()))
                        index = index.model_copy(update={"files": files, "complete": len(files) == len(names)})
                        write_index(folder, index)
            remove_leftovers(folder, index)
            self._keep(index)
        return index

    def _is_intact(self, entry: ShardEntry) -> bool:
        """Compare a shard with its SHA-256, once in this process; afterwards look only at the files' sizes."""
        if entry in self._intact:
            return passes(check_sizes, self.folder, entry)
        intact = passes(ShardReader(self.folder, entry, self._listed.layout).check_sha256)
        if intact:
            self._intact.add(entry)
        return intact

    def _change(self, change: Callable[[Index], Index]) -> Index:
        """Apply a change to what the folder holds now, and write index.json if it differs."""
        with folder_lock(self.folder):
            before = read_index_file(self.folder)
            compare_fingerprints(self.folder, before.fingerprint, self._listed.fingerprint)
            changed = change(read_index(self.folder))
            if changed != before:
                write_index(self.folder, changed)
            self._keep(changed)
        return changed

    def _keep(self, index: Index) -> None:
        """Remember what index.json lists now."""
        self._listed, self._unlisted, self._signature = index, {}, _signature(self.folder)

    def _read_if_changed(self) -> None:
        """Read index.json if another process has written it. The caller holds the lock."""
        if _signature(self.folder) != self._signature:
            index, unlisted = read_index_file(self.folder), self._unlisted
            compare_fingerprints(self.folder, index.fingerprint, self._listed.fingerprint)
            self._keep(index)
            self._unlisted = {number: entry for number, entry in unlisted.items() if index.lacks(entry)}

    def _list(self, entries: Sequence[ShardEntry]) -> None:
        """Take stored shards in, fold full ones if only means are kept, and write index.json when it lacks too many.

        The caller holds the lock.
        """
        for entry in entries:
            self._stored += 1
            if self._listed.lacks(entry):
                self._unlisted[entry.number] = entry
        if self._listed.layout.means_only:
            # The shards in between may be other processes', whose entries are read from time to time.
            index = read_index(self.folder) if self._stored % LAG == 0 else self.index
            folded = fold(self.folder, index)
            if folded is not index:
                self._keep(folded)
                self._intact.update(folded.shards[: folded.folded])  # folding compares checksums
        if self._unlisted and len(self._unlisted) * LAG >= len(self._listed.shards):
            index = self.index
            write_index(self.folder, index)
            self._keep(index)


def _shape(shard_size: int, layout: ShardLayout) -> dict[str, Any]:
    """The shards' shapes as settings, so that differences are compared and named like those of the fingerprint."""
    # A resumed folder keeps the columns and the norms that it began with.
    shape = layout.model_dump(exclude={"attribution", "median_norm"})
    return {"shard_size": shard_size, "save": "mean" if shape.pop("means_only") else "both or prompts", **shape}


def _signature(folder: Path) -> object:
    """A value that changes when index.json is replaced."""
    try:
        found = (folder / INDEX_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _warn_of_other_versions(folder: Path, index: Index) -> None:
    """Warn if the run was begun with other versions of packages, or with a setting that no longer exists."""
    stored, here = index.versions, installed_versions()
    if other := [f"{name} {stored[name]} (now {here.get(name)})" for name in stored if here.get(name) != stored[name]]:
        logger.warning("%s was begun with %s: numbers may differ in their last digits", folder, ", ".join(other))
    for name in RETIRED:
        if name in index.fingerprint:
            what = "may differ in their last digits" if (index.resolved or {}).get(name) is True else "are the same"
            logger.warning("%s was begun with the setting %s, which is gone: numbers %s", folder, name, what)
