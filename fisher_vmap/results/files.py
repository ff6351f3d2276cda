"""Files that are written whole or not at all, checks that they are unchanged, and the locks of a results folder."""

import errno
import hashlib
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fisher_vmap.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no file locks here: only one process at a time should use a folder
    fcntl = None  # type: ignore[assignment]

# ".<final name>~<host>~<process>~<random>.tmp": the name tells which process is writing the file.
TEMPORARY_NAME = re.compile(r"^\.(?P<name>.+)~(?P<host>[^~]+)~(?P<process>\d+)~[0-9a-f]{12}\.tmp$")
STALE_AFTER_S = 24 * 3600.0

LOCK_NAME = ".lock"
AT_WORK_NAME = ".at-work"
POLL_S = 0.02
SAY_SO_AFTER_S = 5.0

_HOST = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()) or "host"
_live_temporaries: set[Path] = set()

logger = logging.getLogger(__name__)


class Staged:
    """A file that is written under a temporary name and gets its own name with `commit`."""

    def __init__(self, path: Path) -> None:
        path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link stays one
        if not path.name:  # "." and "/"
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        self.path = path
        self.temporary = path.with_name(f".{path.name}~{_HOST}~{os.getpid()}~{secrets.token_hex(6)}.tmp")
        self.committed = False
        _live_temporaries.add(self.temporary)  # before the file exists, or another thread could remove it as stale
        self.file: BinaryIO = open(self.temporary, "xb")  # noqa: SIM115 (closed by commit or discard)

    def digest(self) -> tuple[str, int]:
        """SHA-256 and size in bytes of what has been written so far."""
        self.file.flush()
        return sha256_of(self.temporary), self.temporary.stat().st_size

    def commit(self) -> None:
        """Replace the old file. A power cut before this leaves the old file, one after it the new file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)
        self.committed = True
        _flush_directory(self.path.parent)

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
    """Open a `Staged` file for `path`. If the block ends without a commit, the file is removed."""
    with readable_write_errors(path):
        stage = Staged(path)
        try:
            yield stage
        finally:
            stage.discard()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when the block ends without an error; a pipe or a device is written to."""
    if is_stream(path):
        with readable_write_errors(path), open(path, "wb") as file:
            yield file
        return
    with staged(path) as stage:
        yield stage.file
        stage.commit()


def is_stream(path: Path) -> bool:
    """Whether there is something at `path` that is neither a file nor a folder, such as a pipe or /dev/stdout."""
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def readable_write_errors(path: Path, todo: str = "choose a place that can be written") -> Iterator[None]:
    """Turn any `OSError` of the block into a UserError: one line that says why `path` cannot be written, and `todo`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"no space left to write {path}; free some and run the same command again: what is finished is kept"
            ) from error
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        raise UserError(f"cannot write {path}: {reason}; {todo}") from error


def _flush_directory(folder: Path) -> None:
    """Make a rename durable: it is stored in the directory, not in the file."""
    if os.name == "nt":  # Windows cannot open directories, and its renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot flush a directory
            raise
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path) -> int:
    """Remove temporary files whose writer has died, and return how many.

    Whether a process on another machine is alive is not known, so its files are removed after a day without a change.
    """
    removed = 0
    for path in folder.iterdir():
        if (match := TEMPORARY_NAME.match(path.name)) and path not in _live_temporaries:
            with suppress(FileNotFoundError):  # another process may be removing the same files
                dead = match["host"] == _HOST and not _is_another_live_process(int(match["process"]))
                if dead or time.time() - path.stat().st_mtime > STALE_AFTER_S:
                    path.unlink()
                    removed += 1
    return removed


def _is_another_live_process(process: int) -> bool:
    if process == os.getpid():
        # Not among our live files, so an earlier process had the same number, as is usual in containers.
        return False
    if os.name == "nt":  # os.kill(pid, 0) would be a Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits, read as a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(path: Path, reason: object) -> UserError:
    """The error for a results file that is missing or changed."""
    if isinstance(reason, OSError):
        reason = (reason.strerror or str(reason)).lower()
    return UserError(
        f"{path} is damaged: {' '.join(str(reason).split())}; give the command of its run again to mend it"
    )


def check_size(path: Path, size: int) -> None:
    """Raise UserError unless the file exists with `size` bytes."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise damaged(path, error) from error
    if found != size:
        raise damaged(path, f"it has {found} bytes instead of {size}")


def check_sha256(path: Path, size: int, sha256: str) -> None:
    """Raise UserError unless the file has this size and SHA-256."""
    check_size(path, size)
    try:
        found = sha256_of(path)
    except OSError as error:
        raise damaged(path, error) from error
    _compare(path, found, sha256)


def read_checked(path: Path, size: int, sha256: str, verify: bool = True) -> bytes:
    """Read a file; raise UserError unless it has this size and, with `verify`, this SHA-256."""
    check_size(path, size)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise damaged(path, error) from error
    if verify:
        _compare(path, hashlib.sha256(data).hexdigest(), sha256)
    return data


def passes(check: Callable[..., None], *arguments: object) -> bool:
    """Whether a check raises no UserError."""
    try:
        check(*arguments)
    except UserError:
        return False
    return True


def _compare(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise damaged(path, "its SHA-256 differs from the index")


# Not the package filelock: without flock it raises, or waits for files of killed processes. Here the run goes on.
@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's exclusive lock for the block, waiting for another process if necessary.

    The system releases the lock when its holder dies. The empty file `.lock` stays.
    """
    with readable_write_errors(folder):
        file = open(folder / LOCK_NAME, "ab")  # noqa: SIM115 (closed below, after the block)
    with file:
        held = _wait_for_lock(file, folder)
        try:
            yield
        finally:
            if held:  # closing is not enough: a process forked meanwhile has a copy of the descriptor
                fcntl.flock(file, fcntl.LOCK_UN)


def _wait_for_lock(file: BinaryIO, folder: Path) -> bool:
    """Whether the file is locked now; False where the file system has no locks."""
    if fcntl is None:
        return False
    started, said = time.monotonic(), False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
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
            return False


@contextmanager
def at_work(folder: Path) -> Iterator[bool]:
    """Mark the folder as being filled by this process for the block; yields whether another process fills it too.

    All such processes share one lock, which the system releases when they die. The last one removes its file. Where
    file locks are missing, other processes are not seen.
    """
    with ExitStack() as stack:
        others = False
        try:
            file = stack.enter_context(open(folder / AT_WORK_NAME, "a+b"))
            others = not _locks_alone(file)
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_SH)  # replaces the exclusive lock; another process holds that only briefly
                stack.callback(_leave, file, folder)
        except OSError as error:
            logger.debug("cannot see which other processes fill %s: %s", folder, error)
        yield others


def _locks_alone(file: BinaryIO) -> bool:
    """Whether the exclusive lock could be taken, as when no other process shares it."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _leave(file: BinaryIO, folder: Path) -> None:
    with suppress(OSError):
        if _locks_alone(file):
            (folder / AT_WORK_NAME).unlink(missing_ok=True)
