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
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenbridge import CalledByName, artifacts, discrepancies, evaluation, provenance, table3
from tokenbridge import results as result_files
from tokenbridge.artifacts import ARTIFACTS, INCEPTION, REFERENCE_BATCH, STATISTICS, Status
from tokenbridge.claims import Claim, Discrepancy, Ledger, Tolerance, read_ledger
from tokenbridge.data import load_images
from tokenbridge.files import reference_folder, sha256_of, write_json
from tokenbridge.image_sets import open_images
from tokenbridge.recipes import SCALES
from tokenbridge.reproduce import trend_rows
from tokenbridge.reproduce import trends as trends_of
from tokenbridge.results import Provenance, Results, Row, Trend, incomparable, verdicts
from tokenbridge.systems import all_presets, find_preset

SCHEMA = "tokenbridge-audit/1"
EXPECTED_SCHEMA = "tokenbridge-expected/1"
WORSE = "worse"  # than the stored verdict
RUNS = ("tiny", "small", "discrepancies", "table1", *all_presets())  # folders that the commands write to by default

Verdict = Literal["reproduced", "not reproduced", "within doubt", "not run", "not applicable at this scale"]
"""`within doubt`: the measured value is in or out of the tolerance, but its interval is not wholly. `not applicable at
this scale`: nothing that could be run here decides it."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
RANK: dict[Verdict, int] = {
    "reproduced": 0,
    "within doubt": 1,
    "not run": 2,
    "not applicable at this scale": 2,
    "not reproduced": 3,
}
"""Higher is worse. A claim that ran and no longer does has lost its evidence; one that is contradicted is worse off."""

Checks = Mapping[str, Callable[[], float]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Evidence(_Strict):
    """A result file that an audit rests on, and where its numbers come from."""

    file: str
    sha256: str  # of the file
    scale: str
    rows: tuple[Row, ...]
    trends: tuple[Trend, ...]  # computed from the rows, not read
    provenance: dict[str, Any]  # `results.Provenance` as JSON
    notes: tuple[str, ...] = ()  # what was checked of it, what could not be, which file it stands in for


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
    failures: tuple[str, ...] = ()  # what fails the gate, in words; none: it is green


class Expected(_Strict):
    """The verdict that a claim had when it was last accepted."""

    verdict: Verdict
    reason: str = ""  # asked for where it is "not reproduced"


@dataclass(frozen=True)
class Source:
    """A result file that was read and checked."""

    name: str  # as the audit shows it
    path: Path
    origin: Literal["shipped", "found", "given"]
    results: Results
    trends: tuple[Trend, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> set[str]:
        """The rows that were run."""
        return {row.id for row in self.results.rows if row.not_run is None}

    def overlaps(self, other: Source) -> bool:
        """Whether both measured a row at one scale."""
        return self.results.scale == other.results.scale and bool(self.measured & other.measured)

    def noted(self, *notes: str) -> Source:
        """Return the same file with more notes."""
        return replace(self, notes=(*self.notes, *notes))


# ------------------------------------------------------------------------------------------------------- the audit


def audit(
    results: Sequence[Path | str] = (),
    *,
    shipped: Path | str | None = None,
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
        shipped: folder `reference_results`, with the claims in `paper/`; the package's own by default.
        runs: where the commands leave their results by default.
        weights: folder of models, where results of a small scale are not of the shipped ones.
        folder: holds the published files; see `artifacts.resolve`.
        fail_on: what fails the gate: "worse" (a verdict is worse than the stored one, or a row is not that of the
            shipped results it stands in for), or verdicts.
        row: judge the claims about this row only, without discrepancies.
        checks: what decides counted claims, by name; `checks.CHECKS` by default.

    Raises:
        ValueError: a file that is refused, an unknown verdict to fail on, or claims that cannot be read.
    """
    shipped = Path(shipped) if shipped is not None else reference_folder()
    if unknown := set(fail_on) - {WORSE, *VERDICTS}:
        raise ValueError(
            f"The gate fails on {WORSE!r} or on verdicts ({', '.join(VERDICTS)}), not on {min(unknown)!r}."
        )
    ledger = read_ledger(shipped / "paper")
    expected = read_expected(shipped / "paper" / "expected.json") if WORSE in fail_on else {}
    if row is not None:
        ledger = Ledger(claims=tuple(c for c in ledger.claims if c.row == row), discrepancies=())
    sources, regressions = choose(gather(results, shipped=shipped, runs=Path(runs), weights=weights, folder=folder))
    files = {s.artifact.key: s for s in artifacts.status({k for c in ledger.claims for k in c.needs}, folder=folder)}
    run_check = functools.cache(functools.partial(_run_check, _all_checks() if checks is None else checks))
    findings = tuple(_judge(claim, sources, files, run_check) for claim in ledger.claims)
    failures = gate_failures(findings, expected, fail_on, whole=row is None)
    return Audit(
        made=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **provenance.commit(),
        versions=provenance.versions(),
        findings=findings,
        effects=tuple(_effect(d, sources, run_check) for d in ledger.discrepancies),
        evidence=tuple(_evidence(source) for source in sources),
        failures=(*failures, *(regressions if WORSE in fail_on else ())),
    )


