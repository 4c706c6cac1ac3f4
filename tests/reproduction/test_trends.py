"""Trends: decided by what the rows say, not by the order in which they say it."""

from __future__ import annotations

import pytest
from conftest import ROOT

from tokenbridge.reproduction.trends import trends
from tokenbridge.results.schema import Row, read

STORED = read(ROOT / "reference_results" / "tiny" / "results.json")


def reordered(row: Row) -> Row:
    """Return a row whose metrics stand the other way round: clean-fid's distance is before torch-fidelity's."""
    return row.model_copy(update={"metrics": dict(reversed(row.metrics.items()))})


def test_trends_do_not_depend_on_the_order_of_metrics() -> None:
    assert trends([reordered(row) for row in STORED.rows]) == trends(STORED.rows) == STORED.trends


def test_a_cross_check_does_not_stand_in_for_the_score() -> None:
    """A row with clean-fid's distance alone has no FID to decide by."""
    rows = [
        row.model_copy(update={"metrics": {n: v for n, v in row.metrics.items() if n != "FID-digits"}})
        for row in STORED.rows
    ]
    with pytest.raises(KeyError, match="FID"):
        trends(rows)
