"""Output for people: progress and messages go to stderr, tables and results to stdout."""

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

SECONDS_BETWEEN_LINES = 30  # between two lines of progress, where there is no terminal
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
"""The colors of verdicts and of the states of files."""

_NUMERIC = "–-+.0123456789"  # the first characters of cells in a column of numbers


def log(text: str) -> None:
    """Print a line on stderr, which says what is going on."""
    print(text, file=sys.stderr, flush=True)


def print_line(text: str, style: str | None = None) -> None:
    """Print a line on stdout without reading markup in it and without wrapping it."""
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
    # A table that goes to a file or a log is not cut to 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def track(items: Iterable[T], what: str, *, show: bool = True, transient: bool = True) -> Iterable[T]:
    """Yield `items` with a bar on stderr. A transient bar disappears at the end."""
    console = Console(stderr=True)
    return rich.progress.track(items, what, console=console, transient=transient, disable=not show)


@contextmanager
def progress(
    what: str, total: int, count: str, status: str, *, first: int = 0, show: bool = True
) -> Iterator[Callable[[int, str], None]]:
    """Yield `advance(done, note)`, which shows the progress on stderr: as a bar on a terminal, else as lines.

    Args:
        what: the name of the work, such as "sample tokenbridge-l".
        total: the number of images or steps.
        count: the words of a line that count them: "{done} of {total} images".
        status: the words that follow, with {rate} per second, the time {left}, the {minutes} left and {note}.
        first: the number that was done before.
        show: whether to show anything.
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
    """Return seconds as "1:02:03", and NaN as "?"."""
    return "?" if seconds != seconds else str(timedelta(seconds=round(seconds)))
