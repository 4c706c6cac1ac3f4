"""Progress on stderr."""

from __future__ import annotations

from datetime import timedelta


def _duration(seconds: float) -> str:
    """Return seconds as "1:02:03"; "?" for NaN."""
    return "?" if seconds != seconds else str(timedelta(seconds=round(seconds)))
