"""Output for people: progress and messages go to stderr, tables and results to stdout.

Texts are shown as they are, because names of files and sentences of other people's files stand in them: they hold no
markup, and characters that would steer the terminal are replaced.
"""

from __future__ import annotations

import io
import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from operator import length_hint
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO, TypeVar

import rich.progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Cell = str | Text
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
    "matches the published hash": "green",
    "recorded here, no hash was published": "yellow",
    "present": "yellow",
    "changed": "bold red",
    "missing": "red",
}
"""The colors of verdicts and of the states of files."""

_NUMERIC = "–-+.0123456789"  # the first characters of cells in a column of numbers


class _Stream(io.FileIO):
    """A stream whose reader may go, as `head` does: the command goes on, because it also writes files."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within the block, stdout and stderr may be closed or lack a character: neither ends what is under way."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:  # closed by the shell (`>&-`)
        return Path(os.devnull).open("w", encoding="utf-8")
    try:
        raw: IO[bytes] = io.BufferedWriter(_Stream(os.dup(stream.fileno()), "w"))
    except OSError:  # a notebook's, or a test's: no file of the system
        return stream
    return io.TextIOWrapper(raw, stream.encoding, errors="replace", line_buffering=bool(stream.line_buffering))


def log(text: str) -> None:
    """Print a line on stderr, which says what is going on."""
    print(plain(text), file=sys.stderr, flush=True)


def print_line(text: str, style: str = "") -> None:
    """Print a line on stdout, not wrapped."""
    Console(soft_wrap=True).print(Text(plain(text), style))


def print_error(text: str) -> None:
    """Print what went wrong on stderr."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("Error:", "bold red"), " ", plain(text)))


def colored(word: str) -> Text:
    """Return a verdict or a file's state in its color."""
    return Text(word, COLORS.get(word, ""))


def print_table(title: str, header: Sequence[str], body: Sequence[Sequence[Cell]]) -> None:
    """Print a table on stdout; columns of numbers are right-aligned."""
    table = Table(title=Text(plain(title), "bold"), title_justify="left", show_header=any(header))
    for i, name in enumerate(header):
        numbers = i > 0 and all(str(line[i])[:1] in _NUMERIC for line in body)  # "" is in every text
        table.add_column(Text(plain(name)), justify="right" if numbers else "left", overflow="fold")
    for line in body:
        table.add_row(*(Text(plain(cell)) if isinstance(cell, str) else cell for cell in line))
    # A table that goes to a file or a log is not cut to 80 columns.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def track(items: Iterable[T], what: str, *, show: bool = True, transient: bool = True) -> Iterator[T]:
    """Yield `items` with a bar on a terminal's stderr, where a transient one is gone when they are done.

    Elsewhere a line is printed now and then.
    """
    console = Console(stderr=True)
    if show and console.is_terminal:
        columns = (
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=console, transient=transient) as bar:
            yield from bar.track(items, description=plain(what))
        return
    last = time.perf_counter()
    for i, item in enumerate(items):
        now = time.perf_counter()
        if show and now - last >= SECONDS_BETWEEN_LINES:
            last = now
            log(f"{what}: {i:,} of {length_hint(items):,}")
        yield item


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
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            rich.progress.TimeElapsedColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task(plain(what), completed=first, total=total, status="")
            yield lambda done, note: bar.update(task, completed=done, status=plain(words(done, note)))
    else:
        yield print_now_and_then


def _duration(seconds: float) -> str:
    """Return seconds as "1:02:03", and NaN as "?"."""
    return "?" if seconds != seconds else str(timedelta(seconds=round(seconds)))
