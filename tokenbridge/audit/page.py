"""The audit as one HTML page, which loads nothing and can be read without scripts.

This module prepares what the page shows, and `templates/audit.html.j2` lays it out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape

from tokenbridge.audit.figures import loss_curves, picture_pair, pictures
from tokenbridge.configs.scales import SCALES
from tokenbridge.results import markdown, tolerances
from tokenbridge.results.verdicts import CLAIM_VERDICTS, Verdict
from tokenbridge.utils.files import write_text
from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from tokenbridge.audit.findings import Audit, Evidence, Finding
    from tokenbridge.results.schema import Row
    from tokenbridge.results.tolerances import Tolerance


MEANINGS: dict[Verdict, str] = {
    "reproduced": "measured, counted or compared with the official code here, and within the stated tolerance",
    "not reproduced": "measured here, and outside the tolerance",
    "within doubt": "measured, but the interval of the measurement reaches across the edge of the tolerance, or the "
    "file leaves open what was measured",
    "not run": "something it needs is missing; the claim says what",
    "not applicable at this scale": "nothing that could be run here decides it",
}
SYMBOLS: dict[Verdict, str] = {
    "reproduced": "✓",
    "not reproduced": "✗",
    "within doubt": "≈",
    "not run": "○",
    "not applicable at this scale": "–",
}
DECIDED_BY = {
    "paper": "published weights on ImageNet",
    "tiny": "tiny models on digits: a trend, never a number of the paper",
    "counted": "counting and arithmetic, no trained weights",
}
TITLES = markdown.TITLES | {
    "table2d": "Table 2d. Channels grouped for one softmax",
    "table2e": "Table 2e. Size of the autoregressive head",
    "table4": "Table 4. Hyper-parameters",
    "article": "A magazine article about the paper",
    "counted": "Sizes of the official models",
    "readme": "READMEs of the official code",
    "trend": "Trends, at tiny scale",
}


def write_page(audit: Audit, path: Path, *, reference: Path, runs: Path | None = None) -> None:
    """Write an audit as one self-contained HTML file.

    Args:
        audit: what to show.
        path: file to write. It appears whole or not at all.
        reference: the folder `reference_results`. The page shows the pictures and training logs in its `tiny/`.
        runs: folder of a user's own tiny run. Its pictures stand beside the reference pictures of the same name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tokenbridge.audit"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"source": source, "json": lambda value: json.dumps(value, indent=2, ensure_ascii=False)}
    page = environment.get_template("audit.html.j2").render(
        audit=audit,
        verdicts=CLAIM_VERDICTS,
        meanings=MEANINGS,
        symbols=SYMBOLS,
        decided_by=DECIDED_BY,
        counts=Counter(finding.verdict for finding in audit.findings),
        sentences=summary(audit.findings),
        groups=groups(audit.findings),
        paper_tables=paper_tables(audit.findings),
        small_tables=small_tables(audit.evidence),
        pictures=pictures(Path(reference) / "tiny", None if runs is None else Path(runs)),
        reconstruction=picture_pair(
            "reconstruction.png", Path(reference) / "tiny", None if runs is None else Path(runs)
        ),
        curves=loss_curves(Path(reference) / "tiny" / "training"),
        markdown=markdown,
        bar=bar,
        strip=strip,
        claimed=claimed,
        measured=measured,
        interval=interval,
        tolerance=tolerance,
        number=number,
    )
    write_text(path, plain(page))


def number(value: float, decimals: int | None = None) -> str:
    """Format a number with `decimals`.

    If they are None, whole numbers are written in full, others from 1,000 on with two decimals, and the rest with six
    significant digits.
    """
    if decimals is None and (abs(value) >= 1000 or value == int(value)):
        decimals = 0 if value == int(value) else 2
    return f"{value:.6g}" if decimals is None else f"{value:,.{decimals}f}"


def claimed(finding: Finding) -> str:
    """Format the published value with the decimals of its metric, or with more if it was published with more."""
    value, name = finding.claim.value, finding.claim.metric
    if value is None:
        return "in words"
    decimals = _decimals(name)
    if decimals is not None and abs(value - round(value, decimals)) > 1e-9 * abs(value):
        decimals = None
    return _with_unit(number(value, decimals), finding)


