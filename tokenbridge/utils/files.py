"""Files that are written atomically (whole or not at all), their hashes, and the folder of reference results."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which replaces `path` only if the block succeeds.

    The temporary file has the suffix of `path`, because some libraries choose a format by it. A killed process
    leaves at most a hidden file (`.NAME-xxxxxxxx`) behind, never half of `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
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
