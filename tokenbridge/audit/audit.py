"""The audit, which sets every published claim beside what was measured and gives a verdict with its evidence.

The evidence is the result files that ship in `reference_results/`, and those of the user, who names them or leaves them
where the usual commands write, in `runs/`. A file is refused, with one reason, if it is damaged, if it names other
weights or images than those on this machine, or if its trends do not follow from its rows. Whatever can be computed
again is computed, not read from a file.

Two files that measured the same row at the same scale are never mixed. The user's file replaces the shipped one as a
whole and is compared with it, but a file in `runs/` does so only if it is the newer one. Two files of the user are
refused, because only the user can say which one is meant. The order of the files therefore does not matter.

A claim at the paper's scale is decided by 50,000 images that are scored by the published Inception weights, and by
nothing less; `audit.paper` says what else the file has to prove. Tiny results decide claims about trends, where their
rows are the shipped ones. Beside a number of the paper they are shown as support and are labelled so.
"""

from __future__ import annotations

import datetime
import difflib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenbridge.audit.checks import all_checks
from tokenbridge.audit.evidence import choose, gather
from tokenbridge.audit.expected import WORSE, expected_verdict, gate_failures, read_expected, write_expected
from tokenbridge.audit.findings import Audit
from tokenbridge.audit.report import write_report
from tokenbridge.audit.samples import score_samples
from tokenbridge.audit.verdicts import effect_of, evidence_of, judge_claim
from tokenbridge.results import schema as result_files
from tokenbridge.results.ledger import Ledger, read_ledger
from tokenbridge.results.verdicts import CLAIM_VERDICTS
from tokenbridge.utils import files, provenance
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.weights import artifacts

Checks = Mapping[str, Callable[[], float]]


def run_audit(
    results: Sequence[Path | str] = (),
    *,
    samples: Path | str | None = None,
    claim: str | None = None,
    out: Path | str = "runs/audit",
    accept: str | None = None,
    weights: Path | str | None = None,
    folder: Path | str | None = None,
    fail_on: Collection[str] = (),
    **scoring: Any,
) -> Audit:
    """Judge claims by results or by samples, and write the report: what the command `audit` does.

    Args:
        results: see `audit_claims`.
        samples: images to score; see `audit_samples`.
        claim: the claim that the samples are judged by.
        out: the folder of the report.
        accept: the reason for which today's verdicts become the expected ones; None keeps those.
        weights: see `audit_claims`.
        folder: see `audit_claims`.
        fail_on: see `audit_claims`; without any, a verdict that is worse than the stored one, or nothing if today's
            verdicts are accepted.
        scoring: the other arguments of `audit_samples`.

    Raises:
        UserError: as `audit_claims` and `audit_samples`; or what is asked for does not go together.
    """
    if (samples is None) != (claim is None) or (samples is not None and (results or accept)):
        raise UserError("--samples and --claim go together, without result files and without --accept.")
    if accept is not None and not accept.strip():
        raise UserError("Verdicts are accepted for a reason: give one.")
    if weights is not None and not Path(weights).is_dir():
        raise UserError(f"There is no folder of models {weights}.")
    for path in results:
        if not Path(path).exists():
            raise MissingFileError(f"There is no result file {path}.")
    files.check_folder(out)  # before the minutes that judging takes
    failing = fail_on or ([] if accept is not None else [WORSE])
    if samples is not None and claim is not None:
        done = audit_samples(samples, claim, out=out, folder=folder, fail_on=failing, **scoring)
    else:
        done = audit_claims(results, weights=weights, folder=folder, fail_on=failing)
    write_report(done, out, reference=files.reference_folder())
    if accept is not None:
        write_expected(files.reference_folder() / "paper" / "expected.json", done, accept)
    return done


