"""Evaluate 50,000 images against 10,000: does it end, and in how much memory? `python -m benchmarks.evaluation_load`.

The images are noise and a random projection stands in for Inception, with as many features and logits, because only
the work after the features is measured: FID with its interval, Inception Score, precision, recall, KID.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from tokenbridge.evaluation.evaluate import evaluate
from tokenbridge.evaluation.inception import NUM_FEATURES, NUM_LOGITS, Inception
from tokenbridge.results.score import OTHER_INCEPTION
from tokenbridge.utils.files import reference_folder, write_json
from tokenbridge.utils.provenance import Stopwatch

SIZE = 16  # pixels: the work after the features does not depend on it
LIMIT = 2 * 2**30  # bytes over the features that an evaluation may take


def main(
    samples: Annotated[int, typer.Option(help="Number of generated images.")] = 50_000,
    reference: Annotated[int, typer.Option(help="Number of reference images.")] = 10_000,
    out: Annotated[Path | None, typer.Option(help="Where the result is written.")] = None,
) -> None:
    """Measure time and peak memory, write them, and fail if the memory is over the limit."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3 * SIZE * SIZE, NUM_FEATURES + NUM_LOGITS, generator=generator) / 100

    def network(pixels: Tensor) -> tuple[Tensor, Tensor]:
        outputs = pixels.flatten(1).float().div(255) @ weights
        features, logits = outputs.split([NUM_FEATURES, NUM_LOGITS], dim=1)
        return features.relu().contiguous(), logits.contiguous()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        for file, number in (("samples", samples), ("reference", reference)):
            np.savez(folder / file, arr_0=random.integers(0, 256, (number, SIZE, SIZE, 3), dtype=np.uint8))
        before, watch = _peak(), Stopwatch()
        done = evaluate(
            [folder / "samples.npz"],
            folder / "reference.npz",
            inception=Inception(network, sha256="0" * 64, published=False),
            batch_size=256,
            cache=folder / "features",
        )
    features = (samples * (NUM_FEATURES + NUM_LOGITS) + reference * NUM_FEATURES) * 4
    over = _peak() - before - features
    provenance = watch.record()
    record = {
        "images": [samples, reference],
        "bytes of the features": features,
        "peak bytes over the features": over,
        "limit": LIMIT,
        "share of other processes": watch.share_of_other_processes(),
        "extractor": OTHER_INCEPTION,
        "scores": [score.name for score in done.mean],
        "provenance": provenance,
    }
    write_json(out or reference_folder() / "benchmarks" / "evaluation-load.json", record)
    seconds = provenance["wall_seconds"]
    print(f"{samples:,} images against {reference:,}: {seconds:.0f} s, {over / 2**30:.2f} GiB over the features.")
    sys.exit(over > LIMIT)


def _peak() -> int:
    """Return the most bytes of memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    typer.run(main)
