"""Tables on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


_COLOURS = {"reproduced": "green", "not reproduced": "bold red", "not run": "yellow", "not compared": "yellow"}

_NUMERIC = "–-+.0123456789"  # what the cells of a column of numbers start with


def _print_table(title: str, header: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(header))
    for i, name in enumerate(header):
        numbers = i > 0 and all(line[i][:1] in _NUMERIC for line in body)  # "" is in every text
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for line in body:
        table.add_row(*line)
    # Not cut to 80 columns where the output goes to a file or a log.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