def measured(finding: Finding) -> str:
    """Format the measured value with one decimal more than the published one has; a dash stands for no value."""
    claim = finding.claim
    if finding.measured is None:
        return "–"
    if claim.value is None and claim.check is not None:
        return "true" if finding.measured == 1 else "false"  # the check of a claim in words gives 1 or 0
    decimals = _decimals(claim.metric)
    if decimals is not None and tolerances.metric(claim.metric or "").reason != "counted":
        decimals += 1
    return _with_unit(number(finding.measured, decimals), finding)


def interval(finding: Finding) -> str:
    """Format the interval of a measurement."""
    assert finding.interval is not None
    decimals = _decimals(finding.claim.metric)
    low, high = (number(end, None if decimals is None else decimals + 1) for end in finding.interval)
    return f"{low} to {high}"


def tolerance(granted: Tolerance) -> str:
    """Format a tolerance."""
    parts = [f"{100 * granted.relative:.3g} %"] * (granted.relative > 0)
    parts += [f"{granted.absolute:g}"] * (granted.absolute > 0)
    return f"± {' + '.join(parts)}" if parts else "none: exact"


def source(text: str) -> Markup:
    """Escape a source, and turn the addresses and arXiv numbers in it into links."""
    pattern = re.compile(r"https?://[^\s<>\"']+[^\s<>\"'.,;:)]|arXiv[ :](\d{4}\.\d{4,5})")
    pieces, end = [], 0
    for match in pattern.finditer(text):
        address = f"https://arxiv.org/abs/{match[1]}" if match[1] else match[0]
        pieces += [
            escape(text[end : match.start()]),
            Markup('<a href="{}" rel="noreferrer">{}</a>').format(address, match[0]),
        ]
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def summary(findings: Sequence[Finding]) -> list[str]:
    """Return sentences that say what was measured and what was not."""
    numbers = [finding for finding in findings if finding.claim.value is not None]
    done = [finding for finding in numbers if finding.measured is not None]
    by_scale = Counter(finding.claim.scale for finding in done)
    left = Counter(finding.verdict for finding in numbers if finding.measured is None)
    sentences = [
        f"Of {len(numbers)} numbers, published or counted from official code, {len(done)} {_were(len(done))} measured "
        f"here: {by_scale['paper']} at the paper's own scale (published weights, ImageNet) and {by_scale['counted']} "
        "by counting, arithmetic or comparison with the official code's settings, which needs no trained weights."
    ]
    if left:
        kinds = [f"{left[verdict]} {verdict}" for verdict in CLAIM_VERDICTS if left[verdict]]
        sentences.append(f"About the others nothing is said: {', '.join(kinds)}.")
    if tiny := [finding for finding in findings if finding.claim.scale == "tiny"]:
        sentences.append(
            f"{len(tiny)} {'claim' if len(tiny) == 1 else 'claims'} in words {_were(len(tiny))} looked at with tiny "
            "models of digits: such a result supports a trend, never a number of the paper."
        )
    return sentences


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _decimals(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return tolerances.metric(name).decimals
    except KeyError:
        return None


def _with_unit(value: str, finding: Finding) -> str:
    unit = finding.claim.unit
    return value if not unit or unit in finding.claim.text else f"{value}\N{NO-BREAK SPACE}{unit}"


@dataclass(frozen=True)
class Group:
    """The claims of one table, or of one other source."""

    key: str
    title: str
    findings: list[Finding]

    @property
    def counts(self) -> Counter[Verdict]:
        """Number of claims by verdict."""
        return Counter(finding.verdict for finding in self.findings)

    @property
    def is_open(self) -> bool:
        """Whether the page shows the group unfolded: at least one of its claims was measured."""
        return any(f.verdict in ("reproduced", "not reproduced", "within doubt") for f in self.findings)


def groups(findings: Sequence[Finding]) -> list[Group]:
    """Group claims by the first part of their ids; the paper's tables come first, others in the order of the claims."""
    grouped: dict[str, list[Finding]] = {}
    for finding in findings:
        grouped.setdefault(finding.claim.id.split("/")[0], []).append(finding)
    keys = sorted(grouped, key=lambda key: key if re.match(r"table\d", key) else "~")  # a stable sort
    return [Group(key, _title(key), grouped[key]) for key in keys]


def _title(key: str) -> str:
    if key in TITLES:
        return TITLES[key]
    words = re.sub(r"^table(\d\w*)$", r"Table \1", key).replace("-", " ")
    return words[:1].upper() + words[1:]


@dataclass(frozen=True)
class PaperTable:
    """A table in the paper's shape: published cells, and what was measured for each."""

    key: str
    title: str
    rows: dict[str, str]  # label by id
    columns: dict[str, str]
    cells: dict[tuple[str, str], Finding]


def paper_tables(findings: Iterable[Finding]) -> list[PaperTable]:
    """Arrange the claims with ids TABLE/ROW/COLUMN as tables; table 4 becomes a list, as it is in the paper."""
    cells: dict[str, dict[tuple[str, str], Finding]] = {}
    texts: dict[tuple[str, str, str], Counter[str]] = {}  # labels of (table, "row" or "column", id)
    for finding in findings:
        if match := re.fullmatch(r"(table\d\w*)/([^/]+)/([^/]+)", finding.claim.id):
            key, row, column = match.groups()
            # The text "TokenBridge-L: FID (remark)" names the row, then the column. The remark is not part of a label.
            row_text, _, column_text = finding.claim.text.partition(": ")
            if key == "table4":
                row, column, row_text, column_text = f"{row}/{column}", "value", finding.claim.text, "value"
            cells.setdefault(key, {})[row, column] = finding
            texts.setdefault((key, "row", row), Counter())[row_text] += 1
            texts.setdefault((key, "column", column), Counter())[re.split(r"\. | \(", column_text)[0] or column] += 1

    def labels(table: str, axis: str) -> dict[str, str]:
        return {k[2]: said.most_common(1)[0][0] for k, said in texts.items() if k[:2] == (table, axis)}

    return [
        PaperTable(key, _title(key), labels(key, "row"), labels(key, "column"), cells[key]) for key in sorted(cells)
    ]


def small_tables(evidence: Sequence[Evidence]) -> list[tuple[int, Evidence, dict[str, list[Row]]]]:
    """Return each evidence measured at a scale of the recipes: (its number, the evidence, its rows by table)."""
    found = []
    for i, file in enumerate(evidence):
        if file.scale not in SCALES:  # the paper's scale is shown in its tables, and a stand-in measures nothing
            continue
        tables: dict[str, list[Row]] = {}
        for row in file.rows:
            tables.setdefault(row.table, []).append(row)
        tables.pop("discrepancies", None)  # the page shows these with the ledger
        if tables or file.trends:
            found.append((i, file, tables))
    return found


@dataclass(frozen=True)
class Bar:
    """A claimed and a measured value, in percent of an axis that includes zero."""

    zero: float
    claimed: float
    measured: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Strip:
    """The neighbourhood of a claimed value, in percent of an axis on which that value lies at 50."""

    tolerance: tuple[float, float]
    measured: float
    interval: tuple[float, float] | None


def bar(finding: Finding) -> Bar | None:
    """Return a claimed and a measured value on one axis that includes zero, or None if either is missing."""
    value, found = finding.claim.value, finding.measured
    if value is None or found is None:
        return None
    ends = (0.0, value, found, *(finding.interval or ()))
    percent = _axis(min(ends), max(ends))
    return Bar(percent(0.0), percent(value), percent(found), _ends(finding, percent))


def strip(finding: Finding) -> Strip | None:
    """Return tolerance, measured value and interval around a claimed value.

    The result is None if a value is missing, or if the two are equal and there is neither tolerance nor interval.
    """
    value, found = finding.claim.value, finding.measured
    if value is None or found is None:
        return None
    granted = finding.claim.tolerance.of(value) if finding.claim.tolerance else 0.0
    reach = 1.2 * max(abs(end - value) for end in (value + granted, found, *(finding.interval or ())))
    if reach == 0:
        return None
    percent = _axis(value - reach, value + reach)
    return Strip((percent(value - granted), percent(value + granted)), percent(found), _ends(finding, percent))


def _axis(low: float, high: float) -> Callable[[float], float]:
    """Return the function that maps values in [low, high] to percent."""
    span = high - low or 1.0
    return lambda value: round(100 * (value - low) / span, 3)


def _ends(finding: Finding, percent: Callable[[float], float]) -> tuple[float, float] | None:
    return finding.interval and (percent(finding.interval[0]), percent(finding.interval[1]))
