"""Results, their comparison with stored ones, and the tables people read.

A result file (`results.json`) holds rows of metrics with their provenance. Each row is compared, metric by metric,
with the row of the same id in a reference file: "reproduced" within the stated tolerances, else "not reproduced".

A file carries the SHA-256 of its own contents. That detects damage and careless edits, not forgery: who changes a
number on purpose can compute the digest anew. What speaks against a forged file is measuring again, and the hashes of
weights, images and tokens that it must name.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenbridge.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SCHEMA = "tokenbridge-results/1"
STAND_IN = "stand-in: no result"  # scale of what random weights gave
NUM_IMAGES = 50_000  # behind the paper's scores

Verdict = Literal["reproduced", "not reproduced", "not run", "not compared"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Row(_Strict):
    """One row of one table: what was measured, or why it was not."""

    id: str  # "table2a/ar": table, then the row's own name
    label: str  # what the table shows
    metrics: dict[str, float]  # by name; units are in `METRICS`
    not_run: str | None = None  # the reason, if it was not run

    @property
    def table(self) -> str:
        """The table this row belongs to."""
        return self.id.split("/")[0]


class Trend(_Strict):
    """A claim about the rows, in words, with the number that decides it."""

    id: str
    claim: str
    measured: float
    bound: float
    relation: Literal[">=", "<="]

    @property
    def holds(self) -> bool:
        """Whether the measured number keeps the bound."""
        return self.measured >= self.bound if self.relation == ">=" else self.measured <= self.bound


class Provenance(_Strict):
    """Where the numbers come from."""

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


class Results(_Strict):
    """Everything a run measured."""

    schema_version: Literal["tokenbridge-results/1"] = "tokenbridge-results/1"
    scale: str
    provenance: Provenance
    rows: list[Row]
    trends: list[Trend]


@dataclass(frozen=True)
class Metric:
    """How a metric is printed and compared."""

    decimals: int
    relative: float  # tolerance as a share of the reference value
    absolute: float  # tolerance that is always granted
    reason: str  # why the tolerance has this size
    low: float = 0.0  # of what can be; FID of equal sets rounds to a little less, so the absolute tolerance is granted
    high: float = math.inf


_SAME_NUMBERS = "deterministic; the rest is float rounding across processors"
_SAMPLING = (
    "rounding on another processor can flip single tokens, which re-draws part of the images; "
    "three standard deviations over four seeds or more (measured at tiny scale, 2,000 images)"
)
_PUBLISHED_RECONSTRUCTION = (
    "set beforehand, not measured: the paper rounds, draws the posterior without a seed, and names no versions; "
    "Inception and the VAE round differently on other hardware"
)
_PUBLISHED_INCEPTION_SCORE = (
    "set beforehand, not measured: printed rounded; draws without a published seed, versions that are not named and "
    "other hardware each move it"
)
_PUBLISHED_SHARE = "set beforehand, not measured: printed with two decimals, and one unit of the last for other draws"
_PUBLISHED_SAMPLES = (
    "set beforehand: printed rounded, and FID-50K of one recipe spreads by 1 to 2 % over seeds of training and "
    "sampling (arXiv 2606.20536); the estimator's bias falls with the number of images (arXiv 1911.07023), which is "
    "50,000 on both sides"
)
_DEVIATION = "of three seeds, each within the tolerance of its score"
_CHANGE = "of two scores, each within its tolerance; the mean of three seeds"
_NEAR_EDGES = "counted; rounding on another processor moves values that lie beside the edge of a bin"
_HALF = "where rounding flips a first token, the rest of the image is drawn anew; half precision differs by processor"
_TIMING = "a time depends on the machine and is not compared; the ratios within one run are"
_RATIO = "ratio of two times of one run, on a machine that others may share; a trend and the benchmarks judge speed"

METRICS: dict[str, Metric] = {
    "PSNR": Metric(2, 0.0, 0.05, _SAME_NUMBERS),
    "SSIM": Metric(4, 0.0, 0.002, _SAME_NUMBERS, low=-1.0, high=1.0),
    "rFID": Metric(4, 0.03, 0.001, _SAME_NUMBERS),
    "rFID-50K": Metric(2, 0.01, 0.03, _PUBLISHED_RECONSTRUCTION),
    "IS-50K": Metric(1, 0.01, 0.0, _PUBLISHED_INCEPTION_SCORE, low=0.999),
    "FID-50K": Metric(2, 0.03, 0.005, _PUBLISHED_SAMPLES),
    "precision-50K": Metric(2, 0.0, 0.01, _PUBLISHED_SHARE, high=1.0),
    "recall-50K": Metric(2, 0.0, 0.01, _PUBLISHED_SHARE, high=1.0),
    "FID": Metric(3, 0.05, 0.002, _SAMPLING),
    # The bootstrap's ends are moved by its bias, below 0 where FID is small.
    **dict.fromkeys(("FID-low", "FID-high", "FID-bias"), Metric(3, 0.05, 0.002, _SAMPLING, low=-math.inf)),
    "FID-cleanfid": Metric(3, 0.05, 0.002, _SAMPLING),
    "IS": Metric(2, 0.015, 0.0, _SAMPLING, low=0.999),  # 1 but for rounding, where all images look alike
    "IS-std": Metric(2, 0.015, 0.0, _SAMPLING),
    "KID": Metric(4, 0.10, 0.0002, _SAMPLING, low=-1.0),
    "precision": Metric(3, 0.0, 0.04, _SAMPLING, high=1.0),
    "recall": Metric(3, 0.0, 0.05, _SAMPLING, high=1.0),
    "class accuracy": Metric(3, 0.0, 0.008, _SAMPLING, high=1.0),
    "± FID": Metric(4, 0.0, 0.004, _DEVIATION),
    "± IS": Metric(2, 0.0, 0.15, _DEVIATION),
    "± class accuracy": Metric(4, 0.0, 0.008, _DEVIATION),
    "± PSNR": Metric(3, 0.0, 0.05, _DEVIATION),
    "± SSIM": Metric(5, 0.0, 0.002, _DEVIATION),
    "± rFID": Metric(5, 0.0, 0.001, _DEVIATION),
    "change of FID": Metric(4, 0.05, 0.004, _CHANGE, low=-math.inf),
    "± change of FID": Metric(4, 0.05, 0.006, _CHANGE),
    "tokens that differ": Metric(4, 0.05, 0.0002, _NEAR_EDGES, high=1.0),
    "generated tokens that differ": Metric(3, 0.15, 0.02, _HALF, high=1.0),
    "images that differ": Metric(3, 0.15, 0.05, _HALF, high=1.0),
    "pixels that differ": Metric(4, 0.02, 0.002, _SAMPLING, high=1.0),
    "fallbacks": Metric(4, 0.15, 0.002, _SAMPLING, high=1.0),
    "acceptance": Metric(3, 0.05, 0.0, _SAMPLING, high=1.0),
    "not covered": Metric(4, 0.15, 0.002, _SAMPLING, high=1.0),
    "deviation of draws": Metric(3, 0.0, 0.02, _SAMPLING),
    "bits per image": Metric(0, 0.0, 0.0, "counted"),
    "relative MSE": Metric(6, 0.01, 0.0, _SAME_NUMBERS),
    "images": Metric(0, 0.0, 0.0, "counted"),
    "parameters": Metric(0, 0.0, 0.0, "counted"),
    "seconds per image": Metric(4, math.inf, 0.0, _TIMING),
    "ms per position": Metric(2, math.inf, 0.0, _TIMING),
    "± ms": Metric(2, math.inf, 0.0, _TIMING),
    "speed-up": Metric(2, 1.0, 0.0, _RATIO),
    "against diffusion": Metric(2, 1.0, 0.0, _RATIO),
}
"""Metrics by name; `FID-digits` or `FID (50 images)` are found by what they begin with. `-50K`: of 50,000
images by the published Inception weights, against the paper."""


def metric(name: str) -> Metric:
    """Return how the metric `name` is printed and compared.

    Raises:
        KeyError: an unknown metric.
    """
    known = name.partition(" (")[0]
    while known and known not in METRICS:
        known = known.rpartition("-")[0]
    return METRICS[known or name]


def within(name: str, measured: float, reference: float) -> bool:
    """Whether a measured value lies within the metric's tolerance of the reference value."""
    m = metric(name)
    if math.isinf(m.relative):
        return measured > 0
    return abs(measured - reference) <= m.absolute + m.relative * abs(reference)


