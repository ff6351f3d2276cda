"""The prompts of a run: which rows and column of which data set, in order, and which are skipped and why."""

from __future__ import annotations

import logging
import os.path
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fisher_vmap.data.answers import Answers
from fisher_vmap.data.conversations import Message, SkippedPrompt, extract_prompt
from fisher_vmap.data.files import Count, Extent, Table, spelt_as_path, table_of_files
from fisher_vmap.data.formats import Form, check_column, form_of
from fisher_vmap.data.local_files import EXPECTED, check_suffix, kind_of, refuse_results, refuse_results_table
from fisher_vmap.errors import UserError, listed

_log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_FORMATS = ("json", "csv", "parquet", "text", "arrow")  # to the `datasets` library these are not names of data sets
_MISSPELT = {"lmsys/lm-sys-chat-1m": "lmsys/lmsys-chat-1m"}


def open_table(name: str, *, config: str | None, split: str, revision: str | None, shuffle_seed: int | None) -> Table:
    """Open the data set of this name.

    Args:
        name: a path, or a hub id.
        config: configuration (subset) of a hub data set or folder; None: the default one.
        split: split of a hub data set or folder.
        revision: branch, tag or commit of a hub data set.
        shuffle_seed: of a hub data set, whose rows are shuffled as they come.

    Raises:
        UserError: no such data set, one that cannot be read, or a choice that this kind of data set does not have.
    """
    path, exists = Path(name), os.path.exists(name)  # unlike Path.exists, it accepts any name
    if exists or kind_of(path) is not None or spelt_as_path(name):
        if not exists:
            raise UserError(f"{name}: no such file or folder; correct dataset_name")
        if revision is not None:
            raise UserError(f"{name}: a local data set has no revisions; leave dataset_revision at none")
        refuse_results(name, path)
        if path.is_dir():
            from fisher_vmap.data.datasets import open_folder

            return open_folder(path, config=config, split=split)
        if not path.is_file():
            raise UserError(f"{name}: neither a file nor a folder; correct dataset_name")
        if config is not None or split != "train":
            raise UserError(f"{name}: one file has no splits; leave dataset_config at none and dataset_split at train")
        check_suffix(path)
        return table_of_files(name, [path])
    if name in _FORMATS or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name}: not a data set; expected a hub id such as lmsys/lmsys-chat-1m, a folder, or a file: {EXPECTED}"
        )
    if name in _MISSPELT:
        _log.info("dataset_name %s is taken for %s", name, _MISSPELT[name])
        name = _MISSPELT[name]
    from fisher_vmap.data.datasets import open_hub

    return open_hub(name, config=config, split=split, revision=revision, shuffle_seed=shuffle_seed)


@dataclass(frozen=True, slots=True)
class SourcePrompt:
    """One prompt as it stands in the data set.

    Attributes:
        index: its position in this run, from 0; skipped prompts count.
        source_row: the number of its row in the data set, from 0; in a shuffled stream, its position in that.
        messages_or_text: the turns that lead up to the answer, or a text; None if the prompt is skipped.
        kept: the values of `keep_columns`.
        skipped: why the prompt is skipped, or None.
        completion: a text or an assistant's message, if completions were asked for.
    """

    index: int
    source_row: int
    messages_or_text: list[Message] | str | None
    kept: dict[str, Any]
    skipped: str | None
    completion: str | Message | None = None


