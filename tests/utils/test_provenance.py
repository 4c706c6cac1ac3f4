"""Provenance: environment check, commit, versions, hashes of data."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from tokenbridge.cli import main as cli
from tokenbridge.utils import provenance
from tokenbridge.utils.provenance import EnvironmentProblemError, check_environment, hash_of_dataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

NMS = RuntimeError("operator torchvision::nms does not exist")


class BrokenImport(MetaPathFinder):
    """Raise `error` where torchvision is imported, as a torchvision built for another torch does."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            raise self.error


@pytest.fixture
def break_torchvision(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    def with_error(error: Exception) -> None:
        monkeypatch.delitem(sys.modules, "torchvision", raising=False)
        monkeypatch.setattr(sys, "meta_path", [BrokenImport(error), *sys.meta_path])

    return with_error


# ---------------------------------------------------------------- environment


def test_environment_is_well_here() -> None:
    check_environment()


@pytest.mark.parametrize(
    "error",
    [
        NMS,
        ImportError("libtorch_cuda.so: cannot open shared object file"),
        OSError("undefined symbol: _ZN3c10"),
        ModuleNotFoundError("No module named 'torchvision'"),
        RuntimeError("operator torchvision::nms does not exist\nand a page of C++ stack"),
    ],
)
def test_broken_torchvision_is_explained(break_torchvision: Callable[[Exception], None], error: Exception) -> None:
    break_torchvision(error)
    with pytest.raises(EnvironmentProblemError) as caught:
        check_environment()
    message = str(caught.value)
    assert str(error).splitlines()[0] in message
    assert f"torchvision {importlib.metadata.version('torchvision')}" in message
    assert f"torch {importlib.metadata.version('torch')}" in message
    assert f"{sys.executable} -m pip install" in message  # how to mend it, in this very environment
    assert "\n" not in message


def test_error_without_words_is_explained(break_torchvision: Callable[[Exception], None]) -> None:
    break_torchvision(ImportError())
    with pytest.raises(EnvironmentProblemError):
        check_environment()


@pytest.mark.parametrize("arguments", [["reproduce", "tiny"], ["--help"], ["train", "tiny", "vae"]])
def test_command_says_it_in_one_message(
    break_torchvision: Callable[[Exception], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    break_torchvision(NMS)
    monkeypatch.setattr(sys, "argv", ["tokenbridge", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("Error: torchvision ")
    assert "torchvision::nms does not exist" in err
    assert "pip install" in err


def test_command_starts_without_torch_in_the_way() -> None:
    """The check runs before anything imports diffusers, whose own error would be a page long."""
    code = (
        "import sys; import tokenbridge, tokenbridge.cli; "
        "print([n for n in ('torch', 'torchvision', 'diffusers', 'datasets') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------- commit


@pytest.fixture
def fresh_commit() -> Iterator[Callable[[], dict[str, Any]]]:
    """Return `commit` without what it remembered."""
    provenance.commit.cache_clear()
    yield provenance.commit
    provenance.commit.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false", "-c", "core.hooksPath="]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkout that the package believes to lie in, of one commit."""
    root = tmp_path.resolve() / "checkout"
    (root / "tokenbridge" / "utils").mkdir(parents=True)
    file = root / "tokenbridge" / "utils" / "provenance.py"
    file.write_text("# a stand-in\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "one")
    monkeypatch.setattr(provenance, "__file__", str(file))
    return root


def test_commit_of_a_checkout(checkout: Path, fresh_commit: Callable[[], dict[str, Any]]) -> None:
    assert fresh_commit() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}


def test_uncommitted_changes_show(checkout: Path, fresh_commit: Callable[[], dict[str, Any]]) -> None:
    (checkout / "tokenbridge" / "utils" / "provenance.py").write_text("# changed\n")
    assert fresh_commit() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": True}


def test_a_new_file_is_a_change_only_among_the_sources(
    checkout: Path, fresh_commit: Callable[[], dict[str, Any]]
) -> None:
    """Otherwise whoever downloads published files into the checkout, as the guide shows, could prove nothing."""
    (checkout / "published").mkdir()
    (checkout / "published" / "kl16.ckpt").write_text("weights\n")
    assert fresh_commit()["dirty"] is False
    (checkout / "tokenbridge" / "utils" / "new.py").write_text("# new\n")
    provenance.commit.cache_clear()
    assert fresh_commit()["dirty"] is True


def test_no_commit_outside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_commit: Callable[[], dict[str, Any]]
) -> None:
    (tmp_path / "tokenbridge" / "utils").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tokenbridge" / "utils" / "provenance.py"))
    assert fresh_commit() == {"commit": None, "dirty": None}


def test_no_commit_of_someone_elses_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, fresh_commit: Callable[[], dict[str, Any]]
) -> None:
    """A wheel installed into a virtual environment inside another project's checkout."""
    installed = checkout / ".venv" / "site-packages" / "tokenbridge" / "utils"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert fresh_commit() == {"commit": None, "dirty": None}


def test_no_commit_without_git(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, fresh_commit: Callable[[], dict[str, Any]]
) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    assert fresh_commit() == {"commit": None, "dirty": None}


# ---------------------------------------------------------------- versions, hardware, hashes


def test_versions_and_hardware_are_plain_json() -> None:
    versions, hardware = provenance.versions(), provenance.hardware()
    assert json.loads(json.dumps([versions, hardware])) == [versions, hardware]
    assert versions["torch"] == importlib.metadata.version("torch")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", versions["python"])
    assert hardware["cores"] >= 1
    assert hardware["memory_gib"] > 0


def test_record_is_of_the_moment_the_stopwatch_started(
    checkout: Path, fresh_commit: Callable[[], dict[str, Any]]
) -> None:
    """What is edited while something is measured had no part in it."""
    stopwatch = provenance.Stopwatch()
    (checkout / "tokenbridge" / "utils" / "provenance.py").write_text("# changed\n")
    fresh_commit.cache_clear()  # type: ignore[attr-defined]
    record = stopwatch.record()
    assert (record["commit"], record["dirty"]) == (git(checkout, "rev-parse", "HEAD"), False)
    assert provenance.origin()["dirty"]
    assert list(record) == ["command", "started", "wall_seconds", "commit", "dirty", "versions", "hardware"]
    assert datetime.datetime.fromisoformat(record["started"]).utcoffset() == datetime.timedelta(0)
    assert 0 <= record["wall_seconds"] < 60
    assert 0 <= stopwatch.share_of_other_processes() <= 1


def test_version_of_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert provenance.versions()["no-such-package-here"] == "not installed"


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)


def images_and_labels(values: np.ndarray, labels: list[int] | None) -> Dataset:
    columns: dict[str, Any] = {"image": [Image.fromarray(value) for value in values]}
    if labels is not None:
        columns["label"] = labels
    return Dataset.from_dict(columns)


def test_hash_of_dataset_is_that_of_its_pixels() -> None:
    """Written out from numbers alone, so it is the same in every process and on every machine."""
    expected = hashlib.sha256()
    for value, label in zip(pixels(), [0, 1, 2], strict=True):
        expected.update(f"RGB(6, 6){label}".encode() + value.tobytes())
    assert hash_of_dataset(images_and_labels(pixels(), [0, 1, 2])) == expected.hexdigest()


def test_hash_of_dataset_sees_every_change() -> None:
    one_pixel = pixels()
    one_pixel[2, 5, 5, 2] ^= 1
    grey = pixels()[..., 0]
    variants = [
        images_and_labels(pixels(), [0, 1, 2]),
        images_and_labels(one_pixel, [0, 1, 2]),
        images_and_labels(pixels(), [0, 1, 1]),
        images_and_labels(pixels(), None),
        images_and_labels(pixels()[::-1], [0, 1, 2]),
        images_and_labels(pixels()[:2], [0, 1]),
        images_and_labels(pixels().reshape(3, 4, 9, 3), [0, 1, 2]),
        images_and_labels(grey, [0, 1, 2]),
    ]
    assert len({hash_of_dataset(variant) for variant in variants}) == len(variants)
