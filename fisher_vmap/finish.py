"""`python -m fisher_vmap.finish DIR`: finish a folder whose shards are all there, as after an interrupted last step."""

import sys

if __name__ == "__main__":
    from fisher_vmap.__main__ import start

    sys.exit(start("finish"))

import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path

from fisher_vmap.cli import command, folder_command
from fisher_vmap.errors import UserError
from fisher_vmap.results.index import Index, read_index
from fisher_vmap.results.outputs import note_on_targets, wants_npz
from fisher_vmap.results.writer import ResultsWriter


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Finish a results folder; returns the exit code."""
    what = "Write a results folder's index, table, mean and npz from its shards, once all of them are there."
    return folder_command("finish", what, _lines, argv)


def _lines(folder: Path) -> Iterator[str]:
    index = finish(folder)
    yield f"{folder} is complete: {index.stop:,} prompts in {len(index.shards):,} shards"
    if note := note_on_targets(folder, index):
        yield note


def finish(folder: Path) -> Index:
    """Write the files made from all shards, by the settings of the run that filled the folder.

    Returns:
        The index of the finished folder.

    Raises:
        UserError: this is not a results folder, a shard is missing or damaged, or the folder cannot be written.
    """
    folder = Path(os.path.expanduser(folder))
    index = read_index(folder)
    if index.settings is None or index.num_prompts is None:
        raise UserError(f"{folder} does not say yet how many prompts its run has; give the command of its run again")
    save, npz = index.settings["save"], index.settings["export_npz"]
    npz = wants_npz(npz, save, max(index.num_prompts, index.stop))
    return ResultsWriter(folder, index).finish(save=save, export_npz=npz)
