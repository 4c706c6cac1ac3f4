"""The provenance of a number: command, commit, versions, hardware, hashes. And a check of the environment."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGES = (
    "tokenbridge",
    "torch",
    "torchvision",
    "diffusers",
    "accelerate",
    "datasets",
    "torch-fidelity",
    "clean-fid",
    "numpy",
    "scipy",
    "mlxtend",
)


class EnvironmentProblemError(UserError):
    """Installed packages do not work together. The message says how to mend it."""


def check_environment() -> None:
    """Check that torchvision loads beside torch, which diffusers and torch-fidelity need.

    Raises:
        EnvironmentProblemError: torchvision does not load. The message names the versions and the remedy.
    """
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EnvironmentProblemError(
            f"torchvision {_version('torchvision')} does not load beside torch {_version('torch')} ({reason}). "
            "Install a pair built for each other, for example with "
            f"`{sys.executable} -m pip install --force-reinstall torch torchvision`, both from the same index "
            "(a CPU-only torch wheel does not fit the torchvision of the default index)."
        ) from error


def command() -> str:
    """Return the command line that is running, without the path of the interpreter."""
    program = Path(sys.argv[0]).name
    return " ".join(["tokenbridge" if program == "__main__.py" else program, *sys.argv[1:]])


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def hardware() -> dict[str, Any]:
    """Return processor, cores, memory and accelerators of this machine."""
    import psutil
    import torch

    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def origin() -> dict[str, Any]:
    """Return the commit, versions and hardware that made a number, as the fields of a record."""
    return {**commit(), "versions": versions(), "hardware": hardware()}


class Stopwatch:
    """A clock that starts before a measurement and returns its record, which edits during the run do not change."""

    def __init__(self) -> None:
        """Store the time, the commit, and the processor time that other processes have taken until now."""
        self.started = datetime.datetime.now(datetime.UTC)
        self._commit = commit()
        self._begin, self._busy = time.perf_counter(), busy_seconds()

    def record(self) -> dict[str, Any]:
        """Return command, start, seconds since then, commit, versions and hardware; a caller adds seed and data."""
        return {
            "command": command(),
            "started": self.started.isoformat(timespec="seconds"),
            "wall_seconds": round(time.perf_counter() - self._begin, 1),
            **origin(),
            **self._commit,
        }

    def share_of_other_processes(self) -> float:
        """Return the share of the machine's processor time since the start that other processes took.

        The load average counts this process too, and processes that ended a minute ago, so it does not serve.
        """
        seconds = time.perf_counter() - self._begin
        return round(max(0.0, (busy_seconds() - self._busy) / (seconds * (os.cpu_count() or 1))), 3)


def busy_seconds() -> float:
    """Return the processor seconds since the machine's start of all processes but this one and its ended children."""
    import psutil

    times, own = psutil.cpu_times(), os.times()
    of_own = own.user + own.system + own.children_user + own.children_system
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - of_own


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (match := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        return match.group(1)
    return platform.processor() or "unknown"


CODE = ("utils", "weights", "data", "tokenizers", "models", "configs", "sampling")
"""The folders of this package that decide the images of a seed."""


@functools.cache
def code_sha256() -> str:
    """Return a SHA-256 over the sources of this package that decide the images of a seed, whether committed or not."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (package / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@functools.cache
def commit() -> dict[str, Any]:
    """Return the commit of the source tree and whether it has uncommitted changes; both are None outside a checkout.

    A new file is a change only if it lies among the sources: users keep downloads and samples in their checkout too.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)  # noqa: S603, S607
        return result.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {"commit": None, "dirty": None}
        changed = git("status", "--porcelain", "--untracked-files=no") or git(
            "status", "--porcelain", "--", "tokenbridge"
        )
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def hash_of_dataset(dataset: Dataset) -> str:
    """Return a SHA-256 over the decoded pixels and labels of a data set, in order."""
    digest = hashlib.sha256()
    for row in dataset:
        image = row["image"]
        digest.update(f"{image.mode}{image.size}{row.get('label')}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
