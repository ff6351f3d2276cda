"""One process at a time changes index.json, and all that fill the folder can be told: file locks that die with them."""

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fisher_vmap.storage.atomic import readable_write_errors

try:
    import fcntl
except ImportError:  # Windows: files stay whole without the lock; only simultaneous runs in one folder need it
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
AT_WORK_NAME = ".at-work"
POLL_S = 0.02
SAY_SO_AFTER_S = 5.0

logger = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder for the length of the block, waiting for another process if need be.

    The kernel drops the lock when its holder dies, whatever kills it; the empty file `.lock` stays and means nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    with readable_write_errors(folder):
        file = open(folder / LOCK_NAME, "ab")  # noqa: SIM115 (closed below, after the block)
    try:
        _acquire(file, folder)
        yield
    finally:
        _release(file)


@contextmanager
def at_work(folder: Path) -> Iterator[bool]:
    """For the length of the block others can tell that this process fills the folder; gives whether one does already.

    A lock that all of them share, and that the kernel drops when its holder dies: who could have it alone is alone.
    Where there are no locks nobody is seen. The file goes with the last of them.
    """
    with ExitStack() as stack:
        others = False
        try:
            file = stack.enter_context(open(folder / AT_WORK_NAME, "a+b"))
            others = not _has_alone(file)
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH)  # in place of the other; who stands in the way is looking, and no more
                stack.callback(_leave, file, folder)
        except OSError as error:
            logger.debug("no telling who else fills %s: %s", folder, error)
        yield others


def _has_alone(file: BinaryIO) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave(file: BinaryIO, folder: Path) -> None:
    with suppress(OSError):
        if _has_alone(file):
            (folder / AT_WORK_NAME).unlink(missing_ok=True)


def _acquire(file: BinaryIO, folder: Path) -> None:
    if fcntl is None:
        return
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not said and time.monotonic() - started > SAY_SO_AFTER_S:
                logger.info("waiting for another process that is writing to %s", folder)
                said = True
            time.sleep(POLL_S)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            logger.warning(
                "the file system of %s has no locks: start a second process when the first one has stored a shard, "
                "and keep means (save: mean) by one alone",
                folder,
            )
            return


def _release(file: BinaryIO) -> None:
    # Unlocked by name, not only by closing: a child forked meanwhile would hold a copy of the descriptor.
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_UN)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
    file.close()
