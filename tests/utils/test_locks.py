"""Locks of folders: two runs in one folder are told apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tokenbridge.utils.errors import StorageError
from tokenbridge.utils.files import replacing_folder
from tokenbridge.utils.locks import LOCK, FolderInUseError, locked

HOLD = """
import sys
from tokenbridge.utils.locks import locked
with locked(sys.argv[1]):
    print("locked", flush=True)
    input()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_the_second_run_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        for _ in range(2):
            with (
                pytest.raises(
                    FolderInUseError, match=re.escape(f"{tmp_path / 'run'} is in use by another run")
                ) as said,
                locked(tmp_path / "run"),
            ):
                raise AssertionError("two at once")
            assert f"process {process.pid} on " in str(said.value)
        process.communicate("\n")
    assert not list((tmp_path / "run").iterdir())
    with locked(tmp_path / "run"), pytest.raises(FolderInUseError), locked(tmp_path / "run"):
        raise AssertionError("two at once")


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_processes_wait_for_their_turn(tmp_path: Path) -> None:
    """Read, change and write: no change is lost."""
    add = """
import sys
from pathlib import Path
from tokenbridge.utils.locks import in_turn
number = Path(sys.argv[1]) / "number"
for _ in range(50):
    with in_turn(sys.argv[1]):
        number.write_text(str(int(number.read_text()) + 1))
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", add, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "150"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_folder_may_be_replaced_under_its_own_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), replacing_folder(tmp_path / "a", ("b",)) as new:
        (new / "b").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match="cannot be written to"), locked(tmp_path):
        raise AssertionError("this comes later")
    assert (tmp_path / "precious").read_text() == "mine"
