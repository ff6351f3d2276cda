"""Is a file still what was written? One kind of answer: silence, or a UserError that names the file."""

import hashlib
from pathlib import Path

from fisher_vmap.errors import UserError
from fisher_vmap.storage.atomic import sha256_of


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