def audit_claims(
    results: Sequence[Path | str] = (),
    *,
    runs: Path | str = "runs",
    weights: Path | str | None = None,
    folder: Path | str | None = None,
    fail_on: Collection[str] = (WORSE,),
    row: str | None = None,
    checks: Checks | None = None,
    scored: bool = False,
) -> Audit:
    """Judge every published claim by the shipped result files and those of the user; nothing is written.

    Args:
        results: result files that replace the shipped ones or add to them; without any, those in `runs` are read.
        runs: the folder in which the commands leave their results by default.
        weights: the folder of the models, if results of a small scale were not measured with the shipped models.
        folder: the folder of the published files; see `artifacts.resolve`.
        fail_on: what fails the gate. "worse" is a verdict that is worse than the stored one, or a row that differs
            from the shipped row it replaces; every other entry is a verdict.
        row: judge only the claims about this row, without discrepancies.
        checks: the checks that decide counted claims, by name; `all_checks` of the ledger by default.
        scored: whether the caller has just measured the results from images; see `audit_samples`.

    Raises:
        UserError: a result file is refused, `fail_on` has an unknown verdict, or the ledger cannot be read.
    """
    paper = files.reference_folder() / "paper"
    if unknown := set(fail_on) - {WORSE, *CLAIM_VERDICTS}:
        words = ", ".join(CLAIM_VERDICTS)
        raise UserError(f"The gate fails on {WORSE!r} or on verdicts ({words}), not on {min(unknown)!r}.")
    ledger = read_ledger(paper)
    expected = read_expected(paper / "expected.json") if WORSE in fail_on else {}
    run_check = functools.cache(functools.partial(_run_check, all_checks(ledger) if checks is None else checks))
    if row is not None:
        ledger = Ledger(claims=tuple(c for c in ledger.claims if c.row == row))
    sources, regressions = choose(gather(results, runs=Path(runs), weights=weights, folder=folder, scored=scored))
    statuses = {s.artifact.key: s for s in artifacts.status({k for c in ledger.claims for k in c.needs}, folder=folder)}
    findings = tuple(judge_claim(claim, sources, statuses, run_check) for claim in ledger.claims)
    if WORSE in fail_on:
        findings = tuple(f.model_copy(update={"stored": expected_verdict(f.claim.id, expected)}) for f in findings)
    failures = gate_failures(findings, expected, fail_on, whole=row is None)
    return Audit(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **provenance.commit(),
        versions=provenance.versions(),
        findings=findings,
        effects=tuple(effect_of(d, sources, run_check) for d in ledger.discrepancies),
        evidence=tuple(evidence_of(source) for source in sources),
        failures=(*failures, *(regressions if WORSE in fail_on else ())),
    )


def audit_samples(
    samples: Path | str,
    claim_id: str,
    *,
    out: Path | str,
    folder: Path | str | None = None,
    given: Mapping[str, Path | str | None] | None = None,
    other_inception: Path | str | None = None,
    num_bootstrap: int = 100,
    batch_size: int = 64,
    fail_on: Collection[str] = (WORSE,),
    checks: Checks | None = None,
) -> Audit:
    """Score the user's images, and judge a claim about a row of table 3 and the other claims about the row by them.

    The images are judged, not how they were made. Images that are as good as was published leave the claim in doubt,
    because nothing proves what made them; images that are not contradict it. `results.json` is written into `out`, for
    later audits.

    Args:
        samples: a folder or .npz file of images of 256 x 256 pixels; only 50,000 of them decide the claim.
        claim_id: the id of a claim about FID, Inception Score, precision or recall.
        out: the folder for the result file and features.
        folder: the folder of the published files; see `artifacts.resolve`.
        given: the files that the user named, by key.
        other_inception: Inception weights other than the published ones. Their scores are labelled and decide nothing.
        num_bootstrap: resamples for the interval of FID; with 0 there is no interval.
        fail_on: see `audit_claims`.
        checks: see `audit_claims`.

    Raises:
        MissingArtifactsError: published files are missing; the message lists all of them.
        UserError: samples do not decide the claim, or images or files cannot be used.
    """
    paper = files.reference_folder() / "paper"
    claims = {claim.id: claim for claim in read_ledger(paper).claims}
    if claim_id not in claims:
        near = difflib.get_close_matches(claim_id, claims, n=3, cutoff=0.5)
        hint = f"Similar ones are {', '.join(near)}. " if near else ""
        raise UserError(f"There is no claim {claim_id!r}. {hint}`tokenbridge claims` lists all of them.")
    claim = claims[claim_id]
    measured = score_samples(
        samples,
        claim,
        siblings=[other for other in claims.values() if other.row == claim.row],
        cache=Path(out) / "features",
        folder=folder,
        given=given,
        other_inception=other_inception,
        num_bootstrap=num_bootstrap,
        batch_size=batch_size,
    )
    path = Path(out) / "results.json"
    result_files.write(path, measured)
    return audit_claims([path], folder=folder, fail_on=fail_on, row=claim.row, checks=checks, scored=True)


def _run_check(checks: Checks, name: str) -> float:
    if name not in checks:
        raise UserError(f"A claim or discrepancy names the check {name!r}, which does not exist.")
    return float(checks[name]())
