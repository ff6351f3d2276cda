"""How often a shard has been begun and not stored: what a process that dies over it leaves behind, a byte a time.

Who starts a dead process anew cannot tell a node that was lost from a prompt that kills whoever computes it.
"""

from contextlib import suppress
from pathlib import Path

from fisher_vmap.storage.atomic import readable_write_errors
from fisher_vmap.storage.entries import SHARD_FOLDER


def begin_shard(folder: Path, number: int) -> None:
    """Note that the shard is begun.

    Raises:
        UserError: the folder cannot be written.
    """
    with readable_write_errors(folder), open(_path(folder, number), "ab") as file:
        file.write(b".")


def times_begun(folder: Path, number: int) -> int:
    """How often it has been begun and not ended."""
    try:
        return _path(folder, number).stat().st_size
    except OSError:
        return 0


def end_shard(folder: Path, number: int) -> None:
    """Forget that it was begun: it is stored, or it failed with a reason."""
    with suppress(OSError):
        _path(folder, number).unlink()


def forget(folder: Path) -> None:
    """Forget all of it: a run that is started again may try everything anew."""
    for path in (folder / SHARD_FOLDER).glob(".begun-*"):
        with suppress(OSError):
            path.unlink()


def _path(folder: Path, number: int) -> Path:
    return folder / SHARD_FOLDER / f".begun-{number:05d}"
