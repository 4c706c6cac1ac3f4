"""The vocabulary of verdicts, and the comparison of a measured value with its expected value."""

from __future__ import annotations

import math
from typing import Literal, get_args

from tokenbridge.results.tolerances import Tolerance, metric

Verdict = Literal[
    "reproduced", "not reproduced", "within doubt", "not run", "not applicable at this scale", "not compared"
]
"""`within doubt`: only a part of the value's interval lies within the tolerance, or the file does not prove what was
measured. `not applicable at this scale`: this project can run nothing that decides it. `not compared`: the value was
measured, but has nothing that it may be compared with."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
CLAIM_VERDICTS: tuple[Verdict, ...] = tuple(verdict for verdict in VERDICTS if verdict != "not compared")
"""The verdicts that a claim can have. `not compared` is not one, because a claim has something to compare with."""

RANK: dict[Verdict, int] = {
    "reproduced": 0,
    "within doubt": 1,
    "not run": 2,
    "not applicable at this scale": 2,
    "not compared": 2,
    "not reproduced": 3,
}
"""Higher is worse. A claim that is no longer run has lost its evidence; a claim that is contradicted ranks worse."""

CheckVerdict = Literal["pass", "fail", "not run", "skipped"]
"""The verdicts of a check, which golden cases and the regression gate use. A check passes if the value is reproduced,
fails if it is not, and is skipped if nothing was to be compared."""


def is_worse(verdict: Verdict, stored: Verdict) -> bool:
    """Return whether a verdict is worse than the stored one."""
    return RANK[verdict] > RANK[stored]


def judge(
    expected: float, measured: float, tolerance: Tolerance | None, interval: tuple[float, float] | None = None
) -> Verdict:
    """Judge a measured value or its interval by the tolerance around the expected value; None asks for equality."""
    if not math.isfinite(measured):
        return "not reproduced"
    low, high = (measured, measured) if interval is None else (min(*interval, measured), max(*interval, measured))
    # 1.33 - 1.11 differs from 0.22 in the last bit of float arithmetic, which must not count as a difference.
    granted = (tolerance.of(expected) if tolerance is not None else 0.0) + 1e-12 * abs(expected)
    distances = abs(low - expected), abs(high - expected)
    if max(distances) <= granted:
        return "reproduced"
    nearest = 0.0 if low <= expected <= high else min(distances)
    return "not reproduced" if nearest > granted else "within doubt"


def within(name: str, measured: float, expected: float) -> bool:
    """Return whether a value is within the tolerance of its metric; a time only has to be positive."""
    m = metric(name)
    return judge(expected, measured, m.tolerance) == "reproduced" if m.is_compared else measured > 0
