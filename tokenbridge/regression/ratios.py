"""Ratios of the benchmarks, each of a fast path against its reference: measured in turns, stored and compared.

pytest-benchmark measures and writes JSON. Its own comparison judges times against those of another run, which says as
much about the machine as about the code. Here the ratio of two times of the same run is judged.
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
from tokenbridge.utils.strict import Strict, read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = "tokenbridge-ratios/1"
ROOT = Path(__file__).resolve().parents[2]
NUM_RUNS = 3
"""The number of runs behind a stored ratio, and of runs in which a benchmark may reach it, because other processes can
disturb a run."""
TOLERANCE = 0.3
"""The share of the lowest stored run that may be lost. A cache or a skipped pass that no longer works costs more than
that where it made the path 1.5 times faster, and the stored runs show how much the runs of one machine differ."""


class Ratio(Strict):
    """How many times faster the fast path of a benchmark is than its reference."""

    test: str  # the test id by which pytest runs it again
    runs: tuple[float, ...]  # for each run the ratio of the fastest rounds, which other processes disturbed least

    @property
    def middle(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)


class Origin(Strict):
    """The provenance of ratios."""

    command: str
    started: str  # UTC, ISO 8601
    wall_seconds: float
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    share_of_other_processes: float  # their share of the machine's processor time


class Ratios(Strict):
    """The ratios of one or more runs of `benchmarks/`, by the name of the benchmark."""

    schema_version: Literal["tokenbridge-ratios/1"] = "tokenbridge-ratios/1"
    provenance: Origin
    ratios: dict[str, Ratio]
    failed: tuple[str, ...] = ()  # tests that failed because results differ or memory is exceeded


def measure(tests: Sequence[str] = ("benchmarks",), *, root: Path = ROOT) -> Ratios:
    """Run benchmarks by pytest in a process of their own, whose output goes to stderr.

    Args:
        tests: arguments of pytest that choose tests.
        root: the checkout that holds `benchmarks/`.

    Raises:
        UserError: the folder of benchmarks is missing, or pytest could not run them.
    """
    if not (root / "benchmarks").is_dir():
        raise UserError(f"There is no folder {root / 'benchmarks'}: benchmarks run in a checkout only.")
    stopwatch = provenance.Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        arguments = ["-m", "pytest", *tests, "--benchmark-enable", "--quiet", "--color=no", "-p", "no:cacheprovider"]
        # pytest-benchmark measures nothing if it takes itself for a worker of pytest-xdist, and a gate that a test runs
        # would pass on the variables of a worker.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        tests_file = Path(folder) / "junit.xml"
        files = [f"--benchmark-json={file}", f"--junitxml={tests_file}", "--override-ini=junit_family=xunit1"]
        command = [sys.executable, *arguments, *files]
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
        print(done.stdout, end="", file=sys.stderr, flush=True)
        if done.returncode not in (0, 1) or not file.is_file() or not file.stat().st_size:
            last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
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
    """Return the ratios that the fixture `side_by_side` (benchmarks/conftest.py) stored in pytest-benchmark's JSON."""
    return {
        info["label"]: Ratio(test=entry["fullname"], runs=(info["ratio_of_fastest"],))
        for entry in report["benchmarks"]
        if (info := entry["extra_info"])
    }


def read(path: Path | str) -> Ratios:
    """Read stored ratios.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(path)
    try:
        return Ratios.model_validate(read_json(path, "a file of ratios"))
    except FileNotFoundError as error:
        made = "`nox -s update_references -- benchmarks --write --why ...` makes them"
        raise UserError(f"There are no stored ratios {path}; {made}.") from error
    except ValidationError as error:
        raise UserError(f"{path} is not a {SCHEMA} file: {error}.") from error


def write(path: Path | str, ratios: Ratios) -> None:
    """Write ratios as JSON, atomically."""
    write_json(path, ratios.model_dump())


def compare(measured: Ratio | None, stored: Ratio | None) -> tuple[bool, str]:
    """Return whether the best run reaches the stored ones but for `TOLERANCE`, and the ratios in words."""
    if measured is None or stored is None:
        return False, "only stored, not measured" if measured is None else "only measured, not stored"
    least, best = (1 - TOLERANCE) * min(stored.runs), max(measured.runs)
    words = f"{best:.2f}x, stored {stored.middle:.2f}x ({min(stored.runs):.2f} to {max(stored.runs):.2f})"
    return (True, words) if best >= least else (False, f"slower: {words}; at least {least:.2f}x is asked")


def merge(first: Ratios, second: Ratios) -> Ratios:
    """Return the runs of both together, also of benchmarks that only one of the two has."""
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
