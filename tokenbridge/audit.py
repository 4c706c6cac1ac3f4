"""The audit: every published claim beside what was measured, a verdict, and the evidence."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tokenbridge.claims import Claim, Discrepancy
from tokenbridge.results import Row, Trend

SCHEMA = "tokenbridge-audit/1"

Verdict = Literal["reproduced", "not reproduced", "within doubt", "not run", "not applicable at this scale"]
"""`within doubt`: the measured value is in or out of the tolerance, but its interval is not wholly. `not applicable at
this scale`: nothing that could be run here decides it."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Evidence(_Strict):
    """A result file that an audit rests on, and where its numbers come from."""

    file: str
    sha256: str  # of the file
    scale: str
    rows: tuple[Row, ...]
    trends: tuple[Trend, ...]
    provenance: dict[str, Any]  # `results.Provenance` as JSON


class Finding(_Strict):
    """A claim, judged."""

    claim: Claim
    verdict: Verdict
    why: str
    measured: float | None = None
    interval: tuple[float, float] | None = None  # 95 %, where the evidence has one
    evidence: int | None = None  # number in `Audit.evidence`; None where nothing or only counting was needed
    support: tuple[str, ...] = ()  # "at tiny scale: <claim> holds (19.7 >= 2)"; decides nothing


class Effect(_Strict):
    """A discrepancy, and what it does as far as that was measured."""

    discrepancy: Discrepancy
    rows: tuple[Row, ...] = ()
    checks: dict[str, float] = {}
    evidence: int | None = None


class Audit(_Strict):
    """What `tokenbridge audit` finds, as `audit.json` holds it."""

    schema_version: Literal["tokenbridge-audit/1"] = "tokenbridge-audit/1"
    made: str  # UTC, ISO 8601
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    findings: tuple[Finding, ...]
    effects: tuple[Effect, ...]
    evidence: tuple[Evidence, ...]
