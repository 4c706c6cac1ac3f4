"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tokenbridge.data.pictures import save_images
from tokenbridge.utils import files
from tokenbridge.utils.errors import FullDiskError, StorageError, UserError
from tokenbridge.utils.files import (
    check_folder,
    check_replaceable,
    check_writable,
    clear_leftovers,
    full_disk_errors,
    make_folder,
    read_bytes,
    recover,
    replacing,
    replacing_folder,
    sha256_of,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replacing_makes_folders_and_keeps_the_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "new" / "picture.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path / "new"  # the same file system, so that the rename is atomic
        temporary.write_text("fresh")
        assert not (tmp_path / "new" / "picture.png").exists()
    assert names(tmp_path / "new") == ["picture.png"]
    assert (tmp_path / "new" / "picture.png").read_text() == "fresh"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_replacing_keeps_old_content_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")

    def half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results.json"]


def test_replacing_leaves_nothing_when_the_first_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), replacing(tmp_path / "a.txt"):
        raise ValueError("no")
    assert names(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "a.txt", "text")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask
    with replacing_folder(tmp_path / "folder", None) as temporary:
        (temporary / "b.txt").write_text("text")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert os.umask(umask) == umask  # left as it was


def test_write_text_ends_with_one_newline(tmp_path: Path) -> None:
    for text in ("Fréchet ± 3", "Fréchet ± 3\n"):
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").read_bytes() == "Fréchet ± 3\n".encode()


