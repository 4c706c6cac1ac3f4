"""A lock on a folder, so that two runs do not write into it at once."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_replaceable, make_folder, recover, replacing_folder, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOCK = ".tokenbridge.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderInUseError(UserError):
    """Another process has the lock of a folder."""


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the lock of a folder within the block; the system releases it when the process ends, however it ends.

    The lock is a hidden file in the folder, with the number of the process that holds it. On file systems that have no
    locks, the block runs without one.

    Args:
        folder: is made if it does not exist.

    Raises:
        FolderInUseError: another process, or another thread of this one, holds the lock.
        StorageError: the folder cannot be made or written to.
    """
    recover(folder)
    path = make_folder(folder) / LOCK
    with storage_errors(path):
        handle = _open_locked(path)
    try:
        with storage_errors(path):
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        if _is_at(handle, path):
            path.unlink()
        os.close(handle)


@contextmanager
def in_turn(folder: Path | str) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder: for changes that take an instant.

    The folder itself is locked, so that a killed process leaves nothing. Where that cannot be, as over some networks,
    the block runs without a lock.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def results_folder(folder: Path | str, known: Sequence[str]) -> Iterator[Path]:
    """Yield a new folder that replaces `folder` once all results are in it: they are those of one run, or the old ones.

    Args:
        known: see `files.check_replaceable`.

    Raises:
        FolderInUseError: another run is about to replace the folder.
        UserError: the folder holds something else, which must not be lost.
    """
    check_replaceable(folder, known)
    with locked(folder), replacing_folder(folder, known) as fresh:
        yield fresh


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 200).decode(errors="replace") or "with a number that is not known yet"
            os.close(handle)
            raise FolderInUseError(
                f"{path.parent} is in use by another run, process {holder}. "
                "Wait until that run ends, or stop it, or name another folder."
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        if _is_at(handle, path):
            return handle
        os.close(handle)  # the process that had it has removed it meanwhile, or replaced the folder


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
