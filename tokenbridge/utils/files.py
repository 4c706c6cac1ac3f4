"""Files that are written atomically (whole or not at all), their hashes, and the folder of reference results."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import functools
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbridge.utils.errors import FullDiskError, MissingFileError, StorageError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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
            raise StorageError(
                f"{place} cannot be written to: {error.strerror} ({error.filename or place})."
            ) from error


_NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR),
    *(errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY, errno.EXDEV),
)


def _is_full(place: Path) -> bool:
    """Whether the disk that holds a file or folder has no space left."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free < 2**12


def make_folder(folder: Path | str, *names: str) -> Path:
    """Make a folder if it does not exist and return it: before the work whose results it is to hold.

    Args:
        names: the files that will be written in it.

    Raises:
        StorageError: the folder cannot be made or written to, or a folder lies where one of the files should.
    """
    folder = Path(folder)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    for name in names:
        check_writable(folder / name)
    return folder


def check_folder(folder: Path | str) -> None:
    """Check that a folder can be made and written to, before the work whose results it is to hold; make nothing.

    Raises:
        StorageError: the name is too long, a file is in its way, or its place cannot be written to.
    """
    folder = Path(folder).absolute()
    with storage_errors(folder):
        with suppress(FileNotFoundError):
            os.lstat(folder)  # finds names that are too long, and files in the place of folders
        there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        with tempfile.TemporaryFile(dir=there):
            pass


def check_writable(path: Path | str, read: Callable[[], object] | None = None) -> None:
    """Check that a file can be written at `path`, before the work whose result it is to hold; make its folder.

    Args:
        read: reads an older file at `path`. If it raises an error, the file is not one of ours and must not be lost.

    Raises:
        UserError: another file has this name.
        StorageError: the name is too long, a folder has this name, or its folder cannot be made or written to.
    """
    path = Path(path)
    _check_replaceable(path)
    make_folder(path.parent)
    if read is not None and os.path.lexists(path):
        try:
            read()
        except Exception as error:
            raise UserError(
                f"{path} is not replaced, because it is no older result of this command. Name another file."
            ) from error


def _check_replaceable(path: Path) -> None:
    """Refuse to replace what is no file: a folder; or a device such as /dev/null, which root could replace."""
    with storage_errors(path):
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
    if stat.S_ISDIR(mode):
        raise StorageError(f"{path} is a folder, so no file can be written there. Name another file.")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise StorageError(f"{path} is a device or a pipe, which is not replaced by a file. Name another file.")


