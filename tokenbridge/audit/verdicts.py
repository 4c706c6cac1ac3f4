"""The verdicts on claims and the effects of discrepancies, with their evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tokenbridge.audit.evidence import Source
from tokenbridge.audit.findings import Effect, Evidence, Finding
from tokenbridge.audit.paper import doubts, unmeasurable
from tokenbridge.configs.scales import SCALES
from tokenbridge.reproduction import table3
from tokenbridge.reproduction.trends import trend_rows
from tokenbridge.results.compare import incomparable
from tokenbridge.results.ledger import Claim, Discrepancy
from tokenbridge.results.schema import Row, Trend
from tokenbridge.results.score import to_scores
from tokenbridge.results.verdicts import Verdict, judge
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of
from tokenbridge.weights.artifacts import Status


def interval_of(row: Row, metric: str) -> tuple[float, float] | None:
    """Return the bootstrap interval of a metric, given by its name in the row; None if the row has none."""
    score = next((score for score in to_scores(row.metrics) if score.name == metric), None)
    return None if score is None or score.low is None or score.high is None else (score.low, score.high)


def judge_claim(
    claim: Claim, sources: Sequence[Source], files: Mapping[str, Status], run_check: Callable[[str], float]
) -> Finding:
    """Judge a claim by the first file that decides it. If no file does, the finding says why.

    A measurement with a bootstrap interval is judged by the whole interval. If all of it lies within the tolerance, the
    claim is reproduced; if none of it does, it is not reproduced; if a part of it does, it is within doubt.

    Args:
        sources: the result files in the order of `evidence.choose`.
        files: the status of the published files that claims need, by key.
        run_check: returns the number that the check of this name gives.

    Raises:
        UserError: the claim lacks the check, trend or value that its scale needs, or names one that does not exist.
    """
    support = tuple(_support(claim, sources))
    verdict: Verdict
    if claim.scale == "counted":
        measured = run_check(_named(claim, claim.check, "check"))
        # The check of a claim in words returns 1 if the claim is true.
        claimed = 1.0 if claim.value is None else claim.value
        verdict = judge(claimed, measured, claim.tolerance)
        return Finding(
            claim=claim, verdict=verdict, why=_comparison(claim, measured), measured=measured, support=support
        )
    if claim.scale == "tiny":
        id_ = _named(claim, claim.trend, "trend")
        for i, source in enumerate(sources):
            trend = next((t for t in source.trends if t.id == id_), None)
            if trend is not None and source.results.scale == claim.scale:
                verdict = "reproduced" if trend.holds else "not reproduced"
                why = f"at {source.results.scale} scale: {_words(trend)}"
                rests_on = (*trend_rows().get(id_, source.unlike), id_)
                if unlike := [f"{part} ({source.unlike[part]})" for part in rests_on if part in source.unlike]:
                    verdict, why = "within doubt", f"not as in the shipped results: {'; '.join(unlike)}; {why}"
                return Finding(claim=claim, verdict=verdict, why=why, measured=trend.measured, evidence=i)
        return _not_run(claim, _why_undecided(id_, claim.scale, sources), files, support)
    if claim.not_applicable is not None:
        why = claim.not_applicable
        return Finding(claim=claim, verdict="not applicable at this scale", why=why, support=support)
    reasons = []
    for i, source in enumerate(sources):
        row = next((row for row in source.results.rows if row.id == claim.row), None)
        if row is None or claim.metric is None or source.results.scale in SCALES:
            continue
        if row.not_run is not None:
            reasons.append(f"{source.name}: {row.not_run}")
        elif (reason := incomparable(source.results, table3.NUM_IMAGES) or unmeasurable(row.id)) is not None:
            reasons.append(f"{source.name}: {reason}")
        elif claim.metric not in row.metrics:
            reasons.append(f"{source.name} has no {claim.metric} of {row.id}")
        elif claim.value is None:
            raise UserError(f"The claim {claim.id} of scale paper has no value.")
        else:
            measured, interval = row.metrics[claim.metric], interval_of(row, claim.metric)
            verdict, why = (
                judge(claim.value, measured, claim.tolerance, interval),
                _comparison(claim, measured, interval),
            )
            if source.origin == "scored":
                open_questions = ["nothing proves what made the images"] * (verdict == "reproduced")
            else:
                open_questions = doubts(source.results, row, claim.metric, source.known)
            if open_questions:
                verdict, why = "within doubt", f"{'; '.join(open_questions)}; {why}"
            return Finding(
                claim=claim,
                verdict=verdict,
                why=why,
                measured=measured,
                interval=interval,
                evidence=i,
                support=support,
            )
    return _not_run(claim, reasons or [f"no result file has {claim.metric} of {claim.row}"], files, support)


def _why_undecided(trend: str, scale: str, sources: Sequence[Source]) -> list[str]:
    """Return a sentence for each row that a trend lacks, with the reason that a result file gives."""
    rows = [row for source in sources if source.results.scale == scale for row in source.results.rows]
    measured = {row.id for row in rows if row.not_run is None}
    reasons = {row.id: row.not_run for row in rows if row.not_run is not None}
    lacking = [id_ for id_ in trend_rows().get(trend, ()) if id_ not in measured]
    if not lacking:
        raise UserError(f"A claim names the trend {trend!r}, which does not exist.")
    return [f"the trend {trend} rests on {id_}: {reasons.get(id_, 'in no result file')}" for id_ in lacking]


def _not_run(claim: Claim, reasons: list[str], files: Mapping[str, Status], support: tuple[str, ...]) -> Finding:
    absent = [files[key].artifact for key in claim.needs if files[key].state == "missing"]
    why = "; ".join(reasons)
    if absent:
        why += f". Missing here: {'; '.join(f'{a.key} from {a.origin}' for a in absent)}"
    return Finding(claim=claim, verdict="not run", why=f"{why}. To run it: {claim.recipe}", support=support)


def _comparison(claim: Claim, measured: float, interval: tuple[float, float] | None = None) -> str:
    """Return a sentence with the measured and the claimed number and the tolerance."""
    if claim.value is None:
        return f"the check gives {measured:g}; 1 is true"
    between = "" if interval is None else f" (95 % interval {interval[0]:.4g} to {interval[1]:.4g})"
    granted = 0.0 if claim.tolerance is None else claim.tolerance.of(claim.value)
    allowed = "exactly" if claim.tolerance is None else f"within {granted:,.6g}: {claim.tolerance.reason}"
    return f"{measured:,.12g}{between} against {claim.value:,.12g}, asked {allowed}"


def _support(claim: Claim, sources: Sequence[Source]) -> Iterable[str]:
    for id_ in claim.supported_by:
        for source in sources:
            yield from (f"at {source.results.scale} scale: {_words(t)}" for t in source.trends if t.id == id_)


def _words(trend: Trend) -> str:
    number = f"{trend.measured:.3g} {trend.relation} {trend.bound:.3g}"
    return f"{trend.claim} {f'holds ({number})' if trend.holds else f'does not hold (not {number})'}"


def effect_of(discrepancy: Discrepancy, sources: Sequence[Source], run_check: Callable[[str], float]) -> Effect:
    """Return the effect of a discrepancy, which the rows and checks that the ledger names for it show."""
    found = [(i, row) for i, s in enumerate(sources) for row in s.results.rows if row.id in discrepancy.rows]
    return Effect(
        discrepancy=discrepancy,
        rows=tuple(row for _, row in found),
        checks={name: run_check(name) for name in discrepancy.checks},
        evidence=found[0][0] if found else None,
    )


def evidence_of(source: Source) -> Evidence:
    """Return a file as the evidence that the audit shows."""
    return Evidence(
        file=source.name,
        origin=source.origin,
        sha256=sha256_of(source.path),
        scale=source.results.scale,
        rows=tuple(source.results.rows),
        trends=source.trends,
        provenance=source.results.provenance.model_dump(mode="json"),
        notes=source.notes,
    )


def _named(claim: Claim, name: str | None, what: str) -> str:
    if name is None:
        raise UserError(f"The claim {claim.id} of scale {claim.scale} names no {what}.")
    return name
