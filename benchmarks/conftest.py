"""Time two functions in turns, and print the ratios as a table at the end of the session.

The speed of a machine drifts (other jobs, clock rates), so a time alone says little. Here the reference and the fast
path alternate, and the ratio of their medians is reported. Ratios are not asserted, but the table marks a missed
target. Equal results and memory do not depend on the machine, so these are asserted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import torch

torch.set_num_threads(1)  # so that the ratios do not depend on how many cores the machine has


@dataclass(frozen=True)
class Timing:
    """Medians of interleaved rounds."""

    name: str
    fast_ms: float
    reference_ms: float
    quartiles: tuple[float, float]  # of the ratios of single rounds, which show how noisy the machine was
    target: float | None

    @property
    def ratio(self) -> float:
        """How many times faster the fast path is."""
        return self.reference_ms / self.fast_ms

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        low, high = self.quartiles
        target = ""
        if self.target is not None:
            target = f">= {self.target:g}x, {'met' if self.ratio >= self.target else 'MISSED'}"
        times = f"{self.fast_ms:.2f}", f"{self.reference_ms:.2f}"
        return self.name, *times, f"{self.ratio:.2f}x", f"{low:.2f} to {high:.2f}", target


@dataclass
class Report:
    """The results of a session."""

    timings: list[Timing] = field(default_factory=list)
    memory: list[tuple[str, ...]] = field(default_factory=list)  # rows of a table


class SideBySide(Protocol):
    """Type of the fixture `side_by_side`."""

    def __call__(
        self,
        name: str,
        fast: Callable[[], object],
        reference: Callable[[], object],
        *,
        rounds: int,
        target: float | None = None,
    ) -> None: ...


REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[REPORT]


@pytest.fixture
def side_by_side(benchmark: Any, report: Report) -> SideBySide:
    """Time `reference` and `fast` in turns; pytest-benchmark saves and compares the times of `fast`."""

    def run(
        name: str,
        fast: Callable[[], object],
        reference: Callable[[], object],
        *,
        rounds: int,
        target: float | None = None,
    ) -> None:
        reference_s: list[float] = []

        def time_reference() -> None:
            start = time.perf_counter()
            reference()
            reference_s.append(time.perf_counter() - start)

        # The reference runs as the set-up of a round, which is not part of the round's time.
        benchmark.pedantic(fast, setup=time_reference, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is None:  # --benchmark-disable: each function ran once, and nothing was timed
            return
        fast_s = benchmark.stats.stats.data
        reference_s = reference_s[-len(fast_s) :]  # without the warm-up
        ratios = [r / f for r, f in zip(reference_s, fast_s, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        fast_ms, reference_ms = (1e3 * statistics.median(s) for s in (fast_s, reference_s))
        timing = Timing(name, fast_ms, reference_ms, (low, high), target)
        report.timings.append(timing)
        benchmark.extra_info.update(
            label=name,  # `tokenbridge gate` finds the ratio by this label
            fast_ms=timing.fast_ms,
            reference_ms=timing.reference_ms,
            ratio=timing.ratio,
            ratio_quartiles=[low, high],
            ratio_of_fastest=min(reference_s) / min(fast_s),  # the rounds that other processes disturbed least
            target=target,
            num_threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if report.timings:
        threads = torch.get_num_threads()
        terminalreporter.section(f"fast path against reference, in turns, {threads} thread(s)")
        heading = ("", "fast ms", "reference ms", "ratio", "middle half", "target")
        _write_table(terminalreporter, [heading, *(t.cells() for t in report.timings)])
    if report.memory:
        terminalreporter.section("peak memory beyond the input, in sizes of the input")
        columns = ("", "working memory", "with the output", "limit of working memory")
        _write_table(terminalreporter, [columns, *report.memory])


def _write_table(terminalreporter: Any, rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        terminalreporter.write_line("  ".join(cells).rstrip())
