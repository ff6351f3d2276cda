"""A worker of a run on Ray: it loads the model once, then computes shards by their numbers.

It writes shards to the results folder, which all machines share, and returns a small account of each; the driver keeps
index.json. A file next to the shards counts a shard's failed attempts, one byte each: Ray restarts dead processes, but
cannot tell a lost node from a prompt that kills every process.
"""

import os
import socket
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fisher_vmap.errors import UserError
from fisher_vmap.results.files import readable_write_errors
from fisher_vmap.results.index import SHARD_FOLDER, read_entry
from fisher_vmap.results.record import PromptResult
from fisher_vmap.results.shard import write_shard
from fisher_vmap.run.compute import compute_shards
from fisher_vmap.run.open import model_of, open_run, source_of
from fisher_vmap.run.settings import Settings


def begin_shard(folder: Path, number: int) -> None:
    """Count an attempt at the shard.

    Raises:
        UserError: the folder cannot be written.
    """
    with readable_write_errors(folder), open(_path(folder, number), "ab") as file:
        file.write(b".")


def times_begun(folder: Path, number: int) -> int:
    """The number of attempts that did not end."""
    try:
        return _path(folder, number).stat().st_size
    except OSError:
        return 0


def end_shard(folder: Path, number: int) -> None:
    """Forget the attempts: the shard is stored, or it failed with a reason."""
    with suppress(OSError):
        _path(folder, number).unlink()


def forget(folder: Path) -> None:
    """Forget all attempts, for a run that is started again."""
    for path in (folder / SHARD_FOLDER).glob(".begun-*"):
        with suppress(OSError):
            path.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / SHARD_FOLDER / f".begun-{number:05d}"


MOST_DEATHS = 3  # of processes on one shard, before it is given up


def begin(settings: Settings, device_share: float) -> None:
    """Open the run once before there are workers: this checks everything, and stores the automatic choices.

    Raises:
        UserError: as `open_run`.
    """
    run = open_run(settings, model_of(settings), source_of(settings), device_share=device_share)
    forget(run.writer.folder)


class ShardWorker:
    """Computes shards of a run that `begin` opened."""

    def __init__(self, settings: Settings, device_share: float) -> None:
        self.run = open_run(settings, model_of(settings), source_of(settings), device_share=device_share)
        self._notes: list[tuple[str, list[Any]]] = []
        self.run.notes.store = lambda name, item: self._notes.append((name, item))  # the driver stores them

    def __call__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Compute and store the shards of these numbers that are not stored yet.

        Returns:
            An account of each: "number"; "entry", its entry in the index, or "error", why it has none; "user_error",
            whether the user can fix that; "prompts" and "tokens" that were computed; "notes" for the run's index, as
            pairs of a list's name and an item.
        """
        begun = [times_begun(self.run.writer.folder, number) for number in numbers]
        try:
            if len(numbers) == 1 and begun[0] >= MOST_DEATHS:
                raise UserError(f"{begun[0]} processes have died over it, as they do where memory runs out")
            if len(numbers) == 1 or not any(begun):
                return self._compute(numbers)
        except Exception as error:
            if len(numbers) == 1:
                return [self._failed(numbers[0], error)]
        # One of several failed or killed a process: try each alone. Stored ones are not computed again.
        return [account for number in numbers for account in self([number])]

    def _compute(self, numbers: list[int]) -> list[dict[str, Any]]:
        index, folder = self.run.writer.index, self.run.writer.folder

        def store(number: int, results: Sequence[PromptResult]) -> None:
            write_shard(folder, number, results, index.layout, index.mark)

        for number in numbers:
            begin_shard(folder, number)
        accounts = []
        # A list, since a shard is stored only when the next account has come.
        for done in list(compute_shards(self.run, store, lambda step: None, iter(numbers))):
            entry = read_entry(folder, done.number, index.mark)
            assert entry is not None, f"shard {done.number} was written, but its entry is not there"
            end_shard(folder, done.number)
            accounts.append(
                {"number": done.number, "prompts": done.prompts, "tokens": done.tokens, "entry": entry.model_dump()}
            )
        if len(accounts) < len(numbers):
            raise UserError(f"the data ended before shard {numbers[len(accounts)]}: were they changed during the run?")
        accounts[0]["notes"] = self._notes.copy()
        self._notes.clear()
        return accounts

    def _failed(self, number: int, error: Exception) -> dict[str, Any]:
        end_shard(self.run.writer.folder, number)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, UserError) else f" ({os.path.basename(place.filename)}, line {place.lineno})"
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return {
            "number": number,
            "error": f"{kind}{' '.join(str(error).split())}{where}",
            "user_error": isinstance(error, UserError),
            "worker": f"process {os.getpid()} on {socket.gethostname()}",
        }
