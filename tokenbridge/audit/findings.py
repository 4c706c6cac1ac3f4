"""The findings of an audit, which are the contents of `audit.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tokenbridge.results.ledger import Claim, Discrepancy
from tokenbridge.results.schema import Row, Trend
from tokenbridge.results.verdicts import Verdict
from tokenbridge.utils.strict import Strict

Origin = Literal["shipped", "found", "given", "scored"]
"""Whether a result file ships with this project, was found where commands leave results, was given by the user, or has
the scores that this very audit measured."""


class Evidence(Strict):
    """A result file that an audit rests on, and where its numbers come from."""

    file: str
    origin: Origin = "shipped"
    sha256: str  # hash of the file
    scale: str
    rows: tuple[Row, ...]
    trends: tuple[Trend, ...]  # computed from the rows, not read from the file
    provenance: dict[str, Any]  # `results.schema.Provenance` as JSON
    notes: tuple[str, ...] = ()  # what was and was not checked, and which file it replaces


class Finding(Strict):
    """The verdict on a claim, and its evidence."""

    claim: Claim
    verdict: Verdict
    why: str
    measured: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, where the evidence has one
    evidence: int | None = None  # index in `Audit.evidence`; None if no file decided the claim
    stored: Verdict | None = None  # the verdict that was accepted last; None if the audit did not compare with it
    support: tuple[str, ...] = ()  # "at tiny scale: <claim> holds (19.7 >= 2)"; decides nothing


class Effect(Strict):
    """A discrepancy, and its measured effect."""

    discrepancy: Discrepancy
    rows: tuple[Row, ...] = ()
    checks: dict[str, float] = Field(default_factory=dict)
    evidence: int | None = None


class Audit(Strict):
    """The outcome of `tokenbridge audit`, which `audit.json` holds."""

    schema_version: Literal["tokenbridge-audit/1"] = "tokenbridge-audit/1"
    made: str  # UTC, ISO 8601
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    effects: tuple[Effect, ...]
    evidence: tuple[Evidence, ...]
    failures: tuple[str, ...] = ()  # one sentence for each failure of the gate; empty if it passes

    @property
    def own_run(self) -> Path | None:
        """The folder of the user's own tiny tables and their pictures; None if the user has no such results."""
        for file in self.evidence:
            tables = {row.table for row in file.rows} - {"discrepancies"}
            if file.origin != "shipped" and file.scale == "tiny" and tables:
                return Path(file.file).parent
        return None
