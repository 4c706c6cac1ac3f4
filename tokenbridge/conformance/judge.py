"""Run golden files, and judge our numbers by those of the official code.

A file that cannot be run is a failure with a reason; it is never skipped and never raises an error.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenbridge.conformance import givt as golden_givt
from tokenbridge.conformance import llamagen as golden_llamagen
from tokenbridge.conformance import mar as golden_mar
from tokenbridge.conformance import tokenbridge as golden_tokenbridge
from tokenbridge.conformance.golden import Computed, Entries, Entry, Golden, read_golden
from tokenbridge.results.verdicts import CheckVerdict
from tokenbridge.utils.console import Cell, colored, log, print_line, print_table
from tokenbridge.utils.errors import MissingFileError, UserError

# What a case may grant at most, so that not everything passes. Cases of the official code grant at most 5 + 0.01 |b|,
# 99 % and 1e-5.
LARGEST_ATOL, LARGEST_RTOL, LEAST_EQUAL, LARGEST_TIE = 10.0, 0.1, 90, 1e-3
TIE = 1e-6  # latents this near to a midpoint may get either level (float32 error of the map to normalised units)

ENTRIES: Entries = {
    **golden_tokenbridge.ENTRIES,
    **golden_llamagen.ENTRIES,
    **golden_mar.ENTRIES,
    **golden_givt.ENTRIES,
}
"""All entries by system and name."""


@dataclass(frozen=True)
class Outcome:
    """The verdict on one output of a golden file, or on the whole file (name "file") if it could not be run."""

    name: str
    error: float | None  # largest absolute difference; None if none can be computed
    tolerance: str
    verdict: CheckVerdict  # "pass" or "fail"
    reason: str = ""  # why it failed, or what the tolerance allowed


@dataclass(frozen=True)
class Report:
    """The outcomes of one file."""

    path: str
    outcomes: list[Outcome]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(outcome.verdict == "pass" for outcome in self.outcomes)


def run_file(path: Path | str) -> list[Outcome]:
    """Run a golden file and return one outcome per output, or a single failure if the file cannot be run."""
    try:
        golden = read_golden(path)
        entry = _entry_of(golden)
        with torch.inference_mode():
            computed = entry.run(golden)
        outcomes = [_judge(name, golden, computed) for name in golden.outputs]
        zeros = Computed({name: torch.zeros(array.shape) for name, array in golden.outputs.items()})
        if all(_judge(name, golden, zeros).verdict == "pass" for name in golden.outputs):
            raise UserError("Its tolerance is so large, or its outputs are so small, that zeros would pass too.")
        return outcomes
    except Exception as error:  # whatever breaks is a failure of this file, not of the run
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return [Outcome("file", None, "", "fail", reason)]


def run_files(paths: Iterable[Path | str]) -> list[Report]:
    """Run golden files, and show the progress on stderr. A folder stands for all `.npz` files in it."""
    reports = []
    for path in _expand(paths):
        log(f"conformance: {path}")
        start = time.monotonic()
        reports.append(Report(str(path), run_file(path), round(time.monotonic() - start, 2)))
    return reports


def conformance(paths: Iterable[Path | str], *, as_json: bool = False) -> bool:
    """Run golden files, print the outcomes on stdout, and return whether all passed.

    Args:
        paths: `.npz` files, or folders that hold them.
        as_json: whether to print JSON instead of a table.
    """
    reports = run_files(paths)
    passed = bool(reports) and all(report.passed for report in reports)
    if as_json:
        files = [{**asdict(report), "passed": report.passed} for report in reports]
        print(json.dumps({"passed": passed, "files": files}, indent=2, allow_nan=False))
    else:
        print_reports(reports)
    return passed


def print_reports(reports: Iterable[Report]) -> None:
    """Print a table with file, output, largest error, tolerance and verdict, and the reasons below it."""
    reports = list(reports)
    body: list[list[Cell]] = []
    for report in reports:
        for i, outcome in enumerate(report.outcomes):
            error = "" if outcome.error is None else f"{outcome.error:.2g}"
            cells = [Path(report.path).name if i == 0 else "", outcome.name, error, outcome.tolerance]
            body.append([*cells, colored(outcome.verdict)])
    header = ["file", "output", "largest error", "tolerance", "verdict"]
    print_table("Conformance with the official code", header, body)
    for report in reports:
        for outcome in report.outcomes:
            if outcome.reason:
                print_line(f"{report.path}, {outcome.name}: {outcome.verdict}: {outcome.reason}")
    num_passed = sum(report.passed for report in reports)
    print_line(f"{num_passed} of {len(reports)} files pass.")


def _entry_of(golden: Golden) -> Entry:
    """Return the entry of a case, after checking that the case is complete and has no unknown parts."""
    system, name = golden.meta["system"], golden.meta["entry"]
    if system not in ENTRIES:
        raise UserError(f"System {system!r} is unknown here; there are {', '.join(ENTRIES)}.")
    if name not in ENTRIES[system]:
        raise UserError(f"Entry {name!r} of {system} is unknown; there are {', '.join(ENTRIES[system])}.")
    entry = ENTRIES[system][name]
    if not isinstance(entry, Entry):
        entry = entry(golden)
    for kind, expected, arrays in (("in", entry.inputs, golden.inputs), ("out", entry.outputs, golden.outputs)):
        if expected is None:
            continue
        there = {array: next((n for n in expected if fnmatch(array, n)), array) for array in arrays}
        if absent := sorted(expected - set(there.values())):
            raise UserError(f"Arrays are missing: {', '.join(f'{kind}.{array}' for array in absent)}.")
        if unknown := sorted(array for array, name in there.items() if name not in expected | entry.optional):
            raise UserError(f"Unknown arrays: {', '.join(f'{kind}.{array}' for array in unknown)}.")
    if unknown := sorted(set(golden.meta["arguments"]) - entry.arguments):
        raise UserError(f"Unknown arguments: {', '.join(unknown)}.")
    tolerance = golden.meta["tolerance"]
    if unknown := sorted(set(tolerance) - {"atol", "rtol"} - set(golden.outputs)):
        raise UserError(f"The tolerance names unknown outputs: {', '.join(unknown)}.")
    numbers = [tolerance.get(key) for key in ("atol", "rtol")]
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        raise UserError(f"The tolerance {tolerance} lacks atol or rtol.")
    if tolerance["atol"] > LARGEST_ATOL or tolerance["rtol"] > LARGEST_RTOL:
        raise UserError(f"The tolerance {tolerance} is too large; atol is at most {LARGEST_ATOL}, rtol {LARGEST_RTOL}.")
    if empty := [name for name, array in golden.outputs.items() if array.size == 0]:
        raise UserError(f"There is nothing to compare in out.{empty[0]}.")
    return entry


def _judge(name: str, golden: Golden, computed: Computed) -> Outcome:
    """Compare one output with that of the golden file by the tolerance of the case."""
    expected = golden.outputs[name]
    ours = computed.outputs[name].numpy()
    tolerance = golden.meta["tolerance"]
    words = tolerance.get(name)
    integer = np.issubdtype(expected.dtype, np.integer)
    stated = words or ("equal" if integer else f"{tolerance['atol']:g} + {tolerance['rtol']:g} |b|")
    if ours.shape != expected.shape:
        reason = f"shape {list(ours.shape)} instead of {list(expected.shape)}"
        return Outcome(name, None, stated, "fail", reason)
    # Equal infinities would differ by NaN. A NaN on either side stays NaN and fails.
    with np.errstate(invalid="ignore"):
        error = np.where(ours == expected, 0.0, np.abs(ours.astype(np.float64) - expected.astype(np.float64)))
    largest = float(error.max(initial=0.0))
    distances = computed.midpoint_distances.get(name)
    if words is not None:
        good, note = _judge_words(str(words), error, None if distances is None else distances.numpy())
    elif integer:
        allowed = np.zeros(error.shape, bool) if distances is None else distances.numpy() <= TIE
        good = bool(((error == 0) | allowed).all())
        note = _count(error != 0, "differ") + (", all on a midpoint of two levels" if good and error.any() else "")
    else:
        leader = computed.follows.get(name)
        same = np.ones(error.shape, bool) if leader is None else _agree(leader, golden, computed, error.shape)
        with np.errstate(invalid="ignore"):  # 0 times infinity is NaN, but equal infinities have the error 0
            allowed_error = tolerance["atol"] + tolerance["rtol"] * np.abs(expected.astype(np.float64))
        within = (error == 0) | (error <= allowed_error)
        good, note = bool((within | ~same).all()), _count(~within & same, "are outside")
        largest = float(error[same].max(initial=0.0))
    finite = math.isfinite(largest)
    reason = note if finite else f"{note}; NaN or infinite"
    return Outcome(name, largest if finite else None, str(stated), "pass" if good else "fail", reason)


def _judge_words(words: str, error: NDArray[np.float64], distances: NDArray[Any] | None) -> tuple[bool, str]:
    """Judge integers by a tolerance in words; words that are not understood fail."""
    differ = error != 0
    if (match := re.search(r"at least ([\d.]+) ?% equal", words)) is not None:
        if float(match[1]) < LEAST_EQUAL:
            return False, f"a tolerance asks for at least {LEAST_EQUAL} % equal, not for {match[1]} %"
        return bool((~differ).mean() * 100 >= float(match[1])), _count(differ, "differ")
    if (match := re.search(r"within ([\d.e-]+) of the midpoint", words)) is not None and distances is not None:
        if float(match[1]) > LARGEST_TIE:
            return False, f"a tie is within {LARGEST_TIE} of a midpoint at most, not within {match[1]}"
        good = bool((~differ | (distances <= float(match[1]))).all())
        return good, _count(differ, "differ")
    return False, f"these words are not understood: {words!r}"


def _agree(leader: str, golden: Golden, computed: Computed, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where the integer output `leader` agrees, in the shape of the output that follows from it."""
    agree = computed.outputs[leader].numpy() == golden.outputs[leader]
    if agree.shape == shape:
        return agree
    return agree.swapaxes(1, 2).reshape(shape)  # from tokens [B, L, C] to latents [B, C, H, W]


def _count(where: NDArray[Any], verb: str) -> str:
    return f"{int(where.sum())} of {where.size} {verb}" if where.any() else ""


def _expand(paths: Iterable[Path | str]) -> list[Path]:
    """Replace folders by their golden files.

    Raises:
        MissingFileError: there is no file or folder of this name.
        UserError: a folder has no golden files.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise MissingFileError(f"There is no golden file or folder {path}.")
        found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not found:
            raise UserError(f"There are no golden files (.npz) in {path}.")
        files += found
    return files
