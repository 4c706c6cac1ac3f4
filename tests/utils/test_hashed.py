"""Hashes of what was read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.hashed import opened, read_hashed, recording

if TYPE_CHECKING:
    from pathlib import Path


def test_what_is_read_within_a_recording_is_hashed(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    with recording() as outer:
        with recording() as inner, opened(tmp_path / "a") as file:
            assert file.read_text() == "a"
        assert read_hashed(tmp_path / "b") == b"b"
    read_hashed(tmp_path / "c")
    assert inner == {tmp_path / "a": hashlib.sha256(b"a").hexdigest()}
    assert outer == inner | {tmp_path / "b": hashlib.sha256(b"b").hexdigest()}


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    with recording() as record:
        read_hashed(path)
    path.write_text("two")
    with recording(record), pytest.raises(UserError, match="has changed since this command first read it"):
        read_hashed(path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    with pytest.raises(UserError, match="was changed while it was read"), opened(path):
        path.write_text("three")
