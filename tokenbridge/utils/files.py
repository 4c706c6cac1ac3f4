"""Files that are written atomically (whole or not at all), their hashes, and the folder of reference results."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbridge.utils.errors import FullDiskError, MissingFileError, StorageError, UserError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def full_disk_errors(place: Path | str, advice: str = "Make room, and run the command again.") -> Iterator[None]:
    """Within the block, turn the many errors of a full disk into a `FullDiskError` that says what to do.

    Args:
        place: the file or folder that is written, for the message.
        advice: sentences for the user. Of nested blocks, the outermost one speaks.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        full = isinstance(error, FullDiskError) or number in (errno.ENOSPC, errno.EDQUOT)
        # torch and safetensors have errors of their own for a write that fails.
        if full or (number is None and not isinstance(error, UserError) and _is_full(Path(place))):
            raise FullDiskError(f"There is no space left for {place}. {advice}") from error
        raise


@contextmanager
def storage_errors(place: Path | str, advice: str = "Make room, and run the command again.") -> Iterator[None]:
    """Like `full_disk_errors`, and also turn the errors of a place that cannot be written to into a `StorageError`."""
    with full_disk_errors(place, advice):
        try:
            yield
        except OSError as error:
            if isinstance(error, UserError) or error.errno not in _NOT_WRITABLE:
                raise
            raise StorageError(f"{place} cannot be written to: {error.strerror} ({error.filename}).") from error


_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)


def _is_full(place: Path) -> bool:
    """Whether the disk that holds a file or folder has no space left."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free < 2**12


def make_folder(folder: Path | str) -> Path:
    """Make a folder if it does not exist and return it: before the work whose results it is to hold.

    Raises:
        StorageError: the folder cannot be made or written to.
    """
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    return folder


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` only if the block succeeds.

    The temporary file has the suffix of `path`, because some libraries choose a format by it. A killed process
    leaves at most a hidden file (`.NAME-xxxxxxxx`) behind, never half of `path`.
    """
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with full_disk_errors(path):
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes private files, but others should be able to read results
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces `folder` only if the block succeeds."""
    folder = Path(folder)
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name, full_disk_errors(folder):
        fresh = Path(name) / "new"
        fresh.mkdir()
        yield fresh
        if folder.exists():
            os.replace(folder, Path(name) / "old")
        os.replace(fresh, folder)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, with a final newline."""
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False))


def read_bytes(path: Path | str, limit: int = 2**26) -> bytes:
    """Return the content of a file that somebody else may have made; hash these very bytes, and parse them.

    Args:
        path: a regular file; pipes and devices never end, and are refused before they are opened.
        limit: the most bytes that are read.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no regular file, or longer than `limit`.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"There is no file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is no regular file.")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise UserError(f"{path} is longer than {limit:,} bytes, the most that a file of its kind should have.")
    return content


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_other_references: list[Path] = []


@contextmanager
def references_in(folder: Path | str) -> Iterator[None]:
    """Let `reference_folder` return this folder within the block; `tokenbridge gate --references` uses it."""
    _other_references.append(Path(folder))
    try:
        yield
    finally:
        _other_references.pop()


def reference_folder() -> Path:
    """Return the folder `reference_results/`: beside the package in a checkout, inside it in an installed wheel.

    Callers write `files.reference_folder()`, so that a test can replace the function for all of them at once.
    """
    if _other_references:
        return _other_references[-1]
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "reference_results"
    return beside if beside.is_dir() else package / "reference_results"