class PromptSource:
    """The prompts of a run, made by `read_prompts`. Each iteration reads the data set from the start.

    Attributes:
        column: the name of the column that holds the prompts; of several, their names in one text.
        fingerprint: the same text for the same data, another for other data; without the choice of rows and columns.
        total: the number of prompts; None for a data set of the hub, where it is only known at the end.
        completions: where the completions are, in words; None: none were asked for.
    """

    def __init__(
        self,
        table: Table,
        *,
        form: Form,
        answers: Answers | None,
        keep_columns: Sequence[str],
        conversation: Literal["first_turn", "full"],
        offset: int,
        limit: int | None,
        shuffle_seed: int | None,
    ) -> None:
        """Check that there are prompts; a local data set is read once, as far as the run needs it.

        Raises:
            UserError: there is no prompt to read, or a row on the way to the last one cannot be read.
        """
        self.column = form.column
        self.fingerprint = table.fingerprint
        self.total: int | None = None
        self.completions = None if answers is None else answers.words
        self._table = table
        self._columns = list(dict.fromkeys([*form.columns, *(answers.columns if answers else ()), *keep_columns]))
        self._form, self._answers = form, answers
        self._keep_columns = keep_columns
        self._conversation = conversation
        self._offset = offset
        self._stop = None if limit is None else offset + limit
        self._shuffled = shuffle_seed is not None
        self._count: Count | None = None  # of the table's rows, once it is known
        self._order: np.ndarray | None = None
        self._begun: Iterator[tuple[int, object]] | None = None
        if table.local:
            count = sum(1 for _ in islice(table.read(self._columns), self._stop if shuffle_seed is None else None))
            if shuffle_seed is not None:
                # NumPy promises that this older generator's numbers never change: a run can be resumed years later.
                self._order = np.random.RandomState(shuffle_seed).permutation(count)[offset : self._stop]
            if self._stop is None or self._shuffled or count < self._stop:
                self._count = Count(count, exact=True)
            self.total = max(0, (count if self._stop is None else min(count, self._stop)) - offset)
            if self.total == 0:
                raise UserError(f"{table.name}: offset {offset} leaves no prompts of {count} rows; lower offset")
        else:
            rows = self._rows()
            first = next(rows, None)
            if first is None:
                after = f" after offset {offset}; lower offset" if offset else "; expected at least one prompt"
                raise UserError(f"{table.name}: holds no rows{after}")
            form.check(table.name, first[1])
            self._begun = chain([first], rows)  # starting a stream twice is expensive

    def extent(self, taken: int | None = None) -> Extent:
        """Which part of the data set the run takes; this may count the rows of local files, for a few seconds at most.

        Args:
            taken: the number of prompts, where the end of a stream has been read.
        """
        limit = None if self._stop is None else self._stop - self._offset
        if taken is not None and (limit is None or taken < limit):  # the data have ended, whatever the hub says
            self._count = Count(self._offset + taken, exact=True)
        self._count = self._count or self._table.counted()
        taken = self.total if taken is None else taken
        if taken is None:
            left = None if self._count is None else max(0, self._count.rows - self._offset)
            taken = min((count for count in (limit, left) if count is not None), default=None)
        return Extent(taken, self._count, self._offset, self._shuffled, limited=limit is not None and taken == limit)

    def __iter__(self) -> Iterator[SourcePrompt]:
        """Yield the prompts in order, skipped ones included.

        Raises:
            UserError: a row cannot be read.
        """
        rows, self._begun = self._begun or self._rows(), None
        for index, (source_row, row) in enumerate(rows):
            prompt, skipped, kept, completion = None, None, {}, None
            if isinstance(row, dict):
                kept = {name: _storable(row.get(name)) for name in self._keep_columns}
                try:
                    prompt = extract_prompt(self._form.prompt(row), self._conversation)
                    completion = None if self._answers is None else self._answers.of(row)
                except SkippedPrompt as reason:
                    skipped = str(reason)
            else:
                kept = dict.fromkeys(self._keep_columns)
                skipped = f"the row is not an object but {type(row).__name__}"
            yield SourcePrompt(index, source_row, prompt, kept, skipped, completion)

    def _rows(self) -> Iterator[tuple[int, object]]:
        numbered = enumerate(self._table.read(self._columns))
        if self._order is None:
            return islice(numbered, self._offset, self._stop)
        return self._shuffled_rows(numbered)

    def _shuffled_rows(self, numbered: Iterator[tuple[int, object]]) -> Iterator[tuple[int, object]]:
        # Files are read in their own order; only the rows of the run are kept in memory.
        assert self._order is not None
        wanted = set(self._order.tolist())
        held = {number: row for number, row in numbered if number in wanted}
        for number in self._order.tolist():
            yield number, held.pop(number)


