"""What an audit finds, as `audit.json` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenbridge.results.ledger import Claim, Discrepancy
from tokenbridge.results.schema import Row, Trend
from tokenbridge.results.verdicts import Verdict
from tokenbridge.utils.strict import Strict

Origin = Literal["shipped", "found", "given"]
"""Of a result file: it is part of this project, lies where commands leave results, or was named by the user."""


class Evidence(Strict):
    """A result file that an audit rests on, and where its numbers come from."""

    file: str
    origin: Origin = "shipped"
    sha256: str  # of the file
    scale: str
    rows: tuple[Row, ...]
    trends: tuple[Trend, ...]  # computed from the rows, not read
    provenance: dict[str, Any]  # `results.Provenance` as JSON
    notes: tuple[str, ...] = ()  # what was checked of it, what could not be, which file it stands in for


class Finding(Strict):
    """A claim, judged."""

    claim: Claim
    verdict: Verdict
    why: str
    measured: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, where the evidence has one
    evidence: int | None = None  # number in `Audit.evidence`; None where nothing or only counting was needed
    support: tuple[str, ...] = ()  # "at tiny scale: <claim> holds (19.7 >= 2)"; decides nothing


class Effect(Strict):
    """A discrepancy, and what it does as far as that was measured."""

    discrepancy: Discrepancy
    rows: tuple[Row, ...] = ()
    checks: dict[str, float] = Field(default_factory=dict)
    evidence: int | None = None


class Audit(Strict):
    """What `tokenbridge audit` finds, as `audit.json` holds it."""

    schema_version: Literal["tokenbridge-audit/1"] = "tokenbridge-audit/1"
    made: str  # UTC, ISO 8601
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    effects: tuple[Effect, ...]
    evidence: tuple[Evidence, ...]
    failures: tuple[str, ...] = ()  # what fails the gate, in words; none: it is green

    @property
    def own_run(self) -> Path | None:
        """The folder of the user's own tiny tables, whose pictures lie beside them; None if there is none."""
        for file in self.evidence:
            tables = {row.table for row in file.rows} - {"discrepancies"}
            if file.origin != "shipped" and file.scale == "tiny" and tables:
                return Path(file.file).parent
        return None
