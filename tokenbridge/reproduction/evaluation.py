"""The evaluation of a user's images, as a result file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenbridge.evaluation.evaluate import evaluate
from tokenbridge.evaluation.metrics import SEED
from tokenbridge.results.schema import Provenance, Results, Row
from tokenbridge.results.score import to_metrics
from tokenbridge.utils.provenance import Stopwatch


def measure_evaluation(
    samples: Sequence[Path | str], reference: Path | str, *, seed: int = SEED, **options: Any
) -> Results:
    """Return the scores of sets of samples as results.

    The other arguments and the errors are those of `evaluation.evaluate`.

    Each set has a row. If there are several, rows with mean and standard deviation follow. The last rows have no
    numbers and say what was not run, and why.
    """
    stopwatch = Stopwatch()
    evaluated = evaluate(samples, reference, seed=seed, **options)
    rows = [
        Row(id=f"evaluation/{i}", label=one.name, metrics={"images": one.num_images, **one.metrics})
        for i, one in enumerate(evaluated.sets, start=1)
    ]
    if len(rows) > 1:
        rows += [
            Row(id="evaluation/mean", label=f"mean of {len(rows)}", metrics=to_metrics(evaluated.mean)),
            Row(id="evaluation/std", label="standard deviation", metrics=to_metrics(evaluated.deviation)),
        ]
    for metrics, why in evaluated.not_run.items():
        name = ", ".join(metrics)
        rows.append(Row(id=f"evaluation/{name}", label=name, metrics={}, not_run=why))
    return Results(
        scale="evaluation",
        provenance=Provenance(
            **stopwatch.record(),
            seed=seed,
            data_sha256=evaluated.data_sha256,
            weights_sha256=evaluated.weights_sha256,
            settings={**evaluated.settings, "notes": list(evaluated.notes)},
        ),
        rows=rows,
        trends=[],
    )
