"""Ratios of the benchmarks, fast path against reference: measured in turns, stored, compared.

pytest-benchmark measures and writes JSON. Its own compare judges times against those of another run, which says as
much of the machine as of the code; judged here is the ratio of two times of one run.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenbridge import provenance
from tokenbridge.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "tokenbridge-ratios/1"
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.3
"""Share of a stored ratio that may be lost. A cache or a skipped pass that no longer works costs more where it made
the path 1.5 times faster; other processes cost less in the best of three runs."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Ratio(_Strict):
    """How many times faster one benchmark's fast path is than its reference."""

    test: str  # pytest's name of it, which runs it again
    ratio: float  # of the fastest rounds, which other processes disturbed least
    quartiles: tuple[float, float]  # of the ratio round by round


class Origin(_Strict):
    """Where ratios come from."""

    command: str
    started: str  # UTC, ISO 8601
    wall_seconds: float
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    share_of_other_processes: float  # of the machine's processor time


class Ratios(_Strict):
    """The ratios of one run of `benchmarks/`, by the benchmark's name."""

    schema_version: Literal["tokenbridge-ratios/1"] = "tokenbridge-ratios/1"
    provenance: Origin
    ratios: dict[str, Ratio]
    failed: tuple[str, ...] = ()  # tests that failed: unequal results, or too much memory


def measure(tests: Sequence[str] = ("benchmarks",), *, root: Path = ROOT) -> Ratios:
    """Run benchmarks by pytest, in a process of their own; what they print goes to stderr.

    Args:
        tests: what to run, as pytest takes it.
        root: the checkout that holds `benchmarks/`.

    Raises:
        ValueError: there are none, or pytest could not run them.
    """
    if not (root / "benchmarks").is_dir():
        raise ValueError(f"There is no folder {root / 'benchmarks'}: benchmarks run in a checkout only.")
    started, begin, busy = datetime.datetime.now(datetime.UTC), time.monotonic(), provenance.busy_seconds()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        arguments = ["-m", "pytest", *tests, "--benchmark-enable", "--quiet", "--color=no", "-p", "no:cacheprovider"]
        done = subprocess.run(  # noqa: S603
            [sys.executable, *arguments, f"--benchmark-json={file}"], cwd=root, stdout=subprocess.PIPE, text=True
        )
        print(done.stdout, end="", file=sys.stderr, flush=True)
        if done.returncode not in (0, 1) or not file.is_file() or not file.stat().st_size:
            last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"pytest could not run the benchmarks (exit code {done.returncode}): {last}")
        report = json.loads(file.read_text(encoding="utf-8"))
    seconds = time.monotonic() - begin
    others = (provenance.busy_seconds() - busy) / (seconds * (os.cpu_count() or 1))
    return Ratios(
        provenance=Origin(
            command=f"python {' '.join(arguments[: 3 + len(tests)])}",
            started=started.isoformat(timespec="seconds"),
            wall_seconds=round(seconds, 1),
            **provenance.commit(),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            share_of_other_processes=round(max(0.0, others), 3),
        ),
        ratios=_ratios_of(report),
        failed=tuple(line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))),
    )


def _ratios_of(report: dict[str, Any]) -> dict[str, Ratio]:
    """Return what the fixture `side_by_side` of benchmarks/conftest.py left in pytest-benchmark's JSON."""
    return {
        info["label"]: Ratio(test=entry["fullname"], ratio=info["ratio_of_fastest"], quartiles=info["ratio_quartiles"])
        for entry in report["benchmarks"]
        if (info := entry["extra_info"])
    }


def read(path: Path | str) -> Ratios:
    """Read stored ratios.

    Raises:
        ValueError: they are not there, or damaged.
    """
    path = Path(path)
    try:
        return Ratios.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        made = "`nox -s update_references -- benchmarks --write --why ...` makes them"
        raise ValueError(f"There are no stored ratios {path}; {made}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is no {SCHEMA} file: {error}.") from error


def write(path: Path | str, ratios: Ratios) -> None:
    """Write ratios as JSON, atomically."""
    write_json(path, ratios.model_dump())


def compare(measured: Ratio | None, stored: Ratio | None) -> tuple[bool, str]:
    """Return whether a ratio keeps up with the stored one, and the two in words."""
    if measured is None or stored is None:
        return False, "only stored, not measured" if measured is None else "only measured, not stored"
    words = f"{measured.ratio:.2f}x, stored {stored.ratio:.2f}x"
    if measured.ratio < (1 - TOLERANCE) * stored.ratio:
        return False, f"slower: {words}; at least {(1 - TOLERANCE) * stored.ratio:.2f}x is asked"
    return True, words


def better(first: Ratios, second: Ratios) -> Ratios:
    """Return the larger of two runs' ratios where both have one; the rest is the first run's."""
    larger = {name: max(r, second.ratios.get(name, r), key=lambda r: r.ratio) for name, r in first.ratios.items()}
    return first.model_copy(update={"ratios": larger})
