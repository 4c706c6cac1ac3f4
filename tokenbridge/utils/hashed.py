"""Files that are hashed as they are read, so that a hash is that of what was read and not of what lies there later.

A reader hashes a small file with `read_hashed` and a large one with `opened`. Whoever wants to say which files made a
result reads them within `recording`, which collects the hashes.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_regular, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_records: list[dict[Path, str]] = []


@contextmanager
def recording(record: dict[Path, str] | None = None) -> Iterator[dict[Path, str]]:
    """Yield a dictionary that receives the SHA-256 of every file that is read within the block, by its path.

    A file that is read a second time and has changed since the first time is refused.

    Args:
        record: the dictionary of an earlier block, which goes on.
    """
    record = {} if record is None else record
    _records.append(record)
    try:
        yield record
    finally:
        _records.pop()


def read_hashed(path: Path | str, limit: int = 2**26) -> bytes:
    """Return the content of a file, and record the SHA-256 of these very bytes (see `files.read_bytes`)."""
    content = read_bytes(path, limit)
    _note(Path(path), hashlib.sha256(content).hexdigest())
    return content


@contextmanager
def opened(path: Path | str) -> Iterator[Path]:
    """Yield a path by which libraries can open and map a file that is too large to be held in memory twice.

    The path is that of an open file, and a file that is replaced or written to meanwhile is refused. Within `recording`
    it is hashed after the block has read it, so that a damaged file is refused before its gigabytes are hashed.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not a regular file, or it was replaced or written to while it was read.
    """
    path = Path(path)
    check_regular(path)
    with path.open("rb") as file:
        before = state_of(file.fileno())
        fixed = Path(f"/proc/self/fd/{file.fileno()}")
        yield fixed if fixed.exists() else path
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if _records else None
        if not before == state_of(file.fileno()) == (before if fixed.exists() else state_of(path)):
            raise UserError(f"{path} was changed while it was read; wait until it is whole, and run the command again.")
    if sha256 is not None:
        _note(path, sha256)


@contextmanager
def unchanged(path: Path | str) -> Iterator[None]:
    """Refuse a file or folder that is replaced or written to within the block, which reads it more than once."""
    before = state_of(path)
    yield
    if state_of(path) != before:
        raise UserError(f"{path} was changed while it was read; wait until it is whole, and run the command again.")


def state_of(file: Path | str | int) -> tuple[int, ...]:
    """Return of a path or an open file what every change alters: nobody can set the time of the last one."""
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _note(path: Path, sha256: str) -> None:
    for record in _records:
        if record.setdefault(path, sha256) != sha256:
            raise UserError(f"{path} has changed since this command first read it; run the command again.")
