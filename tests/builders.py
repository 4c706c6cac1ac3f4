"""Result files for tests: everything that a record must have, with what a test is about changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tokenbridge.models.registry import find_preset
from tokenbridge.results.schema import Provenance, Results, Row, Trend
from tokenbridge.weights.artifacts import ARTIFACTS, LOCK_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

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


RECORDED = {"generator": "1" * 64, "tokenizer": "2" * 64, "adm-statistics": "5" * 64, "adm-reference": "6" * 64}
"""SHA-256 of published files, as `record_published` pretends that they were recorded here."""


def paper_run(name: str = "tokenbridge-l", **scores: float) -> Results:
    """Return what a run of a published preset at the paper's scale writes, with the recorded files.

    Args:
        scores: metrics by name, with "_" for "-".
    """
    system, preset = find_preset(name)
    weights = {"generator": RECORDED["generator"], system.recipe: RECORDED["tokenizer"]}
    metrics = {
        "images": 50_000.0,
        **{metric.replace("_", "-"): value for metric, value in scores.items()},
        "parameters": float(preset.num_parameters),
        "seconds per image": 0.5,
    }
    return make_results(
        [Row(id=f"table3/{name}", label=name, metrics=metrics)],
        started="2025-01-01T00:00:00+00:00",
        wall_seconds=30_000.0,
        commit="0" * 40,
        dirty=False,
        data_sha256={
            "runs/samples": "4" * 64,
            "fid_stats/adm_in256_stats.npz": RECORDED["adm-statistics"],
            "VIRTUAL_imagenet256_labeled.npz": RECORDED["adm-reference"],
        },
        weights_sha256={**weights, "inception": str(ARTIFACTS["inception"].sha256)},
        settings=paper_settings(
            sampler={
                "system": system.name,
                "num_parameters": preset.num_parameters,
                "sampling": asdict(preset.sampling_config()),
                "dtype": "fp32",
                "compiled": False,
                "weights": weights,
            },
            randomness="per-image",
            labels=system.evaluation.labels or "balanced",
            run={
                "samples": "runs/samples",
                "num_images": 50_000,
                "num_made": 50_000,
                "seconds": 25_000.0,
                "images_per_second": 2.0,
                "peak_memory_gib": 1.0,
            },
        ),
    )


def record_published(folder: Path, *names: str) -> Path:
    """Write the lock file in a folder as if all published files of these presets had been used there."""
    entries = {key: RECORDED[key] for key in ("adm-statistics", "adm-reference")}
    for name in names:
        entries |= {name: RECORDED["generator"], find_preset(name)[0].tokenizer.key: RECORDED["tokenizer"]}
    lock = {key: {"path": "x", "size": 1, "mtime_ns": 1, "sha256": sha256} for key, sha256 in entries.items()}
    path = folder / LOCK_FILE
    path.write_text(json.dumps(lock))
    return path
