"""The regression gate: does the code still give the golden cases and the stored results, tokens, verdicts and ratios?

Every part of the gate is a list of checks. A failed check says what changed. A check that could not be run says what is
missing.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenbridge.audit.audit import audit_claims as run_audit
from tokenbridge.audit.expected import WORSE, expected_verdict, gate_failures, read_expected
from tokenbridge.audit.report import write_report
from tokenbridge.conformance import judge as conformance
from tokenbridge.data.sources import load_images
from tokenbridge.regression import ratios
from tokenbridge.reproduction.small_scale import golden_tokens, reconstruction_rows, reproduce_scale
from tokenbridge.reproduction.trends import trends
from tokenbridge.reproduction.workbench import open_workbench
from tokenbridge.results import compare
from tokenbridge.results import schema as results
from tokenbridge.results.verdicts import CheckVerdict, is_worse
from tokenbridge.utils import junit
from tokenbridge.utils.console import Cell, colored, log, print_line, print_table
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import make_folder, references_in, sha256_of, write_text
from tokenbridge.utils.provenance import hash_of_dataset
from tokenbridge.utils.strict import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tokenbridge.audit.expected import Expected
    from tokenbridge.audit.findings import Audit
    from tokenbridge.configs.schema import Scale
    from tokenbridge.results.schema import Results, Row

SHARE_OF_TOKENS = 0.8
"""The share of tokens that must equal the stored ones. Rounding on another processor can flip a token, after which the
rest of its image is drawn anew, and a file holds ten images. With another seed less than a fifth are equal."""
LATENTS = 0.01
"""Latents (of unit variance, stored to 3 decimals) that differ by at most this count as equal. The bound was set before
anything was measured."""


@dataclass(frozen=True)
class Check:
    """One comparison with a reference, and its verdict."""

    name: str
    verdict: CheckVerdict
    why: str = ""


@dataclass(frozen=True)
class Part:
    """The checks of one part of the gate."""

    name: str
    checks: tuple[Check, ...]
    seconds: float = 0.0

    @property
    def verdict(self) -> CheckVerdict:
        """The worst verdict of its checks: "fail", then "not run", then "pass"; "skipped" if all were skipped."""
        found = {check.verdict for check in self.checks}
        order: tuple[CheckVerdict, ...] = ("fail", "not run", "pass")
        return next((verdict for verdict in order if verdict in found), "skipped")

    @property
    def why(self) -> str:
        """The first reason for the verdict, and how many more there are."""
        reasons = [f"{check.name}: {check.why}" for check in self.checks if check.verdict == self.verdict and check.why]
        if self.verdict == "pass" or not reasons:
            return ""
        return reasons[0] + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


# ---------------------------------------------------------------------------------------------------- parts


def goldens(folder: Path | str) -> list[Check]:
    """Run the golden cases of the official code, one check per file; a file in `SHA256SUMS` that is missing fails.

    Raises:
        FileNotFoundError: `SHA256SUMS` is missing.
    """
    lines = (Path(folder) / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {name: sha256 for sha256, name in (line.split() for line in lines)}
    absent = [name for name in listed if not (Path(folder) / name).is_file()]
    checks = [Check(Path(name).stem, "fail", "SHA256SUMS lists the file, but it is missing") for name in absent]
    for report in conformance.run_files([folder]):
        bad = [f"{outcome.name}: {outcome.reason}" for outcome in report.outcomes if outcome.verdict == "fail"]
        path = Path(report.path)
        if path.is_file() and sha256_of(path) != listed.get(path.name):
            bad.append("the file is not the one that SHA256SUMS lists")
        checks.append(Check(path.stem, "fail" if bad else "pass", "; ".join(bad)))
    return checks


def tiny(scale: Scale, folder: Path | str, out: Path | str, *, quick: bool = False) -> list[Check]:
    """Measure the stored results again from the stored weights, one check per row, trend and file.

    Args:
        folder: the folder that holds `results.json` and `weights/`.
        out: the folder for the new results.
        quick: whether to measure reconstruction only. Sampling takes minutes, and times need a quiet machine.

    Raises:
        UserError: the stored results are missing or damaged, or images are missing.
        MissingFileError: weights are missing.
    """
    stored = results.read(Path(folder) / "results.json")
    checks = stored_checks(stored, Path(folder) / "weights")
    if quick:
        bench = open_workbench(scale, Path(folder) / "weights")
        with tempfile.TemporaryDirectory() as folder_of_the_picture:  # `out` is for the files of a whole run
            checks += row_checks(reconstruction_rows(bench, Path(folder_of_the_picture)), stored)
        measured = {check.name for check in checks}
        rest = [*(row.id for row in stored.rows), *(trend.id for trend in stored.trends)]
        return checks + [Check(id_, "skipped", "--quick") for id_ in rest if id_ not in measured]
    done, _ = reproduce_scale(
        scale,
        weights=Path(folder) / "weights",
        out=out,
        reference=None,
        num_images=stored.provenance.settings["num_images"],
        seed=stored.provenance.seed,
    )
    held = {trend.id for trend in stored.trends if trend.holds}
    checks += row_checks(done.rows, stored, whole=True)
    for trend in done.trends:
        words = f"{trend.measured:.4g}, asked {trend.relation} {trend.bound:.4g}"
        checks.append(Check(trend.id, "pass" if trend.holds or trend.id not in held else "fail", words))
    return checks


def stored_checks(stored: Results, weights: Path) -> list[Check]:
    """Check stored results against themselves and the files they name: trends, and hashes of weights and images."""
    numbers, again = (
        [(t.id, t.measured, t.relation, t.bound) for t in found] for found in (stored.trends, trends(stored.rows))
    )
    checks = [_check("stored trends", numbers == again, "they do not follow from the stored rows")]
    for name, sha256 in stored.provenance.weights_sha256.items():
        path = weights / name
        why = f"{path} is not the file that was measured" if path.is_file() else f"{path} is missing"
        checks.append(_check(f"weights {name}", path.is_file() and sha256_of(path) == sha256, why))
    for name, sha256 in stored.provenance.data_sha256.items():
        data, _, split = name.rpartition("/")
        same = hash_of_dataset(load_images(data, split)) == sha256
        checks.append(_check(f"images {name}", same, "the images are not those that were measured"))
    return checks


def row_checks(rows: Sequence[Row], stored: Results, *, whole: bool = False) -> list[Check]:
    """Compare rows with the stored rows of the same id. With `whole`, a stored row that was not measured fails."""
    judged: Mapping[str, tuple[str, str]]
    if whole:
        judged = compare.verdicts(stored.model_copy(update={"rows": list(rows)}), stored)
    else:
        by_id = {row.id: row for row in stored.rows}
        judged = {row.id: compare.compare(row, by_id.get(row.id)) for row in rows}
    was_run = {row.id for row in stored.rows if row.not_run is None}
    checks = []
    for id_, (verdict, why) in judged.items():
        if verdict == "not run":  # the row was not run when it was stored either, or it is not run any more
            checks.append(Check(id_, "fail" if id_ in was_run else "skipped", why))
        else:
            checks.append(_check(id_, verdict == "reproduced", why))
    return checks


def tokens(scale: Scale, folder: Path | str) -> list[Check]:
    """Sample ten images of each generator with fixed seeds, and compare their tokens with `tokens.json`.

    Raises:
        UserError: the stored tokens are missing or damaged.
        MissingFileError: the classifier's weights are missing.
    """
    stored = read_tokens(Path(folder) / "tokens.json")
    measured = golden_tokens(open_workbench(scale, Path(folder) / "weights"))
    checks = []
    for name in dict.fromkeys([*stored, *measured]):
        if name not in measured or name not in stored:
            why = "this scale has no such model" if name in stored else "no stored tokens"
            checks.append(Check(name, "fail", why))
            continue
        share = share_equal(measured[name], stored[name])
        checks.append(Check(name, "pass" if share >= SHARE_OF_TOKENS else "fail", f"{share:.1%} are the stored ones"))
    return checks


def read_tokens(path: Path | str) -> dict[str, list[Any]]:
    """Read stored tokens, which are nested lists by the name of the model.

    Raises:
        UserError: the file is missing or truncated.
    """
    path = Path(path)
    try:
        found = read_json(path, "a file of stored tokens")
    except FileNotFoundError as error:
        raise UserError(f"There are no stored tokens {path}.") from error
    if not isinstance(found, dict) or not all(isinstance(tokens, list) for tokens in found.values()):
        raise UserError(f"{path} is not a file of stored tokens, which are lists by the name of the model.")
    return found


def share_equal(first: list[Any], second: list[Any]) -> float:
    """Return which share of two nested lists is equal; 0 if their shapes differ.

    Tokens must be equal exactly, latents to within `LATENTS`.
    """
    a, b = torch.tensor(first), torch.tensor(second)
    if a.shape != b.shape:
        return 0.0
    same = (a - b).abs() <= LATENTS if a.is_floating_point() or b.is_floating_point() else a == b
    return same.double().mean().item()


def audit(folder: Path | str, out: Path | str, own: Path | None = None) -> list[Check]:
    """Judge every published claim, and compare its verdict with the stored one, one check per claim.

    The page of the audit, its Markdown, JSON and JUnit XML are written into `out`.

    Args:
        folder: the references, with the claims and stored verdicts in `paper/`.
        own: the folder of tiny results that replace the stored ones.

    Raises:
        UserError: a result file is refused, or the stored verdicts are missing.
    """
    folder = Path(folder)
    expected = read_expected(folder / "paper" / "expected.json")
    done = audit_of(folder, own)
    write_report(done, out, reference=folder)
    return verdict_checks(done, expected)


def audit_of(folder: Path, own: Path | None, fail_on: Sequence[str] = (WORSE,)) -> Audit:
    """Audit the references, in which the tiny results in `own` replace the stored ones; no other run is read."""
    with references_in(folder), tempfile.TemporaryDirectory() as no_runs:
        given = [] if own is None else [own / "results.json"]
        return run_audit(given, runs=no_runs, fail_on=fail_on)


def verdict_checks(done: Audit, expected: Mapping[str, Expected]) -> list[Check]:
    """Compare the verdicts of an audit with the stored ones, and report its other failures."""
    checks = []
    for finding in done.findings:
        stored = expected_verdict(finding.claim.id, expected)
        why = f"{finding.verdict}, stored is {stored}: {finding.why}"
        checks.append(Check(finding.claim.id, "fail" if is_worse(finding.verdict, stored) else "pass", why))
    of_claims = gate_failures(done.findings, expected, (WORSE,), whole=False)
    others = [failure for failure in done.failures if failure not in of_claims]
    return checks + [Check(f"other {number}", "fail", why) for number, why in enumerate(others, start=1)]


def benchmarks(path: Path | str, root: Path = ratios.ROOT) -> list[Check]:
    """Measure the ratios of the benchmarks, and measure those again that fall behind the stored ones.

    Args:
        path: the file of stored ratios.
        root: the checkout that holds `benchmarks/`.

    Raises:
        UserError: the stored ratios are missing or damaged, or the benchmarks cannot be run.
    """
    stored = ratios.read(path)
    measured = ratios.measure(root=root)

    def judged() -> dict[str, tuple[bool, str]]:
        names = dict.fromkeys([*stored.ratios, *measured.ratios])
        return {name: ratios.compare(measured.ratios.get(name), stored.ratios.get(name)) for name in names}

    for _ in range(ratios.NUM_RUNS - 1):
        slow = [measured.ratios[n].test for n, (good, _) in judged().items() if not good and n in measured.ratios]
        if slow:
            measured = ratios.merge(measured, ratios.measure(slow, root=root))
    failed = [Check(name, "fail", "the test fails; its message is above") for name in measured.failed]
    return failed + [Check(name, "pass" if good else "fail", why) for name, (good, why) in judged().items()]


# ----------------------------------------------------------------------------------------------------- gate

PARTS = ("goldens", "tiny", "tokens", "audit", "benchmarks")
SLOW = ("benchmarks",)  # --quick skips these parts, and limits `tiny` to reconstruction


def run_gate(
    scale: Scale,
    references: Path | str,
    out: Path | str,
    *,
    parts: Sequence[str] = PARTS,
    quick: bool = False,
) -> list[Part]:
    """Run parts of the gate. A part that raises an error becomes a check that was not run and says why.

    Args:
        scale: the scale of the parts `tiny` and `tokens`.
        references: the folder of references, `reference_results/`.
        out: the folder for new results.
        parts: names in `PARTS`.
        quick: whether to leave out what takes minutes.

    Raises:
        UserError: a part is unknown.
    """
    references, out = Path(references), Path(out)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"The gate has no part {', '.join(unknown)}; it has {', '.join(PARTS)}.")
    make_folder(out)
    done: list[Part] = []

    def own() -> Path | None:
        """Return the folder of what the part `tiny` has just measured; an older one says nothing about this code."""
        ran = any(part.name == "tiny" and part.verdict != "not run" for part in done)
        return out / scale.name if ran and not quick else None

    functions: dict[str, Callable[[], list[Check]]] = {
        "goldens": lambda: goldens(references / "goldens"),
        "tiny": lambda: tiny(scale, references / scale.name, out / scale.name, quick=quick),
        "tokens": lambda: tokens(scale, references / scale.name),
        "audit": lambda: audit(references, out / "audit", own()),
        "benchmarks": lambda: benchmarks(references / "benchmarks" / "ratios.json"),
    }
    for name in PARTS:
        if name not in parts:
            continue
        if quick and name in SLOW:
            done.append(Part(name, (Check("all", "skipped", "--quick"),)))
            continue
        log(f"gate: {name}")
        done.append(run_part(name, functions[name]))
    return done


def run_part(name: str, function: Callable[[], list[Check]]) -> Part:
    """Run one part. An error, or a part without checks, gives one check that was not run."""
    start = time.monotonic()
    try:
        checks = function() or [Check("all", "not run", "there was nothing to check")]
    except Exception as error:  # the other parts must still run, and the report must be written
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        checks = [Check("all", "not run", why)]
    return Part(name, tuple(checks), round(time.monotonic() - start, 1))


def exit_code(parts: Iterable[Part]) -> int:
    """Return 1 if anything failed, else 2 if anything could not be run, else 0."""
    found = {part.verdict for part in parts}
    return 1 if "fail" in found else 2 if "not run" in found else 0


def print_parts(parts: Sequence[Part]) -> None:
    """Print a table of the parts, and below it every check that failed or was not run."""
    body: list[list[Cell]] = []
    for part in parts:
        count = Counter(check.verdict for check in part.checks)
        compared = f"{count['pass']} of {len(part.checks) - count['skipped']}"
        seconds = f"{part.seconds:.0f}"
        body.append([part.name, compared, str(count["skipped"]), seconds, colored(part.verdict), part.why])
    print_table("Regression gate", ["part", "passed", "skipped", "seconds", "verdict", "why"], body)
    for part in parts:
        for check in part.checks:
            if check.verdict in ("fail", "not run"):
                print_line(f"{part.name}, {check.name}: {check.verdict}: {check.why}")


def write_junit(path: Path | str, parts: Iterable[Part]) -> None:
    """Write JUnit XML with one suite per part and one test case per check."""

    def case_of(part: Part, check: Check) -> junit.Case:
        result = _JUNIT.get(check.verdict)
        if result is None:
            return junit.Case(f"gate.{part.name}", check.name, text=check.why)
        return junit.Case(f"gate.{part.name}", check.name, result, check.why)

    suites = [
        junit.Suite(part.name, [case_of(part, check) for check in part.checks], {"time": str(part.seconds)})
        for part in parts
    ]
    write_text(path, junit.to_xml("gate", suites))


_JUNIT: dict[CheckVerdict, junit.Result] = {"fail": "failure", "not run": "error", "skipped": "skipped"}


def _check(name: str, good: bool, why: str) -> Check:
    return Check(name, "pass" if good else "fail", "" if good else why)