class ShardPrompts:
    """The prompts of each shard, read from the data set in order; going back starts it again.

    Attributes:
        total: the number of prompts; for a stream, None until the end has been read.
    """

    def __init__(self, source: PromptSource, shard_size: int) -> None:
        self.total = source.total
        self._source, self._size = source, shard_size
        self._stream: Iterator[SourcePrompt] = iter(())
        self._place = -1  # in prompts; before the first reading
        self._last: tuple[int, list[SourcePrompt]] = (-1, [])

    def of(self, number: int) -> list[SourcePrompt]:
        """The prompts of a shard: fewer than its size, or none, at the end of the data.

        Raises:
            UserError: a row cannot be read.
        """
        if self._last[0] == number:
            return self._last[1]
        start = number * self._size
        if not 0 <= self._place <= start:
            self._stream, self._place = iter(self._source), 0
        self._place += sum(1 for _ in islice(self._stream, start - self._place))
        prompts = list(islice(self._stream, self._size)) if self._place == start else []
        self._place += len(prompts)
        if len(prompts) < self._size:
            self.total = self._place
        self._last = number, prompts
        return prompts


def _storable(value: Any) -> Any:
    """Replace half surrogate pairs, which JSON can spell and no file can store."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_storable(item) for item in value]
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return value


def read_prompts(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    num_prompts: int | Literal["all"] = "all",
    offset: int = 0,
    shuffle_seed: int | None = None,
    prompt_column: str = "auto",
    prompt_template: str | None = None,
    keep_columns: Sequence[str] | None = None,
    conversation: Literal["first_turn", "full"] = "first_turn",
    completions: bool = False,
    completion_column: str | None = None,
) -> PromptSource:
    """Open a data set and choose its prompts.

    A hub data set is streamed, and read only as far as needed. A local one is read row by row; shuffling keeps the
    run's rows in memory. The order of a seed does not depend on `num_prompts`.

    Args:
        dataset_name: a hub id, a folder, or a file of one of `local_files.SUFFIXES` (.txt: one prompt a line).
        dataset_config: configuration (subset) of a hub data set or folder.
        dataset_split: split of a hub data set or folder.
        dataset_revision: branch, tag or commit of a hub data set.
        num_prompts: how many rows make up the run.
        offset: rows to skip first, after shuffling.
        shuffle_seed: seed of a random order: of all rows of a local data set; for the hub, within a moving window.
        prompt_column: the column, or "auto": the format is recognised by the columns (`formats.py`).
        prompt_template: a prompt out of several columns, such as "{context} {question}".
        keep_columns: further columns that are kept with each prompt.
        conversation: as for `extract_prompt`.
        completions: whether each prompt needs its completion as well.
        completion_column: the column with it; None: the assistant turn, or a column that is known for completions.

    Returns:
        The prompts, an iterable of `SourcePrompt`.

    Raises:
        UserError: the data set is missing, gated, empty or damaged, or has no such column, split or revision.
    """
    table = open_table(
        dataset_name, config=dataset_config, split=dataset_split, revision=dataset_revision, shuffle_seed=shuffle_seed
    )
    refuse_results_table(table.name, table.columns)
    form = form_of(table.name, table.columns, prompt_column, prompt_template)
    for name in keep_columns or ():
        check_column(table.name, table.columns, name, "keep_columns")
    if table.local:
        form.check(table.name, next(iter(table.read(form.columns)), None))
    answers = None
    if completions:
        answers = Answers(table.name, table.columns, form, completion_column, conversation)
        _log.info("completions are %s (completion_column takes another column)", answers.words)
    used = answers.columns if answers else ()
    unused = [name for name in table.columns if name not in {*form.columns, *used, *(keep_columns or ())}]
    _log.info(
        "prompts are read from column%s %s of %s%s%s",
        "s" if len(form.columns) > 1 else "",
        " and ".join(map(repr, form.columns)),
        table.name,
        f" ({form.words})" if form.words else "",
        f"; not used: {listed(unused)} (prompt_column or prompt_template takes others)" if unused else "",
    )
    return PromptSource(
        table,
        form=form,
        answers=answers,
        keep_columns=tuple(keep_columns or ()),
        conversation=conversation,
        offset=offset,
        limit=None if num_prompts == "all" else num_prompts,
        shuffle_seed=shuffle_seed,
    )
