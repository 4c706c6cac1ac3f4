"""The words for what a comparison found, and the comparison of one measured value with the one it should be."""

from __future__ import annotations

from typing import Literal, get_args

from tokenbridge.results.tolerances import Tolerance, metric

Verdict = Literal[
    "reproduced", "not reproduced", "within doubt", "not run", "not applicable at this scale", "not compared"
]
"""`within doubt`: the measured value is in or out of the tolerance, but its interval is not wholly. `not applicable at
this scale`: nothing that could be run here decides it. `not compared`: it was measured, but nothing is there that it
may be compared with."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CLAIM_VERDICTS: tuple[Verdict, ...] = tuple(verdict for verdict in VERDICTS if verdict != "not compared")
"""Those that a claim can have: what was claimed is there to compare with."""

RANK: dict[Verdict, int] = {
    "reproduced": 0,
    "within doubt": 1,
    "not run": 2,
    "not applicable at this scale": 2,
    "not compared": 2,
    "not reproduced": 3,
}
"""Higher is worse. A claim that ran and no longer does has lost its evidence; one that is contradicted is worse off."""

CheckVerdict = Literal["pass", "fail", "not run", "skipped"]
"""The words of a check, of golden cases and of the regression gate. It passes where what it looks at is reproduced, and
fails where that is not; it is skipped where nothing was to be compared."""


def is_worse(verdict: Verdict, stored: Verdict) -> bool:
    """Whether a verdict is worse than the stored one."""
    return RANK[verdict] > RANK[stored]


def judge(
    expected: float, measured: float, tolerance: Tolerance | None, interval: tuple[float, float] | None = None
) -> Verdict:
    """Judge a measured value, or its interval, by the tolerance around the expected one; without one, exactly."""
    low, high = (measured, measured) if interval is None else (min(*interval, measured), max(*interval, measured))
    # 1.33 - 1.11 is 0.22 but for the last bit of float arithmetic, which is no difference.
    granted = (tolerance.of(expected) if tolerance is not None else 0.0) + 1e-12 * abs(expected)
    distances = abs(low - expected), abs(high - expected)
    if max(distances) <= granted:
        return "reproduced"
    nearest = 0.0 if low <= expected <= high else min(distances)
    return "not reproduced" if nearest > granted else "within doubt"


def within(name: str, measured: float, expected: float) -> bool:
    """Whether a value lies within the tolerance of its metric; any time does that was measured."""
    m = metric(name)
    return judge(expected, measured, m.tolerance) == "reproduced" if m.is_compared else measured > 0
