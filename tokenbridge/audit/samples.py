"""Scoring of the user's images, as the row that a claim is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenbridge.data.image_sets import open_images
from tokenbridge.evaluation.inception import load_inception
from tokenbridge.evaluation.metrics import SEED
from tokenbridge.reproduction import table3
from tokenbridge.results.ledger import Claim
from tokenbridge.results.schema import Provenance, Results, Row
from tokenbridge.results.score import Score, to_metrics
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.weights import artifacts
from tokenbridge.weights.artifacts import INCEPTION, REFERENCE_BATCH, STATISTICS


def score_samples(
    samples: Path | str,
    claim: Claim,
    *,
    siblings: Sequence[Claim] = (),
    cache: Path | str,
    folder: Path | str | None = None,
    given: Mapping[str, Path | str | None] | None = None,
    other_inception: Path | str | None = None,
    num_bootstrap: int = 100,
    batch_size: int = 64,
) -> Results:
    """Score the user's images, and return the scores as the row that a claim is about.

    The other arguments are those of `audit.audit_samples`.

    Args:
        claim: the claim; the reference statistics or images that it needs must be present.
        siblings: the other claims about the row; the references that they need are used if they are present.
        cache: the folder for features.

    Raises:
        MissingArtifactsError: published files are missing.
        UserError: samples do not decide the claim, or images or files cannot be used.
    """
    stopwatch = provenance.Stopwatch()
    wanted = {key for other in (claim, *siblings) for key in other.needs}
    known = [key for key in (STATISTICS, REFERENCE_BATCH) if key in wanted]
    decided = [Score(name, 0, num_images=table3.NUM_IMAGES).name for name in table3.SCORES]
    if claim.scale != "paper" or claim.row is None or claim.metric not in decided or not known:
        raise UserError(f"{claim.id} is not a claim that samples decide: those are about {', '.join(decided)}.")
    there = {s.artifact.key for s in artifacts.status(known, folder=folder, given=given) if s.state != "missing"}
    keys = [key for key in known if key in claim.needs or key in there]
    inception_keys = [INCEPTION] if other_inception is None else []
    images = open_images(samples)
    if images.size != (table3.IMAGE_SIZE, table3.IMAGE_SIZE):
        raise UserError(
            f"The images in {samples} have {' x '.join(map(str, images.size))} pixels, those of the claim "
            f"{table3.IMAGE_SIZE} x {table3.IMAGE_SIZE}. Resizing changes scores; do it yourself before the audit."
        )
    files = artifacts.resolve([*inception_keys, *keys], folder=folder, given=given)
    inception = load_inception(other_inception or files[INCEPTION], allow_other=other_inception is not None)
    scored = table3.score(
        samples,
        [files[key] for key in keys],
        inception=inception,
        num_images=len(images),
        num_bootstrap=num_bootstrap,
        batch_size=batch_size,
        cache=cache,
    )
    scores = [Score("images", len(images)), *scored.scores]
    return Results(
        scale="paper" if inception.published and len(images) == table3.NUM_IMAGES else "evaluation",
        provenance=Provenance(
            **stopwatch.record(),
            seed=SEED,
            data_sha256=scored.data_sha256,
            weights_sha256={INCEPTION: inception.sha256},
            settings={
                "num_images": len(images),
                "published Inception weights": inception.published,
                "samples": f"{samples}, made elsewhere: judged as images, not how they were made",
                "not run": scored.not_run,
            },
        ),
        rows=[Row(id=claim.row, label=f"samples in {Path(samples).name}", metrics=to_metrics(scores))],
        trends=[],
    )
