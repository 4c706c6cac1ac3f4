"""What people see while something runs, and what came out: progress and messages on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import rich.progress
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30  # of progress, where there is no terminal
COLORS = {
    "reproduced": "green",
    "not reproduced": "bold red",
    "not run": "yellow",
    "not compared": "yellow",
    "within doubt": "yellow",
    "not applicable at this scale": "yellow",
    "pass": "green",
    "fail": "bold red",
    "skipped": "yellow",
    "verified": "green",
    "present": "yellow",
    "changed": "bold red",
    "missing": "red",
}
"""Of verdicts, and of the states of files."""

_NUMERIC = "–-+.0123456789"  # what the cells of a column of numbers start with


def log(text: str) -> None:
    """Print a line on stderr: what is going on."""
    print(text, file=sys.stderr, flush=True)


def print_line(text: str, style: str | None = None) -> None:
    """Print a line on stdout as it is: no markup in it, and not wrapped."""
    Console(soft_wrap=True).print(text, highlight=False, markup=False, style=style)


def colored(word: str) -> str:
    """Return a verdict or a file's state in rich's markup, in its color."""
    return f"[{COLORS[word]}]{word}[/]"


def print_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """Print a table on stdout; columns of numbers are right-aligned. Cells may hold rich's markup."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        numbers = i > 0 and all(line[i][:1] in _NUMERIC for line in body)  # "" is in every text
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for line in body:
        table.add_row(*line)
    # Not cut to 80 columns where the output goes to a file or a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def track(items: Iterable[T], what: str, *, show: bool = True, transient: bool = True) -> Iterable[T]:
    """Yield `items` with a bar on stderr; a transient one is gone when they are done."""
    console = Console(stderr=True)
    return rich.progress.track(items, what, console=console, transient=transient, disable=not show)


@contextmanager
def progress(
    what: str, total: int, count: str, status: str, *, first: int = 0, show: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(done, note)`, which shows on stderr a bar on a terminal, now and then a line elsewhere.

    Args:
        what: is done: "sample tokenbridge-l".
        total: number of images or steps.
        count: how a line counts them: "{done} of {total} images".
        status: what follows; it may speak of {rate} per second, time {left}, {minutes} left and {note}.
        first: number that was done before.
        show: or show nothing.
    """
    console = Console(stderr=True)
    start = last = time.perf_counter()

    def words(done: int, note: str) -> str:
        rate = (done - first) / (time.perf_counter() - start)
        left = (total - done) / rate if rate else float("nan")
        return status.format(rate=rate, left=_duration(left), minutes=left / 60, note=note)

    def print_now_and_then(done: int, note: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= SECONDS_BETWEEN_LINES or done == total:
            last = now
            log(f"{what}: {count.format(done=done, total=total)}, {words(done, note)}")

    if not show:
        yield lambda done, note: None
    elif console.is_terminal:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}"),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(what, completed=first, total=total, status="")
            yield lambda done, note: bar.update(task, completed=done, status=words(done, note))
    else:
        yield print_now_and_then


def _duration(seconds: float) -> str:
    """Return seconds as "1:02:03"; "?" for NaN."""
    return "?" if seconds != seconds else str(timedelta(seconds=round(seconds)))
