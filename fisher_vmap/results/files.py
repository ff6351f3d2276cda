"""One process at a time changes index.json, and all that fill the folder can be told: file locks that die with them.

Files that are whole or not there: written under a temporary name beside the target, flushed, then renamed.

Is a file still what was written? One kind of answer: silence, or a UserError that names the file.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fisher_vmap.errors import UserError

# ".<final name>~<host>~<process>~<random>.tmp": who wrote it can be told from the name alone.
TEMPORARY_NAME = re.compile(r"^\.(?P<name>.+)~(?P<host>[^~]+)~(?P<process>\d+)~[0-9a-f]{12}\.tmp$")
STALE_AFTER_S = 24 * 3600.0

_HOST = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "host"
_live_temporaries: set[Path] = set()


class Staged:
    """A file under its temporary name. Nothing of that name shows in the folder until `commit`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}~{_HOST}~{os.getpid()}~{secrets.token_hex(6)}.tmp")
        self.committed = False
        _live_temporaries.add(self.temporary)  # first, or another thread could take the file for a dead one's
        self.file: BinaryIO = open(self.temporary, "xb")  # noqa: SIM115 (closed by commit or discard)

    def digest(self) -> tuple[str, int]:
        """SHA-256 and size in bytes of what has been written so far."""
        self.file.flush()
        return sha256_of(self.temporary), self.temporary.stat().st_size

    def commit(self) -> None:
        """Give the file its name: after this it survives a power cut, before it the old file does."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        self.committed = True
        flush_directory(self.path.parent)

    def discard(self) -> None:
        """Close, and remove the temporary file unless it was committed."""
        _live_temporaries.discard(self.temporary)
        # On a full disk closing flushes, and fails, once more; the first error is the one to show.
        with suppress(OSError):
            self.file.close()
        if not self.committed:
            with suppress(OSError):
                self.temporary.unlink()


@contextmanager
def staged(path: Path) -> Iterator[Staged]:
    """Open a `Staged` file for `path`; what is not committed when the block ends is removed.

    Raises:
        UserError: the operating system refuses to write there, in one line that says why.
    """
    with readable_write_errors(path):
        stage = Staged(path)
        try:
            yield stage
        finally:
            stage.discard()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Write the whole of `path` in one block; it replaces the old file only when the block ends without an error.

    Raises:
        UserError: as `staged`.
    """
    with staged(path) as stage:
        yield stage.file
        stage.commit()


@contextmanager
def readable_write_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says while `path` is written into one line for the user.

    Raises:
        UserError: in place of any `OSError` of the block.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from error


def _write_error(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"no space left to write {path}; free some and run the same command again: what is finished is kept"
        )
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return UserError(f"cannot write {path}: {reason}; choose an --output_dir that can be written")


def flush_directory(folder: Path) -> None:
    """Make the names in `folder` durable: a rename lives in the directory, not in the file."""
    if os.name == "nt":  # Windows opens no directories, and its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files whose writer is dead. Returns how many there were.

    A writer on another machine that shares the folder cannot be asked whether it lives, so its files go only after a
    day without a change.
    """
    removed = 0
    for path in folder.iterdir():
        if (match := TEMPORARY_NAME.match(path.name)) and path not in _live_temporaries:
            with suppress(FileNotFoundError):  # another process may tidy up at the same time
                dead = match["host"] == _HOST and not _is_another_live_process(int(match["process"]))
                if dead or time.time() - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()
                    removed += 1
    return removed


def _is_another_live_process(process: int) -> bool:
    if process == os.getpid():
        # Ours, yet not among our live files: left by an earlier process of the same number (usual in containers).
        return False
    if os.name == "nt":  # os.kill(pid, 0) would be a Ctrl-C there; wait for the day instead
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def damaged(path: Path, reason: str) -> UserError:
    """The error for a results file that is missing or not as it was written."""
    return UserError(f"{path} is damaged: {' '.join(reason.split())}; run the same command again to mend it")


def check_size(path: Path, size: int) -> None:
    """Raise UserError unless the file is there with `size` bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise damaged(path, (error.strerror or str(error)).lower()) from error
    if found != size:
        raise damaged(path, f"it has {found} bytes instead of {size}")


def check_sha256(path: Path, size: int, sha256: str) -> None:
    """Raise UserError unless the file has this size and SHA-256."""
    check_size(path, size)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise damaged(path, (error.strerror or str(error)).lower()) from error
    _compare(path, found, sha256)


def read_checked(path: Path, size: int, sha256: str, verify: bool = True) -> bytes:
    """The whole file, raising UserError unless it has this size and, with `verify`, this SHA-256."""
    check_size(path, size)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, (error.strerror or str(error)).lower()) from error
    if verify:
        _compare(path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise damaged(path, "its SHA-256 differs from the index")


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
