"""The comparison of rows with stored or published ones."""

from __future__ import annotations

from typing import Literal

from tokenbridge.results.schema import STAND_IN, Results, Row
from tokenbridge.results.score import NUM_IMAGES as NUM_IMAGES
from tokenbridge.results.tolerances import within

Verdict = Literal["reproduced", "not reproduced", "not run", "not compared"]


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
