"""Result files: their format, and how they are read and written.

A result file (`results.json`) holds rows of metrics with their provenance. `results.compare` compares each row, metric
by metric, with the row of the same id in a reference file, and `results.markdown` formats the tables.

A file carries the SHA-256 of its own contents. That detects damage and careless edits, not forgery: whoever changes a
number on purpose can compute a new digest. A forged file is exposed by measuring again, and by the hashes of weights,
images and tokens that it must name.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tokenbridge.results.tolerances import metric
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import write_json
from tokenbridge.utils.strict import Strict, read_json

SCHEMA = "tokenbridge-results/1"
STAND_IN = "stand-in: no result"  # the scale of results that random weights gave


class Row(Strict):
    """A row of a table: the metrics that were measured, or the reason why they were not."""

    id: str  # "table2a/parallel": the table, then the name of the row
    label: str  # how the table calls it
    metrics: dict[str, float]  # by name; see `results.tolerances.METRICS`
    not_run: str | None = None  # the reason, if it was not run

    @property
    def table(self) -> str:
        """The table this row belongs to."""
        return self.id.split("/")[0]


class Trend(Strict):
    """A claim about the rows in words, and the number that decides it."""

    id: str
    claim: str
    measured: float
    bound: float
    relation: Literal[">=", "<="]

    @property
    def holds(self) -> bool:
        """Whether the measured number is within the bound."""
        return self.measured >= self.bound if self.relation == ">=" else self.measured <= self.bound


class Provenance(Strict):
    """How and by what the numbers were measured."""

    command: str
    seed: int
    started: str  # UTC, ISO 8601
    wall_seconds: float
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: dict[str, Any]
    data_sha256: dict[str, str]
    weights_sha256: dict[str, str]
    settings: dict[str, Any]  # number of images, sampling settings of each system


class Results(Strict):
    """The contents of a result file: everything that a run measured."""

    schema_version: Literal["tokenbridge-results/1"] = "tokenbridge-results/1"
    scale: str
    provenance: Provenance
    rows: list[Row]
    trends: list[Trend]


def digest_of(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of a result file's contents without the digest itself.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    rest = {key: part for key, part in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path | str, results: Results) -> None:
    """Write a result file with the digest of its contents; the file appears whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    value = results.model_dump(mode="json")
    write_json(path, {**value, "sha256": digest_of(value)})


def read(path: Path | str) -> Results:
    """Read a result file.

    Raises:
        UserError: the file is missing, a folder, truncated, in another format, or was changed after it was written; or
            it has a row twice, or a metric that is NaN, infinite, unknown or impossible.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a result file (results.json) in it.")
    if not path.exists():
        raise UserError(f"There is no result file {path}.")
    value = read_json(path, "a result file")
    sha256 = value.pop("sha256", None) if isinstance(value, dict) else None
    try:
        results = Results.model_validate(value, strict=True)  # "1.76" and true are no numbers
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise UserError(f"{path} is not a {SCHEMA} file: {where}: {first['msg']}.") from error
    try:
        found = digest_of(value)
    except ValueError as error:
        raise UserError(f"{path} holds a number that is NaN or infinite.") from error
    if sha256 is None:
        raise UserError(f"{path} has no digest of its contents (field sha256): it is not as it was written.")
    if sha256 != found:
        raise UserError(f"{path} was changed after it was written: its contents have digest {found}, not {sha256}.")
    if twice := [id_ for id_, count in Counter(row.id for row in results.rows).items() if count > 1]:
        raise UserError(f"{path} has rows twice: {', '.join(sorted(twice)[:5])}.")
    if wrong := _impossible(results.provenance):
        raise UserError(f"{path}: {wrong}.")
    for row in results.rows:
        for name, value in row.metrics.items():
            try:
                m = metric(name)
            except KeyError as error:
                raise UserError(f"{path} has an unknown metric {name[:80]!r}.") from error
            if not m.low - m.absolute <= value <= m.high:
                raise UserError(f"{path}: {row.id} has {name} {value:g}, which no measurement can give.")
    return results


def _impossible(p: Provenance) -> str | None:
    """Return what no measurement could have recorded; None if there is no such thing."""
    if p.seed < 0:
        return f"its seed is {p.seed}, and seeds are at least 0"
    if p.wall_seconds < 0:
        return f"it took {p.wall_seconds:g} seconds, which no measurement can"
    try:
        zone = datetime.datetime.fromisoformat(p.started).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        return f"it started at {p.started[:80]!r}, which is no time with a time zone (ISO 8601)"
    return None
