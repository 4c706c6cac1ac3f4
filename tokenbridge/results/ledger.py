"""Published claims, facts and known discrepancies: what was said, by whom, and how it is checked here.

They are facts of others, kept in `reference_results/paper/` as YAML; nothing in them was measured by this project.
This is their one home: tables, listings and the audit read them here. What was measured, and the verdicts, are the
audit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ValidationError

from tokenbridge.results.tolerances import Tolerance, metric
from tokenbridge.utils import files
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.strict import Strict

Scale = Literal["paper", "tiny", "counted"]
"""Where a claim is decided: with published weights on ImageNet; by the tiny models (a trend, never a number of the
paper); or without trained weights, by counting and arithmetic."""


class Claim(Strict):
    """One published number, or one sentence that a trend decides."""

    id: str  # "table3/tokenbridge-l/fid": table, row, column
    text: str  # what the page shows: "TokenBridge-L, FID-50K"
    source: str  # "arXiv 2503.16430 v1, table 3"
    scale: Scale
    recipe: str  # the command that measures it
    value: float | None = None  # as published; None for a claim in words
    unit: str = ""
    row: str | None = None  # scale "paper": row of a result file ("table3/tokenbridge-l") ...
    metric: str | None = None  # ... and its metric ("FID-50K")
    check: str | None = None  # scale "counted": name in `audit.checks.all_checks`: counted, computed, or a fact
    trend: str | None = None  # scale "tiny": id of a trend of the results
    supported_by: tuple[str, ...] = ()  # trends at tiny scale that point the same way; they decide nothing here
    needs: tuple[str, ...] = ()  # keys in `artifacts.ARTIFACTS`
    tolerance: Tolerance | None = None  # at scale "paper" that of `results.METRICS`, if none is stated
    not_applicable: str | None = None  # why no recipe of this project measures it (other people's systems, ...)


class Fact(Strict):
    """A setting of the official code, or a number of the paper's text, that claims are compared with."""

    id: str  # "official/weight-decay"
    value: float | bool  # a number, or whether the text is true
    text: str
    source: str  # file and option, or table


class Discrepancy(Strict):
    """The paper against the code, or the code against itself."""

    id: str  # "first-element"
    text: str  # what differs, in a sentence or two
    source: str  # where both sides stand
    rows: tuple[str, ...] = ()  # rows of result files that show the effect: "discrepancies/first-element-official"
    checks: tuple[str, ...] = ()  # or names in `audit.checks.all_checks`
    not_measured: str | None = None  # why not, where neither is named


class Ledger(Strict):
    """Everything in `reference_results/paper/`."""

    claims: tuple[Claim, ...] = ()
    facts: tuple[Fact, ...] = ()
    discrepancies: tuple[Discrepancy, ...] = ()

    def claimed(self, id_: str) -> float:
        """Return the value of a claim."""
        return _value(self.claims, id_)

    def fact(self, id_: str) -> float:
        """Return the value of a fact; 1 for what is true, 0 for what is not."""
        return _value(self.facts, id_)


def _value(entries: Sequence[Claim | Fact], id_: str) -> float:
    value = next((entry.value for entry in entries if entry.id == id_), None)
    if value is None:
        raise UserError(f"The ledger of published numbers has no value {id_!r}, from which a check is computed.")
    return float(value)


def read_ledger(folder: Path | str) -> Ledger:
    """Read all claims, facts and discrepancies: every `*.yaml` of a folder has lists of these names.

    Raises:
        ValueError: no such files, one that is damaged, an unknown field, or an id that occurs twice.
    """
    paths = sorted(Path(folder).glob("*.yaml"))
    if not paths:
        raise UserError(f"There are no claims in {folder}: it has no .yaml files.")
    claims: list[Claim] = []
    facts: list[Fact] = []
    discrepancies: list[Discrepancy] = []
    for file in paths:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            read = Ledger.model_validate(content)
        except (yaml.YAMLError, ValidationError) as error:
            raise UserError(f"{file} is no file of claims: {error}") from error
        claims += map(_with_tolerance, read.claims)
        facts += read.facts
        discrepancies += read.discrepancies
    for entries in (claims, facts, discrepancies):
        ids = [entry.id for entry in entries]  # type: ignore[attr-defined]
        if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
            raise UserError(f"These ids occur twice in {folder}: {', '.join(twice)}.")
    return Ledger(claims=tuple(claims), facts=tuple(facts), discrepancies=tuple(discrepancies))


_read_once = cache(read_ledger)


def shipped_ledger() -> Ledger:
    """Return the ledger that comes with the package, read once in a process."""
    return _read_once(files.reference_folder() / "paper")


def published_metrics(row: str) -> dict[str, float]:
    """Return what was published of a row of result files, by metric; nothing if nothing was.

    Args:
        row: id of the row ("table3/mar-l"). Where both a README and the paper's table have a score of it, the README's
            is returned, which is that of the system's authors.
    """
    metrics: dict[str, float] = {}
    for claim in shipped_ledger().claims:
        if claim.row == row and claim.metric is not None and claim.value is not None:
            metrics.setdefault(claim.metric, claim.value)
    return metrics


def _with_tolerance(claim: Claim) -> Claim:
    if claim.scale != "paper" or claim.tolerance is not None or claim.metric is None:
        return claim
    m = metric(claim.metric)
    return claim.model_copy(update={"tolerance": m.tolerance}) if m.is_compared else claim
