"""The stored verdicts, with which a new audit is compared."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from tokenbridge.audit.findings import Audit, Finding
from tokenbridge.results.verdicts import Verdict, is_worse
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import write_json
from tokenbridge.utils.strict import Strict, read_json

EXPECTED_SCHEMA = "tokenbridge-expected/1"
WORSE = "worse"  # a verdict that is worse than the stored one


class Expected(Strict):
    """The verdict that a claim had when it was last accepted."""

    verdict: Verdict
    reason: str = ""  # required if the verdict is "not reproduced"


def read_expected(path: Path | str) -> dict[str, Expected]:
    """Read the stored verdicts by the id of the claim.

    Raises:
        UserError: the file is missing or damaged, or an expected failure has no reason.
    """
    path = Path(path)
    try:
        value = read_json(path, "a file of expected verdicts")
        if not isinstance(value, dict) or value.pop("schema_version", None) != EXPECTED_SCHEMA:
            raise UserError(f"its schema_version is not {EXPECTED_SCHEMA}")
        expected = {id_: Expected.model_validate(entry) for id_, entry in value["verdicts"].items()}
        if bare := [id_ for id_, e in expected.items() if e.verdict == "not reproduced" and not e.reason.strip()]:
            raise UserError(f"no reason is given why {bare[0]} is not reproduced")
    except FileNotFoundError as error:
        raise UserError(f"There are no stored verdicts {path}; `tokenbridge audit --accept` writes them.") from error
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise UserError(f"{path} is not a file of expected verdicts: {error}.") from error
    return expected


def write_expected(path: Path | str, audit: Audit, reason: str) -> None:
    """Store the verdicts of an audit as the expected ones.

    Args:
        audit: an audit of all claims.
        reason: the reason for claims that are newly not reproduced; the others keep their reasons.

    Raises:
        UserError: the reason is empty, or the file that is replaced is damaged.
    """
    path = Path(path)
    if not reason.strip():
        raise UserError("Verdicts are accepted for a reason: give one.")
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

    A claim without a stored verdict is expected to be "not run", so that a new claim fails only if it is contradicted.
    """
    return expected[id_].verdict if id_ in expected else "not run"


def gate_failures(
    findings: Iterable[Finding], expected: Mapping[str, Expected], fail_on: Collection[str], *, whole: bool = True
) -> list[str]:
    """Return one sentence for each claim that fails the gate.

    Args:
        findings: the findings of an audit.
        expected: the stored verdicts by the id of the claim.
        fail_on: "worse", or verdicts.
        whole: whether the findings are those of all claims, so that a stored verdict without a claim fails too.
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
