"""Results as Markdown tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tokenbridge.results.compare import verdicts
from tokenbridge.results.schema import Provenance, Results, Row, Trend
from tokenbridge.results.tolerances import metric, tolerance_of
from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


TITLES = {
    "table1a": "Table 1a. Reconstruction by quantisation levels",
    "table1b": "Table 1b. Reconstruction by range, 64 levels",
    "table2a": "Table 2a. Prediction of a position's channels",
    "table2b": "Table 2b. Order of the channels",
    "table2c": "Table 2c. Quantisation levels of the generator",
    "table3": "Table 3. Systems",
    "table5": "Table 5. Time to predict one position, batch 1",
    "discrepancies": "Paper against code, and the code against itself",
    "evaluation": "Evaluation",
}


def escape(text: str) -> str:
    """Return foreign text as Markdown that shows it, on one line: no HTML, link, picture or new cell comes of it.

    Code spans stay if all backticks of the text pair up, so that nothing of what follows becomes part of one.
    """
    line = " ".join(plain(text).split())
    for character, shown in _SHOWN.items():
        line = line.replace(character, shown)
    return line if re.fullmatch(r"[^`]*(?:`[^`]+`[^`]*)*", line) else line.replace("`", "\\`")


_SHOWN = {"\\": "\\\\", "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "[": "\\[", "]": "\\]"}


def code(text: str) -> str:
    """Return foreign text as a code span of Markdown, on one line; a backtick becomes an apostrophe."""
    return f"`{' '.join(plain(text).split()).replace('`', chr(39)) or ' '}`"


def tables(results: Results) -> dict[str, list[Row]]:
    """Group rows by table, in the order in which they were measured."""
    grouped: dict[str, list[Row]] = {}
    for row in results.rows:
        grouped.setdefault(row.table, []).append(row)
    return grouped


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Return the metrics of a table's rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def cell(row: Row, name: str) -> str:
    """Format one metric of a row; a dash stands for a metric that the row lacks."""
    return f"{row.metrics[name]:,.{metric(name).decimals}f}" if name in row.metrics else "–"


TREND_COLUMNS = ("claim", "measured", "asked", "")


def trend_cells(trend: Trend) -> list[str]:
    """Format a trend for a table with `TREND_COLUMNS`."""
    asked = f"{trend.relation} {trend.bound:.3g}"
    return [trend.claim, f"{trend.measured:.3g}", asked, "holds" if trend.holds else "does not hold"]


def trend_lines(trends: Iterable[Trend]) -> list[str]:
    """Return the lines of a Markdown table of trends."""
    body = [trend_cells(trend) for trend in trends]
    return markdown_table(TREND_COLUMNS, [[escape(claim), *rest] for claim, *rest in body])


def to_markdown(results: Results, reference: Results | None) -> str:
    """Return all tables, the trends, the tolerances and the provenance as one Markdown page."""
    judged = verdicts(results, reference)
    lines = [f"# Results at scale {escape(results.scale)}", "", f"{measured_by(results.provenance)}.", ""]
    for table, rows in tables(results).items():
        columns = columns_of(rows)
        lines += [f"## {TITLES.get(table, escape(table))}", ""]
        header = ["", *map(escape, columns), "verdict"]
        body = [[escape(r.label), *[cell(r, c) for c in columns], judged[r.id][0]] for r in rows]
        lines += [*markdown_table(header, body), ""]
        said = ("not reproduced", "not run")
        lines += [
            f"- {escape(r.label)}: {judged[r.id][0]}: {escape(judged[r.id][1])}"
            for r in rows
            if judged[r.id][0] in said
        ]
        lines += [""]
    absent = judged.keys() - {row.id for row in results.rows}
    lines += [f"- {escape(id_)}: {escape(': '.join(judged[id_]))}" for id_ in sorted(absent)] + [""] * bool(absent)
    if results.trends:
        lines += ["## The paper's argument at this scale", ""]
        lines += [*trend_lines(results.trends), ""]
    return "\n".join([*lines, *tolerance_lines(columns_of(results.rows))])


def measured_by(p: Provenance, settings: str | None = None) -> str:
    """Return the first sentence of a page without its full stop: command, seed or other settings, time, commit."""
    how = f"seed {p.seed}" if settings is None else settings
    when = f"in {p.wall_seconds:.0f} s, {escape(p.started)}, {commit_of(p.commit, p.dirty)}"
    return f"Measured by {code(p.command)} ({escape(how)}) {when}"


def commit_of(commit: str | None, dirty: bool | None) -> str:
    """Return a phrase that names the commit of the code that measured."""
    return f"commit {escape(commit or 'unknown')}{' with uncommitted changes' if dirty else ''}"


def tolerance_lines(names: Iterable[str]) -> list[str]:
    """Return the lines of the section on the tolerances of metrics."""
    body = [[escape(name), tolerance_of(metric(name)), metric(name).reason] for name in names]
    return ["## Tolerances", "", *markdown_table(["metric", "tolerance", "reason"], body)]


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is left-aligned, the others right-aligned.

    Cells are Markdown: foreign text goes through `escape` first.
    """
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in [header, alignment, *body]]