def audit_samples(
    samples: Path | str,
    claim_id: str,
    *,
    out: Path | str,
    shipped: Path | str | None = None,
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
        shipped: as for `audit`.
        folder: holds the published files; see `artifacts.resolve`.
        given: files named by the user, by key.
        other_inception: Inception weights that are not the published ones; scores are labelled and decide nothing.
        num_bootstrap: resamples behind the interval of FID; 0 leaves it out.
        batch_size: images per forward pass.
        fail_on: as for `audit`.
        checks: as for `audit`.

    Raises:
        MissingArtifactsError: files cannot be had; the message lists all of them.
        ValueError: a claim that samples do not decide, or images or files that cannot be used.
    """
    shipped = Path(shipped) if shipped is not None else reference_folder()
    claims = {claim.id: claim for claim in read_ledger(shipped / "paper").claims}
    if claim_id not in claims:
        raise ValueError(f"There is no claim {claim_id!r}; `tokenbridge audit` lists them.")
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
    return audit([path], shipped=shipped, folder=folder, fail_on=fail_on, row=claim.row, checks=checks)


def score_samples(
    samples: Path | str,
    claim: Claim,
    *,
    siblings: Sequence[Claim] = (),
    cache: Path | str,
    folder: Path | str | None = None,
    given: Mapping[str, Path | str | None] | None = None,
    other_inception: Path | str | None = None,
    num_bootstrap: int = 100,
    batch_size: int = 64,
) -> Results:
    """Return the scores of someone's images as the row that a claim is about.

    Args:
        samples: of `audit_samples`, as are the others.
        claim: the references that it needs must be here.
        siblings: claims about the same row; what they need is used if it is here.
        cache: folder for features.
        folder: holds the published files.
        given: files named by the user.
        other_inception: other Inception weights.
        num_bootstrap: resamples.
        batch_size: images per forward pass.

    Raises:
        MissingArtifactsError: files cannot be had.
        ValueError: a claim that samples do not decide, or images or files that cannot be used.
    """
    started = datetime.datetime.now(datetime.UTC)
    wanted = {key for other in (claim, *siblings) for key in other.needs}
    known = [key for key in (STATISTICS, REFERENCE_BATCH) if key in wanted]
    scores = {f"{name}-50K": name for name in table3.SCORES}
    if claim.scale != "paper" or claim.row is None or claim.metric not in scores or not known:
        raise ValueError(f"{claim.id} is no claim that samples decide: those are about {', '.join(scores)}.")
    there = {s.artifact.key for s in artifacts.status(known, folder=folder, given=given) if s.state != "missing"}
    keys = [key for key in known if key in claim.needs or key in there]
    inception_keys = [INCEPTION] if other_inception is None else []
    files = artifacts.resolve([*inception_keys, *keys], folder=folder, given=given)
    inception = files[INCEPTION] if other_inception is None else Path(other_inception)
    images = open_images(samples)
    if images.size != (table3.IMAGE_SIZE, table3.IMAGE_SIZE):
        raise ValueError(
            f"The images in {samples} are of {' x '.join(map(str, images.size))} pixels, those of the claim of "
            f"{table3.IMAGE_SIZE} x {table3.IMAGE_SIZE}: resizing changes scores, so do it knowingly and before."
        )
    scored = table3.score(
        samples,
        [files[key] for key in keys],
        inception=inception,
        num_images=len(images),
        allow_other_inception=other_inception is not None,
        num_bootstrap=num_bootstrap,
        batch_size=batch_size,
        cache=cache,
    )
    published = sha256_of(inception) == ARTIFACTS[INCEPTION].sha256
    seconds = (datetime.datetime.now(datetime.UTC) - started).total_seconds()
    return Results(
        scale="paper" if published and len(images) == table3.NUM_IMAGES else "evaluation",
        provenance=Provenance(
            command=provenance.command(),
            seed=evaluation.SEED,
            started=started.isoformat(timespec="seconds"),
            wall_seconds=round(seconds, 1),
            **provenance.commit(),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            data_sha256=scored.data_sha256,
            weights_sha256={INCEPTION: sha256_of(inception)},
            settings={
                "num_images": len(images),
                "published Inception weights": published,
                "samples": f"{samples}, made elsewhere: judged as images, not how they were made",
                "not run": scored.not_run,
            },
        ),
        rows=[Row(id=claim.row, label=f"samples in {Path(samples).name}", metrics=scored.metrics)],
        trends=[],
    )


# ---------------------------------------------------------------------------------------------------- the evidence


def gather(
    results: Sequence[Path | str],
    *,
    shipped: Path,
    runs: Path,
    weights: Path | str | None = None,
    folder: Path | str | None = None,
) -> list[Source]:
    """Read and check the shipped result files and the user's; arguments as `audit`.

    Raises:
        ValueError: a file that is refused, with the reason.
    """
    paths: list[tuple[Path, Literal["shipped", "found", "given"]]] = []
    paths += [(path, "shipped") for path in sorted(shipped.glob("*/results.json"))]
    if results:
        paths += [(Path(path), "given") for path in results]
    else:
        found = (folder / name / "results.json" for folder in (runs, runs / "tables") for name in RUNS)
        paths += [(path, "found") for path in found if path.is_file()]
    sources = []
    for path, origin in paths:
        name = f"reference_results/{path.relative_to(shipped)}" if origin == "shipped" else str(path)
        read = result_files.read(path)
        folders = [Path(weights)] if weights is not None and origin != "shipped" else []
        notes = check_hashes(name, read, [*folders, shipped / read.scale / "weights"], folder)
        if read.scale not in SCALES and (reason := incomparable(read, table3.NUM_IMAGES)) is not None:
            notes.append(f"decides no number of the paper: {reason}")
        sources.append(Source(name, path, origin, read, tuple(recomputed_trends(name, read)), tuple(notes)))
    return sources


def check_hashes(name: str, results: Results, folders: Sequence[Path], folder: Path | str | None = None) -> list[str]:
    """Compare the hashes that a result file names with the files that are here; return what was and was not compared.

    Args:
        name: of the result file.
        results: its contents.
        folders: of models of its scale.
        folder: holds the published files; see `artifacts.resolve`.

    Raises:
        ValueError: one differs; or the results of a scale of this project are not of its images, or name no weights.
    """
    p = results.provenance
    if results.scale in SCALES:
        known = {n: {sha256_of(f / n) for f in folders if (f / n).is_file()} for n in p.weights_sha256}
        if not known:
            raise ValueError(f"{name} does not say what weights it was measured with.")
        if any(f.is_dir() for f in folders) and not any(known.values()):
            raise ValueError(f"{name} was measured with weights of which none is here: {', '.join(known)}.")
        where = ", ".join(str(f) for f in folders)
        hint = f"has another SHA-256 in {where}; if results are of other weights, name their folder with --weights"
        named = dict(p.weights_sha256)
        data = SCALES[results.scale].data
        for split in (f"{data}/{part}" for part in ("train", "test")):
            if split not in p.data_sha256:
                raise ValueError(f"{name} was not measured on the images of its scale: it names no {split}.")
            named[split] = p.data_sha256[split]
            known[split] = {_hash_of_images(data, split.rpartition("/")[2])} if data == "digits" else set()
    elif results.scale == "paper":
        if p.settings.get("published Inception weights") and INCEPTION not in p.weights_sha256:
            raise ValueError(f"{name} does not say what Inception weights it was measured with.")
        keys = _artifacts_of(results)
        recorded = {s.artifact.key: s.sha256 for s in artifacts.status(set(keys.values()), folder=folder)}
        hashes = {**p.weights_sha256, **p.data_sha256}
        named = {n: hashes[n] for n in keys}
        known = {n: {h for h in (ARTIFACTS[k].sha256 or recorded[k],) if h is not None} for n, k in keys.items()}
        hint = "is published, or was recorded here, with another SHA-256"
    else:
        return []
    for part, sha256 in named.items():
        if known[part] and sha256 not in known[part]:
            raise ValueError(f"{name} was measured with {part} of SHA-256 {sha256[:16]}…, which {hint}.")
    compared = sum(bool(known[part]) for part in named)
    absent = [part for part in named if not known[part]]
    notes = [f"{compared} hashes of weights and images compared with the files here"]
    return notes + ([f"not here to compare: {', '.join(absent)}"] if absent else [])


def recomputed_trends(name: str, results: Results) -> list[Trend]:
    """Return the trends that follow from the rows of a result file.

    Raises:
        ValueError: a stored trend is another, or rows lack what a trend needs.
    """
    found: list[Trend] = []
    if results.scale in SCALES:
        try:
            found += trends_of(results.rows)
            found += discrepancies.trends(results.rows, SCALES[results.scale].extractor)
        except (KeyError, StopIteration, ZeroDivisionError) as error:
            raise ValueError(f"{name}: its rows lack metrics that its trends rest on ({error!r}).") from error
    by_id = {trend.id: trend for trend in found}
    for stored in results.trends:
        again = by_id.get(stored.id)
        if again is None or _numbers(again) != _numbers(stored):
            follows = "nothing" if again is None else " ".join(map(str, _numbers(again)))
            stated = " ".join(map(str, _numbers(stored)))
            raise ValueError(f"{name}: the trend {stored.id} says {stated}, but from the rows follows {follows}.")
    return found


def choose(sources: Iterable[Source]) -> tuple[list[Source], list[str]]:
    """Return the files to judge by, and the rows that are not those of the shipped file they stand in for.

    Raises:
        ValueError: two files of the user measured the same row at the same scale.
    """
    order = {"shipped": 0, "given": 1, "found": 2}
    found: list[Source] = []
    for source in sorted(sources, key=lambda s: (order[s.origin], s.results.scale, s.name)):
        if not any(source.results == other.results for other in found):  # the same file, perhaps copied
            found.append(source)
    shipped = [s for s in found if s.origin == "shipped"]
    kept: list[Source] = []
    regressions: list[str] = []
    replaced: set[str] = set()
    ignored: dict[str, list[str]] = {}
    for source in (s for s in found if s.origin != "shipped"):
        stood_for = [s for s in shipped if s.overlaps(source)]
        older = [s for s in stood_for if source.results.provenance.started < s.results.provenance.started]
        if source.origin == "found" and older:
            ignored.setdefault(older[0].name, []).append(f"{source.name} is older and was left out")
            continue
        for other in stood_for:
            replaced.add(other.name)
            source = source.noted(f"stands in for {other.name}")
            judged = verdicts(source.results, other.results)
            regressions += [
                f"{source.name}: {id_} is not that of {other.name}: {why}"
                for id_, (verdict, why) in judged.items()
                if verdict == "not reproduced"
            ]
        kept.append(source)
    for first, second in itertools.combinations(kept, 2):
        if first.overlaps(second) and first.results.scale in ("paper", *SCALES):
            both = ", ".join(sorted(first.measured & second.measured)[:3])
            raise ValueError(
                f"{first.name} and {second.name} both measured {both} at scale {first.results.scale}: name the one "
                "that is meant."
            )
    remaining = [s.noted(*ignored.get(s.name, ())) for s in shipped if s.name not in replaced]
    return [*remaining, *kept], regressions


# ---------------------------------------------------------------------------------------------------- the verdicts


def verdict_of(
    claimed: float, measured: float, tolerance: Tolerance | None, interval: tuple[float, float] | None = None
) -> Verdict:
    """Judge a measured value, or its interval, by the tolerance around the claimed one; without one, exactly."""
    low, high = (measured, measured) if interval is None else (min(*interval, measured), max(*interval, measured))
    # 1.33 - 1.11 is 0.22 but for the last bit of float arithmetic, which is no difference.
    granted = (tolerance.of(claimed) if tolerance is not None else 0.0) + 1e-12 * abs(claimed)
    distances = abs(low - claimed), abs(high - claimed)
    if max(distances) <= granted:
        return "reproduced"
    nearest = 0.0 if low <= claimed <= high else min(distances)
    return "not reproduced" if nearest > granted else "within doubt"


def interval_of(row: Row, metric: str) -> tuple[float, float] | None:
    """Return the bootstrap interval that a row has for a metric, as `evaluation.evaluate` stores it."""
    base = metric.removesuffix("-50K")
    low, high = (row.metrics.get(f"{base}-{end}") for end in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _judge(
    claim: Claim, sources: Sequence[Source], files: Mapping[str, Status], run_check: Callable[[str], float]
) -> Finding:
    support = tuple(_support(claim, sources))
    if claim.scale == "counted":
        measured = run_check(_named(claim, claim.check, "check"))
        # A claim in words has a check that is 1 where it is true.
        claimed = 1.0 if claim.value is None else claim.value
        verdict = verdict_of(claimed, measured, claim.tolerance)
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
                return Finding(claim=claim, verdict=verdict, why=why, measured=trend.measured, evidence=i)
        return _not_run(claim, _why_undecided(id_, claim.scale, sources), files, support)
    reasons = []
    for i, source in enumerate(sources):
        row = next((row for row in source.results.rows if row.id == claim.row), None)
        if row is None or claim.metric is None or source.results.scale in SCALES:
            continue
        if row.not_run is not None:
            reasons.append(f"{source.name}: {row.not_run}")
        elif (reason := incomparable(source.results, table3.NUM_IMAGES)) is not None:
            reasons.append(f"{source.name}: {reason}")
        elif claim.metric not in row.metrics:
            reasons.append(f"{source.name} has no {claim.metric} of {row.id}")
        elif claim.value is None:
            raise ValueError(f"The claim {claim.id} of scale paper has no value.")
        else:
            measured, interval = row.metrics[claim.metric], interval_of(row, claim.metric)
            return Finding(
                claim=claim,
                verdict=verdict_of(claim.value, measured, claim.tolerance, interval),
                why=_comparison(claim, measured, interval),
                measured=measured,
                interval=interval,
                evidence=i,
                support=support,
            )
    if claim.not_applicable is not None and not reasons:
        why = claim.not_applicable
        return Finding(claim=claim, verdict="not applicable at this scale", why=why, support=support)
    return _not_run(claim, reasons or [f"no result file has {claim.metric} of {claim.row}"], files, support)


def _why_undecided(trend: str, scale: str, sources: Sequence[Source]) -> list[str]:
    """Return the rows that a trend lacks, with the reasons that result files give."""
    rows = [row for source in sources if source.results.scale == scale for row in source.results.rows]
    measured = {row.id for row in rows if row.not_run is None}
    reasons = {row.id: row.not_run for row in rows if row.not_run is not None}
    lacking = [id_ for id_ in trend_rows().get(trend, ()) if id_ not in measured]
    if not lacking:
        raise ValueError(f"A claim names the trend {trend!r}, which there is not.")
    return [f"the trend {trend} rests on {id_}: {reasons.get(id_, 'in no result file')}" for id_ in lacking]


def _not_run(claim: Claim, reasons: list[str], files: Mapping[str, Status], support: tuple[str, ...]) -> Finding:
    absent = [files[key].artifact for key in claim.needs if files[key].state == "missing"]
    why = "; ".join(reasons)
    if absent:
        why += f". Missing here: {'; '.join(f'{a.key} from {a.origin}' for a in absent)}"
    return Finding(claim=claim, verdict="not run", why=f"{why}. To run it: {claim.recipe}", support=support)


def _comparison(claim: Claim, measured: float, interval: tuple[float, float] | None = None) -> str:
    """Return the two numbers and what lies between them, in words."""
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


def _effect(discrepancy: Discrepancy, sources: Sequence[Source], run_check: Callable[[str], float]) -> Effect:
    found = [(i, row) for i, s in enumerate(sources) for row in s.results.rows if row.id in discrepancy.rows]
    return Effect(
        discrepancy=discrepancy,
        rows=tuple(row for _, row in found),
        checks={name: run_check(name) for name in discrepancy.checks},
        evidence=found[0][0] if found else None,
    )


def _evidence(source: Source) -> Evidence:
    return Evidence(
        file=source.name,
        sha256=sha256_of(source.path),
        scale=source.results.scale,
        rows=tuple(source.results.rows),
        trends=source.trends,
        provenance=source.results.provenance.model_dump(mode="json"),
        notes=source.notes,
    )


# -------------------------------------------------------------------------------------------------------- the gate


def read_expected(path: Path | str) -> dict[str, Expected]:
    """Read the stored verdicts by claim.

    Raises:
        ValueError: there is no such file, it is damaged, or an expected failure has no reason.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict) or value.pop("schema_version", None) != EXPECTED_SCHEMA:
            raise ValueError(f"its schema_version is not {EXPECTED_SCHEMA}")
        expected = {id_: Expected.model_validate(entry) for id_, entry in value["verdicts"].items()}
        if bare := [id_ for id_, e in expected.items() if e.verdict == "not reproduced" and not e.reason.strip()]:
            raise ValueError(f"no reason is given why {bare[0]} is not reproduced")
    except FileNotFoundError as error:
        raise ValueError(f"There are no stored verdicts {path}; `tokenbridge audit --accept` writes them.") from error
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise ValueError(f"{path} is no file of expected verdicts: {error}.") from error
    return expected


