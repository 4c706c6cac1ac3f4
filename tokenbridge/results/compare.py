"""The comparison of measured rows with stored or published ones."""

from __future__ import annotations

from collections.abc import Mapping

from tokenbridge.results.schema import STAND_IN, Results, Row
from tokenbridge.results.score import NUM_IMAGES as NUM_IMAGES
from tokenbridge.results.verdicts import Verdict, within

Judged = dict[str, tuple[Verdict, str]]
"""(verdict, reason) by the row's id."""


def compare(row: Row, reference: Row | None) -> tuple[Verdict, str]:
    """Return the verdict on a row, and the reason for it."""
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
    """Return why the numbers of a run cannot be compared with those of the paper; None if they can.

    Args:
        num_images: the number of images behind the paper's scores.
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


def judge_published(results: Results, published: Mapping[str, Row], num_images: int = NUM_IMAGES) -> Judged:
    """Compare each row with the paper's row of the same id, if the numbers of the run can be compared at all."""
    if (reason := incomparable(results, num_images)) is not None:
        return {row.id: ("not compared", reason) for row in results.rows}
    return {row.id: compare_published(row, published[row.id]) for row in results.rows}


def compare_published(row: Row, published: Row) -> tuple[Verdict, str]:
    """Compare the columns of the paper's row. A column that was not measured does not fail the row."""
    if not published.metrics:
        return "not compared", f"nothing was published for {published.label}"
    measured = {name: value for name, value in row.metrics.items() if name in published.metrics}
    there = published.model_copy(update={"metrics": {n: v for n, v in published.metrics.items() if n in measured}})
    verdict, why = compare(row.model_copy(update={"metrics": measured}), there)
    absent = sorted(published.metrics.keys() - measured.keys())
    if absent and verdict == "reproduced":
        return "not compared", f"{why} of those measured, but not all were: {', '.join(absent)}"
    return verdict, why


SAMPLED = ("table2", "table3")  # tables of samples; the others depend neither on their number nor on their seed


def other_samples(results: Results, reference: Results) -> str | None:
    """Return why samples of two runs at a small scale cannot be compared; None if they can."""
    ours, theirs = results.provenance, reference.provenance
    numbers = [p.settings.get("num_images") for p in (ours, theirs)]
    if numbers[0] != numbers[1]:
        return f"it is of {numbers[0]} images, and the stored result of {numbers[1]}"
    if ours.seed != theirs.seed:
        return f"it is of seed {ours.seed}, and the stored result of seed {theirs.seed}"
    return None


def verdicts(results: Results, reference: Results | None) -> Judged:
    """Return the verdict on every row and its reason, by the row's id."""
    if reference is None:
        without: tuple[Verdict, str] = ("not compared", "there is no stored result to compare with")
        return {row.id: ("not run", row.not_run) if row.not_run else without for row in results.rows}
    by_id = {row.id: row for row in reference.rows}
    judged = {row.id: compare(row, by_id.get(row.id)) for row in results.rows}
    if (reason := other_samples(results, reference)) is not None:
        for row in results.rows:
            if row.not_run is None and row.table.startswith(SAMPLED):
                judged[row.id] = ("not compared", reason)
    for id_, row in by_id.items():
        if id_ not in judged and row.not_run is None:
            judged[id_] = ("not reproduced", "only the reference has this row")
    return judged
