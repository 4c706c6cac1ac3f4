"""Result files for tests: everything that a record must have, with what a test is about changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenbridge.results.schema import Provenance, Results, Row, Trend

if TYPE_CHECKING:
    from collections.abc import Sequence

RECORD: dict[str, Any] = {
    "command": "tokenbridge reproduce tiny",
    "started": "2026-01-01T00:00:00+00:00",
    "wall_seconds": 1.0,
    "commit": None,
    "dirty": None,
    "versions": {},
    "hardware": {},
}
"""As `Stopwatch.record` gives it."""


def make_results(
    rows: Sequence[Row] = (), trends: Sequence[Trend] = (), *, scale: str = "paper", **provenance: Any
) -> Results:
    """Return results; `provenance` changes its fields."""
    fields = {**RECORD, "seed": 0, "data_sha256": {}, "weights_sha256": {}, "settings": {}, **provenance}
    return Results(scale=scale, provenance=Provenance(**fields), rows=list(rows), trends=list(trends))


def paper_settings(**changes: Any) -> dict[str, Any]:
    """Return the settings of a run whose numbers compare with the paper's."""
    return {"num_images": 50_000, "published Inception weights": True, **changes}