def write_expected(path: Path | str, audit: Audit, reason: str) -> None:
    """Store the verdicts of an audit as the expected ones.

    Args:
        path: file to write.
        audit: of all claims.
        reason: of the claims that are not reproduced and were not before; the others keep theirs.
    """
    path = Path(path)
    if not reason.strip():
        raise ValueError("Verdicts are accepted for a reason: give one.")
    old = read_expected(path) if path.is_file() else {}
    entries = {}
    for finding in audit.findings:
        before = old.get(finding.claim.id)
        entry: dict[str, str] = {"verdict": finding.verdict}
        if finding.verdict == "not reproduced":
            entry["reason"] = before.reason if before is not None and before.verdict == finding.verdict else reason
        entries[finding.claim.id] = entry
    write_json(path, {"schema_version": EXPECTED_SCHEMA, "verdicts": entries})


def expected_verdict(id_: str, expected: Mapping[str, Expected]) -> Verdict:
    """Return the stored verdict of a claim.

    A claim without one is expected not to have run, so that a new one fails only if it is contradicted.
    """
    return expected[id_].verdict if id_ in expected else "not run"


def is_worse(verdict: Verdict, stored: Verdict) -> bool:
    """Whether a verdict is worse than the stored one."""
    return RANK[verdict] > RANK[stored]


