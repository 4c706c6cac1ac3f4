"""The audit: every published claim beside what was measured, a verdict, and the evidence.

What counts as evidence: the result files shipped in `reference_results/`, and the user's (named ones, or those that the
usual commands leave in `runs/`). A file is refused, with one reason, if it is damaged, if it names other weights or
images than those that are here, or if its trends do not follow from its rows. Nothing in a file is believed that can
be computed again.

Two files that measured the same row at the same scale are never mixed. The user's stands in for the shipped one, whole,
and is compared with it; one that lies in `runs/` only if it is the newer. Two of the user's are refused: which one is
meant, only the user can say. So the order of the files does not matter.

A claim of the paper's scale is decided by 50,000 images, scored by the published Inception weights, and by nothing
less. Tiny results decide claims about trends; beside a number of the paper they stand as support, labelled so.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from tokenbridge.audit.checks import all_checks
from tokenbridge.audit.evidence import choose, gather
from tokenbridge.audit.expected import WORSE, gate_failures, read_expected
from tokenbridge.audit.findings import Audit
from tokenbridge.audit.samples import score_samples
from tokenbridge.audit.verdicts import effect_of, evidence_of, judge_claim
from tokenbridge.results import schema as result_files
from tokenbridge.results.ledger import Ledger, read_ledger
from tokenbridge.results.verdicts import CLAIM_VERDICTS
from tokenbridge.utils import files, provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.weights import artifacts

Checks = Mapping[str, Callable[[], float]]


def audit_claims(
    results: Sequence[Path | str] = (),
    *,
    runs: Path | str = "runs",
    weights: Path | str | None = None,
    folder: Path | str | None = None,
    fail_on: Collection[str] = (WORSE,),
    row: str | None = None,
    checks: Checks | None = None,
) -> Audit:
    """Judge every published claim by the shipped result files and the user's; what the command `audit` does.

    Args:
        results: result files that stand in for the shipped ones or add to them; if none, those in `runs` are taken.
        runs: where the commands leave their results by default.
        weights: folder of models, where results of a small scale are not of the shipped ones.
        folder: holds the published files; see `artifacts.resolve`.
        fail_on: what fails the gate: "worse" (a verdict is worse than the stored one, or a row is not that of the
            shipped results it stands in for), or verdicts.
        row: judge the claims about this row only, without discrepancies.
        checks: what decides counted claims, by name; `all_checks` of the ledger by default.

    Raises:
        ValueError: a file that is refused, an unknown verdict to fail on, or claims that cannot be read.
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
    sources, regressions = choose(gather(results, runs=Path(runs), weights=weights, folder=folder))
    statuses = {s.artifact.key: s for s in artifacts.status({k for c in ledger.claims for k in c.needs}, folder=folder)}
    findings = tuple(judge_claim(claim, sources, statuses, run_check) for claim in ledger.claims)
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
    """Score someone's images, and judge a claim about a row of table 3, and its siblings, by them.

    The images are judged, not how they were made. Writes `results.json` into `out`, for later audits.

    Args:
        samples: folder of images of 256 x 256 pixels, or .npz; only 50,000 decide the claim.
        claim_id: about FID, Inception Score, precision or recall.
        out: folder for the result file and features.
        folder: holds the published files; see `artifacts.resolve`.
        given: files named by the user, by key.
        other_inception: Inception weights that are not the published ones; scores are labelled and decide nothing.
        num_bootstrap: resamples behind the interval of FID; 0 leaves it out.
        batch_size: images per forward pass.
        fail_on: as for `audit_claims`.
        checks: as for `audit_claims`.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        ValueError: a claim that samples do not decide, or images or files that cannot be used.
    """
    paper = files.reference_folder() / "paper"
    claims = {claim.id: claim for claim in read_ledger(paper).claims}
    if claim_id not in claims:
        raise UserError(f"There is no claim {claim_id!r}; `tokenbridge audit` lists them.")
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
    return audit_claims([path], folder=folder, fail_on=fail_on, row=claim.row, checks=checks)


def _run_check(checks: Checks, name: str) -> float:
    if name not in checks:
        raise UserError(f"A claim or discrepancy names the check {name!r}, which there is not.")
    return float(checks[name]())
