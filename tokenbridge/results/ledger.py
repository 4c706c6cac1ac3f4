"""The ledger of published claims, facts and known discrepancies: what was said, by whom, and how it is checked here.

The ledger is kept as YAML in `reference_results/paper/`. It holds only what others published, nothing that this project
measured. Tables, listings and the audit read published numbers here and nowhere else. The audit adds the measurements
and the verdicts.
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
"""What decides a claim. "paper": the published weights on ImageNet. "tiny": the tiny models, which decide trends only.
"counted": counting and arithmetic without trained weights."""


class Claim(Strict):
    """A published number, or a published sentence that a trend or a check decides."""

    id: str  # "table3/tokenbridge-l/fid": table, row, column
    text: str  # what the page shows: "TokenBridge-L, FID-50K"
    source: str  # "arXiv 2503.16430 v1, table 3"
    scale: Scale
    recipe: str  # the command that measures it
    value: float | None = None  # as published; None for a claim in words
    unit: str = ""
    row: str | None = None  # scale "paper": row of a result file ("table3/tokenbridge-l") ...
    metric: str | None = None  # ... and its metric ("FID-50K")
    check: str | None = None  # scale "counted": name of a check in `audit.checks.all_checks`
    trend: str | None = None  # scale "tiny": id of a trend of the results (`reproduction.trends`)
    supported_by: tuple[str, ...] = ()  # trends at tiny scale that support the claim without deciding it
    needs: tuple[str, ...] = ()  # keys in `weights.artifacts.ARTIFACTS`
    tolerance: Tolerance | None = None  # if none is stated at scale "paper", it is that of the metric
    not_applicable: str | None = None  # why no recipe of this project measures it, e.g. another system


class Fact(Strict):
    """A setting of the official code, or a number in the text of the paper, that checks compare claims with."""

    id: str  # "official/weight-decay"
    value: float | bool  # a number, or the truth of the text
    text: str
    source: str  # file and option, or table


class Discrepancy(Strict):
    """A contradiction between the paper and the code, or within the code."""

    id: str  # "first-element"
    text: str  # what differs, in a sentence or two
    source: str  # where both statements stand
    rows: tuple[str, ...] = ()  # rows of result files that show the effect: "discrepancies/first-element-official"
    checks: tuple[str, ...] = ()  # checks in `audit.checks.all_checks` that show the effect
    not_measured: str | None = None  # why the effect was not measured, if neither is named


class Ledger(Strict):
    """All claims, facts and discrepancies of `reference_results/paper/`."""

    claims: tuple[Claim, ...] = ()
    facts: tuple[Fact, ...] = ()
    discrepancies: tuple[Discrepancy, ...] = ()

    def claimed(self, id_: str) -> float:
        """Return the value of a claim."""
        return _value(self.claims, id_)

    def fact(self, id_: str) -> float:
        """Return the value of a fact, which is 1 for a true text and 0 for a false one."""
        return _value(self.facts, id_)


def _value(entries: Sequence[Claim | Fact], id_: str) -> float:
    value = next((entry.value for entry in entries if entry.id == id_), None)
    if value is None:
        raise UserError(f"The ledger of published numbers has no value {id_!r}, from which a check is computed.")
    return float(value)


def read_ledger(folder: Path | str) -> Ledger:
    """Read the ledger in a folder, whose `*.yaml` files have lists named claims, facts and discrepancies.

    Raises:
        UserError: there are no such files, a file is damaged or has an unknown field, or an id occurs twice.
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
            raise UserError(f"{file} is not a file of claims: {error}") from error
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
    """Return the ledger that comes with the package; a process reads it once."""
    return _read_once(files.reference_folder() / "paper")


def published_metrics(row: str) -> dict[str, float]:
    """Return the published metrics of a row of result files; they are empty if none were published.

    If both a README and the paper's table have a score, the README's is returned, because it is that of the system's
    authors.

    Args:
        row: the id of the row ("table3/mar-l").
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
