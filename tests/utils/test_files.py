"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tokenbridge.utils import files
from tokenbridge.utils.errors import FullDiskError, StorageError, UserError
from tokenbridge.utils.files import (
    full_disk_errors,
    make_folder,
    read_bytes,
    replacing,
    replacing_folder,
    sha256_of,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
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
    with replacing_folder(tmp_path / "folder") as temporary:
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
    with replacing_folder(folder) as temporary:
        (temporary / "config.json").write_text("1")
        (temporary / "only-in-the-first").write_text("1")
        assert not folder.exists()
    with replacing_folder(folder) as temporary:
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
        with replacing_folder(folder) as temporary:
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
        raise_in(replacing_folder(tmp_path / "folder"), full)
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