def gate_failures(
    findings: Iterable[Finding], expected: Mapping[str, Expected], fail_on: Collection[str], *, whole: bool = True
) -> list[str]:
    """Return what fails the gate, a sentence each.

    Args:
        findings: of an audit.
        expected: stored verdicts by claim.
        fail_on: "worse", or verdicts.
        whole: whether the findings are of all claims, so that a stored one that is gone is missed.
    """
    failures: dict[str, str] = {}
    for finding in findings:
        id_, verdict = finding.claim.id, finding.verdict
        stored = expected_verdict(id_, expected)
        if WORSE in fail_on and is_worse(verdict, stored):
            failures[id_] = f"{id_} is {verdict}, stored is {stored}: {finding.why}"
        elif verdict in fail_on:
            failures[id_] = f"{id_} is {verdict}: {finding.why}"
    if WORSE in fail_on and whole:
        for id_ in sorted(expected.keys() - {finding.claim.id for finding in findings}):
            failures[id_] = f"{id_} has a stored verdict, but there is no such claim"
    return list(failures.values())


def _all_checks() -> Checks:
    from tokenbridge.checks import CHECKS

    return {name: check.run for name, check in CHECKS.items()}


def _run_check(checks: Checks, name: str) -> float:
    if name not in checks:
        raise ValueError(f"A claim or discrepancy names the check {name!r}, which there is not.")
    return float(checks[name]())


