"""Published claims and known discrepancies: what was said, by whom, and how it is checked here.

They are facts of others, kept in `reference_results/paper/` as YAML; nothing in them was measured by this project.
This is their one home: tables, listings and the audit read them here. What was measured, and the verdicts, are the
audit's.
"""

from __future__ import annotations

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
    check: str | None = None  # scale "counted": name in `checks.CHECKS`
    trend: str | None = None  # scale "tiny": id of a trend of the results
    supported_by: tuple[str, ...] = ()  # trends at tiny scale that point the same way; they decide nothing here
    needs: tuple[str, ...] = ()  # keys in `artifacts.ARTIFACTS`
    tolerance: Tolerance | None = None  # at scale "paper" that of `results.METRICS`, if none is stated
    not_applicable: str | None = None  # why no recipe of this project measures it (other people's systems, ...)


class Discrepancy(Strict):
    """The paper against the code, or the code against itself."""

    id: str  # "first-element"
    text: str  # what differs, in a sentence or two
    source: str  # where both sides stand
    rows: tuple[str, ...] = ()  # rows of result files that show the effect: "discrepancies/first-element-official"
    checks: tuple[str, ...] = ()  # or names in `checks.CHECKS`
    not_measured: str | None = None  # why not, where neither is named


class Ledger(Strict):
    """Everything in `reference_results/paper/`."""

    claims: tuple[Claim, ...]
    discrepancies: tuple[Discrepancy, ...]


def read_ledger(folder: Path | str) -> Ledger:
    """Read all claims and discrepancies: every `*.yaml` of a folder has lists `claims`, `discrepancies` or both.

    Raises:
        ValueError: no such files, one that is damaged, an unknown field, or an id that occurs twice.
    """
    paths = sorted(Path(folder).glob("*.yaml"))
    if not paths:
        raise UserError(f"There are no claims in {folder}: it has no .yaml files.")
    claims: list[Claim] = []
    discrepancies: list[Discrepancy] = []
    for file in paths:
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            read = Ledger.model_validate({"claims": (), "discrepancies": (), **content})
        except (yaml.YAMLError, ValidationError, TypeError) as error:
            raise UserError(f"{file} is no file of claims: {error}") from error
        claims += map(_with_tolerance, read.claims)
        discrepancies += read.discrepancies
    for entries in (claims, discrepancies):
        ids = [entry.id for entry in entries]  # type: ignore[attr-defined]
        if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
            raise UserError(f"These ids occur twice in {folder}: {', '.join(twice)}.")
    return Ledger(claims=tuple(claims), discrepancies=tuple(discrepancies))


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