def test_write_json(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == value


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_write_json_refuses_what_json_has_not(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": [1.0, number]})
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert names(tmp_path) == ["a.json"]


def test_replacing_folder_swaps_whole_folders(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "vae"
    with replacing_folder(folder, ("config.json", "only-in-the-first")) as temporary:
        (temporary / "config.json").write_text("1")
        (temporary / "only-in-the-first").write_text("1")
        assert not folder.exists()
    with replacing_folder(folder, ("config.json", "only-in-the-first")) as temporary:
        (temporary / "config.json").write_text("2")
        assert (folder / "config.json").read_text() == "1"
    assert names(folder) == ["config.json"]
    assert (folder / "config.json").read_text() == "2"
    assert names(folder.parent) == ["vae"]


def test_replacing_folder_keeps_the_old_one_when_the_block_fails(tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("old")

    def half() -> None:
        with replacing_folder(folder, ("config.json", "only-in-the-first")) as temporary:
            (temporary / "config.json").write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half()
    assert names(tmp_path) == ["vae"]
    assert (folder / "config.json").read_text() == "old"


def test_sha256_of_known_values(tmp_path: Path) -> None:
    """The values of FIPS 180-2, and a file larger than a read buffer."""
    for content, expected in (
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ):
        (tmp_path / "x").write_bytes(content)
        assert sha256_of(tmp_path / "x") == expected == hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------- disks and folders that refuse


def raise_in(block: AbstractContextManager[object], error: Exception) -> None:
    with block:
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_with_advice(tmp_path: Path, number: int) -> None:
    full = OSError(number, os.strerror(number))
    with pytest.raises(FullDiskError, match=re.escape(f"There is no space left for {tmp_path / 'a'}. Make room")):
        raise_in(replacing(tmp_path / "a"), full)
    with pytest.raises(FullDiskError, match=r"no space left for .*folder\. Make room"):
        raise_in(replacing_folder(tmp_path / "folder", None), full)
    assert names(tmp_path) == []

    def nested() -> None:
        with full_disk_errors("the run", "Images stay."), replacing(tmp_path / "a"):
            raise full

    with pytest.raises(FullDiskError, match=r"^There is no space left for the run\. Images stay\.$"):
        nested()


def test_libraries_have_other_errors_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save raises a RuntimeError: it counts as a full disk if the disk is full, and as itself if not."""
    with pytest.raises(RuntimeError, match="of torch"):
        raise_in(replacing(tmp_path / "a"), RuntimeError("of torch"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=0))
    with pytest.raises(FullDiskError):
        raise_in(replacing(tmp_path / "a"), RuntimeError("of torch"))
    with pytest.raises(UserError, match="of the user"):  # has its sentence already
        raise_in(replacing(tmp_path / "a"), UserError("of the user"))


def test_make_folder(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert make_folder(str(tmp_path / "a")).is_dir()
    assert names(tmp_path / "a") == ["b"]
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub"):
        with pytest.raises(StorageError, match=re.escape(f"{folder} cannot be written to: ")):
            make_folder(folder)
    with pytest.raises(StorageError, match="cannot be written to"):
        raise_in(replacing(tmp_path / "file" / "a"), AssertionError("this comes later"))


def test_errors_about_other_files_are_not_about_the_one_that_is_written(tmp_path: Path) -> None:
    def read_another() -> None:
        with replacing(tmp_path / "a"):
            (tmp_path / "other").read_text()

    with pytest.raises(FileNotFoundError, match="other") as caught:
        read_another()
    assert not isinstance(caught.value, UserError)


def test_references_in_another_folder(tmp_path: Path) -> None:
    own = files.reference_folder()
    assert (own / "tiny" / "results.json").is_file()
    with files.references_in(tmp_path / "a"), files.references_in(tmp_path / "b"):
        assert files.reference_folder() == tmp_path / "b"
    with pytest.raises(RuntimeError, match="no"):
        raise_in(files.references_in(tmp_path), RuntimeError("no"))
    assert files.reference_folder() == own


def test_foreign_files_are_read_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(UserError, match=r"a is longer than 4 bytes"):
        read_bytes(tmp_path / "a", limit=4)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_bytes(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="is no regular file"):
            read_bytes(path)


# --------------------------------------------------------------------------- whole at every moment, whatever happens


def write_file(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with replacing_folder(path, ("a", "sub/b")) as temporary:
        (temporary / "a").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b").write_text(text)


def content_of(path: Path) -> str | None:
    """Return the text of a whole file or folder, None if there is none; anything else is an error."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_text()
    assert names(path) == ["a", "sub"]
    (text,) = {(path / "a").read_text(), (path / "sub" / "b").read_text()}
    return text


OPERATIONS = ("fsync", "rename", "replace", "mkdir", "open", "chmod", "unlink", "rmdir")  # of the module os
WRITERS = {"file": write_file, "folder": write_folder}
KINDS = [*((kind, True) for kind in WRITERS), ("folder", False)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{'' if kind[1] else ', no exchange'}")
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """Yield a writer of files, or of folders where the file system can exchange two of them, or cannot."""
    kind, exchanges = request.param
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    return WRITERS[kind]


class Killed(BaseException):
    """The process ends here: nothing that follows is done."""


def operations(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException | None) -> list[str]:
    """Make the file operation number `at` fail, and every later one too if the process is killed; list them."""
    done: list[str] = []

    def failing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            done.append(name)
            if error is not None and (len(done) == at + 1 or (len(done) > at and isinstance(error, Killed))):
                raise error
            return function(*args, **options)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(os, name, failing(name, getattr(os, name)))
    return done


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt(), Killed()], ids=repr)
def test_old_or_new_is_whole_after_every_failure(
    writer: Callable[[Path, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    old: str | None,
) -> None:
    """Whichever file operation fails, or is the last one of the process: nothing is lost, and a later run recovers."""
    path = tmp_path / "x" / "results"
    path.parent.mkdir()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here
    if old is not None:
        writer(path, old)
    with monkeypatch.context() as patch:
        count = len(run_with(patch, 10**9, None, writer, tmp_path / "y" / "results"))
    assert count > 5
    for at in range(count + 5):
        with monkeypatch.context() as patch:
            run_with(patch, at, error, writer, path)
        if old is not None and not path.exists():
            assert isinstance(error, Killed)
            assert files._exchange(path, path) is False  # nothing else has such an instant
        with monkeypatch.context() as patch:
            patch.setattr(files, "_may_live", lambda *_: False)
            recover(path) if writer is write_folder else clear_leftovers(path.parent)
            clear_leftovers(path.parent)
        assert content_of(path) in (old, "new"), at
        assert names(path.parent) in (["results"], [] if old is None else ["results"]), at
        if old is not None:
            writer(path, old)


def run_with(
    patch: pytest.MonkeyPatch, at: int, error: BaseException | None, write: Callable[[Path, str], None], path: Path
) -> list[str]:
    files._clear_once.cache_clear()
    done = operations(patch, at, error)
    with suppress(BaseException):
        write(path, "new")
    return done


def test_exchange_of_folders_leaves_no_instant_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a single operation of the module os takes the old folder away, unlike the way round it."""
    write_folder(tmp_path / "a", "old")
    seen = []
    rename = os.rename

    def watching(*args: Any) -> None:
        rename(*args)
        seen.append(content_of(tmp_path / "a"))

    monkeypatch.setattr(os, "rename", watching)
    write_folder(tmp_path / "a", "new")
    assert None not in seen
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write_folder(tmp_path / "a", "newer")
    assert seen[-2:] == [None, "newer"]


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_folder(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write_folder(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content_of(tmp_path / "disk" / "real") == "new"
    assert (names(tmp_path), names(tmp_path / "disk")) == (["disk", "link"], ["real"])


def test_leftovers_of_the_dead_alone_are_cleared(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start, machine = files._start_of(process.pid), files._machine()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()

    def made(machine: str, pid: int, start: int | None, age: float = 0.0, suffix: str = ".png") -> Path:
        path = tmp_path / f".tokenbridge-{machine}-{pid}-{start}-{secrets.token_hex(4)}{suffix}"
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
        return path

    week = 7 * 24 * 3600.0
    keep = [
        made(machine, process.pid, start),
        made(machine, os.getpid(), files._start_of(os.getpid())),
        made("0" * 8, dead.pid, 1, week - 100),  # of another machine
        *(tmp_path / name for name in ("a.png", ".tokenbridge.lock", ".tokenbridge-mine", ".tokenbridge-notes.txt")),
    ]
    for path in keep:
        path.touch()
    os.utime(keep[2], (time.time() - week + 100,) * 2)
    go = [
        made(machine, dead.pid, 1),
        made(machine, process.pid, (start or 0) - 1),  # its number was that of another process before
        made(machine, 10**12, 1),
        made(machine, dead.pid, 2, suffix=".pt.0123abcd.partial"),  # of a download
        made("0" * 8, process.pid, start, week + 100),
    ]
    folder = tmp_path / f".tokenbridge-{machine}-{dead.pid}-1-00000000"
    (folder / "old" / "results").mkdir(parents=True)
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*(path.name for path in keep), "results"])
    assert not any(path.exists() for path in go)
    process.communicate(b"\n")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*(path.name for path in keep[1:]), "results"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 256, "File name too long"), ("folder", "is a folder"), ("file/a", "Not a directory"), ("y" * 255, None)],
)
def test_an_unwritable_target_is_found_before_the_work(tmp_path: Path, name: str, reason: str | None) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / name
    if reason is None:
        check_writable(path)
        write_text(path, "as long as a name can be")
        assert path.read_text() == "as long as a name can be\n"
        return
    for check in (check_writable, lambda path: replacing(path).__enter__(), lambda _: make_folder(tmp_path, name)):
        with pytest.raises(StorageError, match=reason):
            check(path)
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x" * 256, "File name too long"), ("file", "Not a directory"), ("file/a/b", "Not a directory"), ("a/b/c", None)],
)
def test_an_unwritable_folder_is_found_before_the_work(tmp_path: Path, name: str, reason: str | None) -> None:
    (tmp_path / "file").touch()
    if reason is None:
        check_folder(tmp_path / name)
        check_folder(tmp_path)
    else:
        with pytest.raises(StorageError, match=f"cannot be written to: {reason}"):
            check_folder(tmp_path / name)
    assert names(tmp_path) == ["file"]  # nothing is made


def test_a_file_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def read() -> None:
        json.loads(path.read_text())["ours"]

    check_writable(path, read)
    write_json(path, {"ours": 1})
    check_writable(path, read)
    for content in ("{}", "a diary"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"out\.json is not replaced, because it is no older result"):
            check_writable(path, read)


def test_folders_with_strangers_are_not_replaced(tmp_path: Path) -> None:
    known = ("index.json", "vae/weights", "samples-*.png")
    folder = tmp_path / "results"
    check_replaceable(folder, known)
    (folder / "vae").mkdir(parents=True)
    check_replaceable(folder, known)
    (folder / "vae" / "weights").touch()
    with pytest.raises(UserError, match=r"it holds vae/weights and has no index\.json\. Name another folder"):
        check_replaceable(folder, known)
    for name in ("index.json", "samples-1.png", ".tokenbridge.lock"):
        (folder / name).touch()
    check_replaceable(folder, known)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for stranger, make in {
        "diary.txt": Path.touch,
        "vae/index.json": Path.touch,
        ".git": Path.touch,
        "vae/link": lambda path: path.symlink_to(elsewhere),
        "pipe": os.mkfifo,
    }.items():
        make(folder / stranger)
        for check in (check_replaceable, lambda *given: replacing_folder(*given).__enter__()):
            with pytest.raises(UserError, match=rf"holds {re.escape(stranger)}, which is not one of ours"):
                check(folder, known)
        (folder / stranger).unlink()

    def disturbed() -> None:
        with replacing_folder(folder, known) as fresh:
            (fresh / "index.json").touch()
            (folder / "diary.txt").write_text("came during the work")

    with pytest.raises(UserError, match=r"holds diary\.txt"):
        disturbed()
    assert (folder / "diary.txt").read_text() == "came during the work"
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is a file, so no folder can be written there"):
        check_replaceable(tmp_path / "file", known)


def test_images_of_a_batch_are_flushed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is flushed, and the folder once after all names are in it: not once for each image."""
    flushed: list[str] = []
    monkeypatch.setattr(files, "_flush", lambda path: flushed.append(path.relative_to(tmp_path).as_posix()))
    save_images(tmp_path / "images", torch.zeros(5, 1, 2, 2, dtype=torch.uint8))
    there = [f"images/{i:06d}.png" for i in range(5)]
    assert sorted(flushed[:-1]) == there
    assert flushed[-1] == "images"


def test_a_place_where_a_volume_is_mounted_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a folder cannot be renamed, which would be found only after the work."""
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "volume"))
    (tmp_path / "volume").mkdir()
    with pytest.raises(StorageError, match="volume is where a disk or a volume is mounted"):
        check_replaceable(tmp_path / "volume", ["a"])
    check_replaceable(tmp_path / "volume" / "results", ["a"])


def test_a_private_folder_that_is_replaced_stays_private(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    write_folder(folder, "old")
    folder.chmod(0o700)
    write_folder(folder, "new")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert content_of(folder) == "new"
