"""The audit as files: Markdown for people, JSON for programs, JUnit XML for CI, and the page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tokenbridge.audit.expected import WORSE
from tokenbridge.audit.findings import Audit, Finding
from tokenbridge.audit.page import TITLES, write_page
from tokenbridge.results.markdown import cell, code, columns_of, commit_of, escape, markdown_table
from tokenbridge.results.verdicts import CLAIM_VERDICTS, is_worse
from tokenbridge.utils.files import write_json, write_text
from tokenbridge.utils.junit import Case, Suite, to_xml

if TYPE_CHECKING:
    from collections.abc import Iterable


def write_report(audit: Audit, out: Path | str, *, reference: Path | str) -> None:
    """Write audit.md, audit.json, junit.xml and index.html into the folder `out`; each appears whole or not at all.

    Args:
        audit: what to show.
        out: folder.
        reference: the folder `reference_results`, whose pictures the page shows.
    """
    out = Path(out)
    markdown, junit = to_markdown(audit), to_junit(audit)
    write_page(audit, out / "index.html", reference=Path(reference), runs=audit.own_run)
    write_json(out / "audit.json", audit.model_dump(mode="json"))
    write_text(out / "audit.md", markdown)
    write_text(out / "junit.xml", junit)


def counts(audit: Audit) -> dict[str, int]:
    """Return how many claims have each verdict, in the order of `CLAIM_VERDICTS`."""
    found = Counter(finding.verdict for finding in audit.findings)
    return {verdict: found[verdict] for verdict in CLAIM_VERDICTS}


def group_of(finding: Finding) -> str:
    """Return the first part of a claim's id, which names the table that the claim is about."""
    return finding.claim.id.split("/")[0]


def to_markdown(audit: Audit) -> str:
    """Return verdicts, claims, discrepancies and evidence as one Markdown page."""
    lines = ["# Audit", "", f"Made {audit.made}, {commit_of(audit.commit, audit.dirty)}.", ""]
    lines += [*markdown_table(["verdict", "claims"], [[v, str(n)] for v, n in counts(audit).items()]), ""]
    if audit.failures:
        lines += ["## The gate fails", "", *(f"- {escape(failure)}" for failure in audit.failures), ""]
    for group in dict.fromkeys(group_of(finding) for finding in audit.findings):
        findings = [finding for finding in audit.findings if group_of(finding) == group]
        lines += [f"## {TITLES.get(group, group)}", ""]
        lines += [*markdown_table(["claim", "claimed", "measured", "verdict"], [_cells(f) for f in findings]), ""]
        lines += [f"- `{f.claim.id}`: {escape(f.why)}" for f in findings] + [""]
        lines += [f"- `{f.claim.id}`, support: {escape(text)}" for f in findings for text in f.support]
        lines += [""] * any(f.support for f in findings)
    if audit.effects:
        lines += ["## Discrepancies", ""]
    for effect in audit.effects:
        discrepancy = effect.discrepancy
        lines += [f"### {discrepancy.id}", "", f"{escape(discrepancy.text)} ({escape(discrepancy.source)})", ""]
        run = [row for row in effect.rows if row.not_run is None]
        if run:
            columns = columns_of(run)
            body = [[escape(row.label), *(cell(row, column) for column in columns)] for row in run]
            lines += [*markdown_table(["", *map(escape, columns)], body), ""]
        notes = [f"{row.label}: not run: {row.not_run}" for row in effect.rows if row.not_run is not None]
        notes += [f"{name}: {_number(value)}" for name, value in effect.checks.items()]
        if not run and not effect.checks:
            notes += [f"not measured: {discrepancy.not_measured or 'no result file has its rows'}"]
        lines += [f"- {escape(note)}" for note in notes] + [""] * bool(notes)
    lines += ["## Evidence", ""]
    for number, evidence in enumerate(audit.evidence):
        p = evidence.provenance
        lines += [
            f"{number}. {code(evidence.file)}, scale {escape(evidence.scale)}, SHA-256 `{evidence.sha256}`: "
            f"{code(p['command'])} at {escape(p['started'])}, {commit_of(p['commit'], p['dirty'])}. "
            f"{escape('; '.join(evidence.notes))}"
        ]
    return "\n".join(lines)


def to_junit(audit: Audit) -> str:
    """Return JUnit XML: a test case for each claim, with its verdict as a property, and one more for the gate.

    A claim fails only if its verdict is worse than the stored one, so that a known contradiction is not red for ever.
    Otherwise it passes if it is reproduced, and is skipped if it is not. The gate's case fails if the gate does.
    """
    when = {"timestamp": audit.made}
    failures = "\n".join(audit.failures)
    gate = Case("gate", "gate", "failure", f"{len(audit.failures)} failures", "gate", failures)
    return to_xml(
        "tokenbridge audit",
        [
            Suite("claims", [_case(finding) for finding in audit.findings], when),
            Suite("gate", [gate if failures else Case("gate", "gate")], when),
        ],
    )


def _case(finding: Finding) -> Case:
    classname, name, stored = group_of(finding), finding.claim.id, finding.stored
    said: dict[str, str] = {"verdict": finding.verdict}
    said |= {"stored verdict": stored} if stored is not None else {}
    why = f"{finding.verdict}: {finding.why}"
    if stored is not None and is_worse(finding.verdict, stored):
        return Case(classname, name, "failure", f"{why} (stored is {stored})", WORSE, properties=said)
    if finding.verdict == "reproduced":
        return Case(classname, name, properties=said)
    return Case(classname, name, "skipped", why, properties=said)


def _cells(finding: Finding) -> list[str]:
    claim = finding.claim
    claimed = "–" if claim.value is None else f"{_number(claim.value)}{claim.unit and ' ' + claim.unit}"
    measured = "–" if finding.measured is None else _number(finding.measured)
    if finding.interval is not None:
        measured += f" ({finding.interval[0]:.4g} to {finding.interval[1]:.4g})"
    return [escape(claim.text), claimed, measured, finding.verdict]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:.6g}"


def lines_of(audit: Audit, verdicts: Iterable[str]) -> list[str]:
    """Return a line for each claim that has one of the verdicts."""
    wanted = set(verdicts)
    return [f"{f.claim.id}: {f.verdict}: {f.why}" for f in audit.findings if f.verdict in wanted]
