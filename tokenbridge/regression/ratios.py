"""Ratios of the benchmarks, fast path against reference: measured in turns, stored, compared.

pytest-benchmark measures and writes JSON. Its own compare judges times against those of another run, which says as
much of the machine as of the code; judged here is the ratio of two times of one run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import write_json
from tokenbridge.utils.junit import read_failed
from tokenbridge.utils.strict import Strict

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "tokenbridge-ratios/1"
ROOT = Path(__file__).resolve().parents[2]
NUM_RUNS = 3
"""Runs behind a stored ratio, and runs a benchmark may take to keep up with it: other processes disturb one run."""
TOLERANCE = 0.3
"""Share that may be lost of the lowest stored run: a cache or a skipped pass that no longer works costs more where it
made the path 1.5 times faster, and how much the runs of one machine differ is in what is stored."""


class Ratio(Strict):
    """How many times faster one benchmark's fast path is than its reference."""

    test: str  # pytest's name of it, which runs it again
    runs: tuple[float, ...]  # ratio of the fastest rounds, which other processes disturbed least, of each run

    @property
    def middle(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


class Origin(Strict):
    """Where ratios come from."""

    command: str
    started: str  # UTC, ISO 8601
    wall_seconds: float
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    share_of_other_processes: float  # of the machine's processor time


class Ratios(Strict):
    """The ratios of one or more runs of `benchmarks/`, by the benchmark's name."""

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
        raise UserError(f"There is no folder {root / 'benchmarks'}: benchmarks run in a checkout only.")
    stopwatch = provenance.Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        arguments = ["-m", "pytest", *tests, "--benchmark-enable", "--quiet", "--color=no", "-p", "no:cacheprovider"]
        # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist, whose variables a
        # gate that is itself run by a test would pass on.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        tests_file = Path(folder) / "junit.xml"
        files = [f"--benchmark-json={file}", f"--junitxml={tests_file}", "--override-ini=junit_family=xunit1"]
        command = [sys.executable, *arguments, *files]
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
        print(done.stdout, end="", file=sys.stderr, flush=True)
        if done.returncode not in (0, 1) or not file.is_file() or not file.stat().st_size:
            last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"pytest could not run the benchmarks (exit code {done.returncode}): {last}")
        report = json.loads(file.read_text(encoding="utf-8"))
        failed = read_failed(tests_file)
    return Ratios(
        provenance=Origin(
            **stopwatch.record() | {"command": f"python {' '.join(arguments[: 3 + len(tests)])}"},
            share_of_other_processes=stopwatch.share_of_other_processes(),
        ),
        ratios=_ratios_of(report),
        failed=tuple(dict.fromkeys(failed)),
    )


def _ratios_of(report: dict[str, Any]) -> dict[str, Ratio]:
    """Return what the fixture `side_by_side` of benchmarks/conftest.py left in pytest-benchmark's JSON."""
    return {
        info["label"]: Ratio(test=entry["fullname"], runs=(info["ratio_of_fastest"],))
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
        raise UserError(f"There are no stored ratios {path}; {made}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path} is no {SCHEMA} file: {error}.") from error


def write(path: Path | str, ratios: Ratios) -> None:
    """Write ratios as JSON, atomically."""
    write_json(path, ratios.model_dump())


def compare(measured: Ratio | None, stored: Ratio | None) -> tuple[bool, str]:
    """Return whether the best run keeps up with the stored ones, and the ratios in words."""
    if measured is None or stored is None:
        return False, "only stored, not measured" if measured is None else "only measured, not stored"
    least, best = (1 - TOLERANCE) * min(stored.runs), max(measured.runs)
    words = f"{best:.2f}x, stored {stored.middle:.2f}x ({min(stored.runs):.2f} to {max(stored.runs):.2f})"
    return (True, words) if best >= least else (False, f"slower: {words}; at least {least:.2f}x is asked")


def merge(first: Ratios, second: Ratios) -> Ratios:
    """Return the first runs with the second's added, where both have a benchmark or only one."""
    runs = dict(first.ratios)
    for name, ratio in second.ratios.items():
        before = runs[name].runs if name in runs else ()
        runs[name] = Ratio(test=ratio.test, runs=(*before, *ratio.runs))
    a, b = first.provenance, second.provenance
    seconds = a.wall_seconds + b.wall_seconds
    share = a.share_of_other_processes * a.wall_seconds + b.share_of_other_processes * b.wall_seconds
    origin = a.model_copy(
        update={"wall_seconds": round(seconds, 1), "share_of_other_processes": round(share / seconds, 3)}
    )
    failed = tuple(dict.fromkeys((*first.failed, *second.failed)))
    return first.model_copy(update={"ratios": runs, "provenance": origin, "failed": failed})