def compare(row: Row, reference: Row | None) -> tuple[Verdict, str]:
    """Return the verdict on a row, and what it rests on."""
    if row.not_run is not None:
        return "not run", row.not_run
    if reference is None or reference.not_run is not None:
        return "not reproduced", "the reference has no such row"
    if missing := reference.metrics.keys() ^ row.metrics.keys():
        return "not reproduced", f"only one of the two has {', '.join(sorted(missing))}"
    off = [
        f"{name} {row.metrics[name]:.10g} against {value:.10g}"
        for name, value in reference.metrics.items()
        if not within(name, row.metrics[name], value)
    ]
    return ("not reproduced", "; ".join(off)) if off else ("reproduced", "all metrics within tolerance")


def incomparable(results: Results, num_images: int = NUM_IMAGES) -> str | None:
    """Return why a run's numbers do not compare with the paper's; None if they do.

    Args:
        results: of any scale.
        num_images: behind the paper's scores.
    """
    settings = results.provenance.settings
    if results.scale == STAND_IN:
        return "a stand-in's numbers mean nothing"
    if settings.get("num_images") != num_images:
        return f"the paper's numbers are of {num_images:,} images"
    if settings.get("published Inception weights") is not True:
        return "the scores are not by the published Inception weights"
    if results.scale != "paper":
        return f"the numbers are of scale {results.scale}"
    return None


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a result file's contents, all but the digest itself, as canonical JSON.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    rest = {key: part for key, part in value.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path | str, results: Results) -> None:
    """Write a result file with the digest of its contents; it appears whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    value = results.model_dump(mode="json")
    write_json(path, {**value, "sha256": digest_of(value)})


def read(path: Path | str) -> Results:
    """Read a result file.

    Raises:
        ValueError: it is not there, a folder, truncated, of another schema, changed after it was written, has a row
            twice, or metrics that are NaN, infinite, unknown or impossible.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        sha256 = value.pop("sha256", None) if isinstance(value, dict) else None
        results = Results.model_validate(value)
        found = digest_of(value)
    except FileNotFoundError as error:
        raise ValueError(f"There is no result file {path}.") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder; name a result file (results.json) in it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON (cut off?): {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise ValueError(f"{path} is no {SCHEMA} file: {where}: {first['msg']}.") from error
    except ValueError as error:
        raise ValueError(f"{path} holds a number that is NaN or infinite.") from error
    if sha256 is None:
        raise ValueError(f"{path} has no digest of its contents (field sha256): it is not as it was written.")
    if sha256 != found:
        raise ValueError(f"{path} was changed after it was written: its contents have digest {found}, not {sha256}.")
    ids = [row.id for row in results.rows]
    if twice := sorted({id_ for id_ in ids if ids.count(id_) > 1}):
        raise ValueError(f"{path} has rows twice: {', '.join(twice)}.")
    for row in results.rows:
        for name, value in row.metrics.items():
            try:
                m = metric(name)
            except KeyError as error:
                raise ValueError(f"{path} has an unknown metric {name!r}.") from error
            if not m.low - m.absolute <= value <= m.high:
                raise ValueError(f"{path}: {row.id} has {name} {value:g}, which no measurement can give.")
    return results


TITLES = {
    "table1a": "Table 1a. Reconstruction by quantisation levels",
    "table1b": "Table 1b. Reconstruction by range, 64 levels",
    "table2a": "Table 2a. Prediction of a position's channels",
    "table2b": "Table 2b. Order of the channels",
    "table2c": "Table 2c. Quantisation levels of the generator",
    "table3": "Table 3. Systems",
    "table5": "Table 5. Time to predict one position, batch 1",
    "discrepancies": "Paper against code, and the code against itself",
    "evaluation": "Evaluation",
}


def tables(results: Results) -> dict[str, list[Row]]:
    """Group rows by table, in the order they were measured."""
    grouped: dict[str, list[Row]] = {}
    for row in results.rows:
        grouped.setdefault(row.table, []).append(row)
    return grouped


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Return the metrics of a table's rows, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))


def cell(row: Row, name: str) -> str:
    """Format one metric of a row; a dash where it has none."""
    return f"{row.metrics[name]:,.{metric(name).decimals}f}" if name in row.metrics else "–"


TREND_COLUMNS = ("claim", "measured", "asked", "")


def trend_cells(trend: Trend) -> list[str]:
    """Format a trend for a table with `TREND_COLUMNS`."""
    asked = f"{trend.relation} {trend.bound:.3g}"
    return [trend.claim, f"{trend.measured:.3g}", asked, "holds" if trend.holds else "does not hold"]


def verdicts(results: Results, reference: Results | None) -> dict[str, tuple[Verdict, str]]:
    """Return (verdict, reason) of every row by its id."""
    if reference is None:
        without: tuple[Verdict, str] = ("not compared", "there is no stored result to compare with")
        return {row.id: ("not run", row.not_run) if row.not_run else without for row in results.rows}
    by_id = {row.id: row for row in reference.rows}
    judged = {row.id: compare(row, by_id.get(row.id)) for row in results.rows}
    for id_, row in by_id.items():
        if id_ not in judged and row.not_run is None:
            judged[id_] = ("not reproduced", "only the reference has this row")
    return judged


def to_markdown(results: Results, reference: Results | None) -> str:
    """Return all tables, the trends, the tolerances and the provenance as one Markdown page."""
    judged = verdicts(results, reference)
    p = results.provenance
    lines = [f"# Results at scale {results.scale}", ""]
    lines += [
        f"Measured by `{p.command}` (seed {p.seed}) in {p.wall_seconds:.0f} s, {p.started}, commit "
        f"{p.commit or 'unknown'}{' with uncommitted changes' if p.dirty else ''}.",
        "",
    ]
    for table, rows in tables(results).items():
        columns = columns_of(rows)
        lines += [f"## {TITLES.get(table, table)}", ""]
        header = ["", *columns, "verdict"]
        body = [[r.label, *[cell(r, c) for c in columns], judged[r.id][0]] for r in rows]
        lines += [*markdown_table(header, body), ""]
        said = ("not reproduced", "not run")
        lines += [f"- {r.label}: {judged[r.id][0]}: {judged[r.id][1]}" for r in rows if judged[r.id][0] in said]
        lines += [""]
    absent = judged.keys() - {row.id for row in results.rows}
    lines += [f"- {id_}: {': '.join(judged[id_])}" for id_ in sorted(absent)] + [""] * bool(absent)
    if results.trends:
        lines += ["## The paper's argument at this scale", ""]
        lines += [*markdown_table(TREND_COLUMNS, [trend_cells(t) for t in results.trends]), ""]
    lines += ["## Tolerances", ""]
    used = columns_of(results.rows)
    body = [[name, tolerance_of(metric(name)), metric(name).reason] for name in used]
    lines += markdown_table(["metric", "tolerance", "reason"], body)
    return "\n".join(lines)


def tolerance_of(m: Metric) -> str:
    """Format a tolerance for a table."""
    if math.isinf(m.relative):
        return "none"
    parts = [f"{m.relative:.0%}"] * (m.relative > 0) + [f"{m.absolute:g}"] * (m.absolute > 0)
    return " + ".join(parts) or "exact"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first column is left-aligned, the others right-aligned."""
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in [header, alignment, *body]]