def _named(claim: Claim, name: str | None, what: str) -> str:
    if name is None:
        raise ValueError(f"The claim {claim.id} of scale {claim.scale} names no {what}.")
    return name


def _numbers(trend: Trend) -> tuple[float, str, float]:
    return trend.measured, trend.relation, trend.bound


@functools.cache
def _hash_of_images(data: str, split: str) -> str:
    return provenance.hash_of_dataset(load_images(data, split))


def _artifacts_of(results: Results) -> dict[str, str]:
    """Return which published file each name in a paper-scale result's hashes is of, where that is known."""
    p = results.provenance
    parts: dict[str, str] = {}
    for system in (row.id.removeprefix("table3/") for row in results.rows):
        if system in all_presets():
            kind, preset = find_preset(system)
            parts = {"generator": preset.name, kind.recipe: kind.tokenizer.key}
    keys = {name: parts.get(name, name) for name in p.weights_sha256}
    if not p.settings.get("published Inception weights"):
        keys.pop(INCEPTION, None)
    statistics = Path(ARTIFACTS[STATISTICS].file).name
    keys |= {name: STATISTICS for name in p.data_sha256 if Path(name).name == statistics}
    return {name: key for name, key in keys.items() if key in ARTIFACTS}


sys.modules[__name__].__class__ = CalledByName