@contextmanager
def replacing(path: Path | str, *, flushed: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` only if the block succeeds.

    The temporary file has the suffix of `path`, because some libraries choose a format by it. It is on the disk before
    it replaces `path`, so that a power cut leaves no empty file either. A killed process leaves at most a hidden file
    behind (see `clear_leftovers`), never half of `path`.

    Args:
        flushed: False leaves the file to `flush`, which takes several at once.
    """
    path = Path(path)
    _check_replaceable(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_once(str(path.parent.absolute()), os.getpid())
        temporary = path.parent / _temporary_name(path.suffix)
        with temporary.open("xb") as file:
            mode = stat.S_IMODE(
                os.fstat(file.fileno()).st_mode
            )  # as the umask wants it, whatever a library makes of it
    try:
        with full_disk_errors(path):
            yield temporary
        with storage_errors(path):
            temporary.chmod(mode)
            if flushed:
                _flush(temporary)
            os.replace(temporary, path)
            if flushed:
                _flush(path.parent)
    finally:
        with suppress(OSError):  # where it cannot be removed, a later run tries again
            temporary.unlink(missing_ok=True)


def flush(folder: Path | str, names: Sequence[str]) -> None:
    """Make the system write files of a folder to the disk, all at once.

    Of small files, this takes a tenth of the time that it takes to flush each of them, and the folder each time.
    """
    with storage_errors(folder), ThreadPoolExecutor(_NUM_FLUSHED) as pool:
        list(pool.map(_flush, [Path(folder) / name for name in names]))
        _flush(Path(folder))


_NUM_FLUSHED = 16  # files that are flushed at the same time


def check_replaceable(folder: Path | str, known: Sequence[str] | None) -> None:
    """Check, before the work, that a folder may be replaced: it is absent, empty, or holds an older result of ours.

    Args:
        known: names of the files, patterns as `samples-*.png`, or names in sub-folders as `vae/config.json`. A folder
            of ours holds the first of them, and no others. None stands for all names.

    Raises:
        UserError: the folder holds something else, which must not be lost.
        StorageError: a file has this name, or the place cannot be written to.
    """
    target = Path(os.path.realpath(folder))
    recover(target)
    if target.exists() and not target.is_dir():
        raise StorageError(f"{folder} is a file, so no folder can be written there. Name another folder.")
    if os.path.ismount(target):
        raise StorageError(
            f"{folder} is where a disk or a volume is mounted, and such a folder cannot be replaced as a whole. Name a "
            "folder within it."
        )
    make_folder(target.parent)
    if known is None or not target.exists():
        return
    found = []
    for place, folders, names in os.walk(target, onerror=_raise):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(target).as_posix() for name in [*names, *links]]
    there = sorted(name for name in found if not fnmatch.fnmatchcase(Path(name).name, HIDDEN))
    remedy = "Name another folder, or move its files away."
    if there and known[0] not in there:
        raise UserError(f"{folder} is not replaced, because it holds {there[0]} and has no {known[0]}. {remedy}")
    if strangers := [name for name in there if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known)]:
        raise UserError(
            f"{folder} is not replaced, because it holds {strangers[0]}, which is not one of ours. {remedy}"
        )


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def replacing_folder(folder: Path | str, known: Sequence[str] | None) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces `folder` only if the block succeeds.

    At every moment the old folder or the new one is whole under its name. Where the file system cannot exchange two
    folders in one step, there is an instant in which the old one lies aside; whoever writes there next, or calls
    `recover`, puts it back if the process ended in that instant. A link to a folder stays, and its folder is replaced.

    Args:
        known: see `check_replaceable`, which also raises its errors here; None if the block carries over what is there.
    """
    target = Path(os.path.realpath(folder))
    make_folder(target.parent)
    with storage_errors(folder):
        clear_leftovers(target.parent)
    check_replaceable(folder, known)
    with storage_errors(folder):
        aside = target.parent / _temporary_name()
    try:
        with storage_errors(folder):
            aside.mkdir()
            fresh = aside / "new"
            fresh.mkdir()
        with full_disk_errors(folder):
            yield fresh
        with storage_errors(folder):
            for place, _, names in os.walk(fresh):
                for name in names:
                    _flush(Path(place) / name)
                _flush(Path(place))
            check_replaceable(folder, known)  # a file may have come during the work
            if target.exists():
                shutil.copymode(target, fresh)  # what was private stays so
            _put(fresh, target, aside)
            _flush(target.parent)
    finally:
        with suppress(OSError):  # where it cannot be removed, or put back, a later run tries again
            _clear(aside)


def _put(fresh: Path, target: Path, aside: Path) -> None:
    """Give the folder `fresh` the name `target`; afterwards, an old folder of this name is in `aside`."""
    try:
        os.rename(fresh, target)  # if there is none, or an empty one
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _exchange(fresh, target):
            old = aside / "old" / target.name
            old.parent.mkdir()
            os.rename(target, old)  # if anything happens from here on, `_clear` puts it back
            os.rename(fresh, target)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; return False if the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if rename is None:
        return False
    if rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(second))


def _flush(path: Path) -> None:
    """Make the system write a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do not know it for folders
            raise
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------ leftovers of dead processes

HIDDEN = ".tokenbridge*"
"""Names of files and folders that are no results: locks, and temporary ones with their machine and process."""
_LEFTOVER = re.compile(r"\.tokenbridge-([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}(\..*)?")  # downloads append more
_ABANDONED = 7 * 24 * 3600.0  # seconds without a change after which another machine's process is taken for dead


def clear_leftovers(folder: Path | str) -> None:
    """Remove what killed processes have left in a folder, and put back a folder whose only copy lies aside.

    Only names that this module gives are looked at, and never those of a process that lives. Of processes on other
    machines, which share the folder over a network, only what nobody changed for a week is removed.
    """
    for path in Path(folder).glob(HIDDEN):
        if (found := _LEFTOVER.fullmatch(path.name)) and not _may_live(path, *found.group(1, 2, 3)):
            _clear(path)


@functools.cache
def _clear_once(folder: str, _process: int) -> None:
    """Clear a folder once in the life of a process: a run writes thousands of files, and listing takes its time."""
    clear_leftovers(folder)


def recover(folder: Path | str) -> None:
    """Put a folder back if a killed process has left its only copy aside; do nothing if it is there."""
    target = Path(os.path.realpath(folder))
    if not target.exists() and target.parent.is_dir():
        clear_leftovers(target.parent)


def _clear(leftover: Path) -> None:
    """Remove a temporary file or folder, after the folder that it replaced is under its own name."""
    if not leftover.is_dir() or leftover.is_symlink():
        leftover.unlink(missing_ok=True)
        return
    for old in leftover.glob("old/*"):
        if not os.path.lexists(leftover.parent / old.name):
            os.rename(old, leftover.parent / old.name)
    shutil.rmtree(leftover, ignore_errors=True)


def _temporary_name(suffix: str = "") -> str:
    process = os.getpid()
    suffix = suffix if len(os.fsencode(suffix)) <= 16 else ""
    return f".tokenbridge-{_machine()}-{process}-{_start_of(process) or 0}-{secrets.token_hex(4)}{suffix}"


def _machine() -> str:
    """Return a name of this machine; each container is one, because numbers of processes are its own."""
    processes = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return hashlib.sha256(f"{platform.node()} {processes}".encode()).hexdigest()[:8]


def _start_of(process: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None if it is dead or the system does not tell."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if state in (b"Z", b"X") else int(fields[18])


def _may_live(path: Path, machine: str, process: str, start: str) -> bool:
    """Return whether the process that made a temporary file may still write it."""
    if machine != _machine():
        try:
            newest = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
        except OSError:  # somebody is at it
            return True
        return time.time() - newest < _ABANDONED
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    if not os.path.exists("/proc/self/stat"):
        return True
    return _start_of(int(process)) == int(start)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically, with a final newline."""
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity raise ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False))


def check_regular(path: Path) -> None:
    """Refuse what is no regular file, before it is opened: pipes and devices never end.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no regular file.
    """
    if not path.exists():
        raise MissingFileError(f"There is no file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is no regular file.")


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
    check_regular(path)
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
    with suppress(OSError):  # of a package that others have installed
        recover(beside)
    return beside if beside.is_dir() else package / "reference_results"
