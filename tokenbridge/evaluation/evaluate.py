"""Samples against reference statistics: FID, Inception Score, precision, recall and KID by Inception.

Features are those of torch-fidelity's Inception, a port of the TensorFlow network that published numbers use; the
scores are torch-fidelity's functions of them (`metrics`), so that they are what its own command prints. FID is
computed again by clean-fid's formula from the same features and, where clean-fid's weights are given, from clean-fid's
own features.

The reference is an .npz with `mu` and `sigma` (as LTH14/mar and TokenBridge ship), ADM's reference batch, which has
10,000 images in `arr_0` as well (guided-diffusion, evaluations/README.md), or a folder of images. ADM's evaluator
measures distances for precision and recall in half precision; torch-fidelity does here in float64.

Shape letters: N samples, M reference images, F features, K classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch import Tensor

from tokenbridge.data.image_sets import open_images
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.bootstrap import SEED, fid_interval
from tokenbridge.evaluation.features import (
    CACHE,
    CLEANFID_FILE,
    CLEANFID_URL,
    NUM_FEATURES,
    OTHER,
    ImageSet,
    Inception,
    _device,
    _forward,
    inception_features,
    load_cleanfid_inception,
    load_inception,
)
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.evaluation.reference import Reference, load_reference
from tokenbridge.results.schema import Provenance, Results, Row
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


FEW = NUM_FEATURES  # with fewer images than features the covariance has no full rank: FID then says little


def evaluate(
    samples: Sequence[Path | str],
    reference: Path | str,
    *,
    inception: Path | str,
    cleanfid_inception: Path | str | None = None,
    allow_other_inception: bool = False,
    allow_few: bool = False,
    num_bootstrap: int = 100,
    seed: int = SEED,
    batch_size: int = 64,
    cache: Path | str = CACHE,
) -> Results:
    """Score one or more sets of samples against a reference.

    Runs on the GPU if there is one. Several sets are seeds of one system: each has its row, then follow mean and
    standard deviation (over n - 1). What cannot be computed is a row with the reason. With few images the settings
    shrink to what is there: Inception Score splits to N, KID subsets and neighbours to the smaller set.

    Args:
        samples: folders of images, or .npz files with uint8 `arr_0` [N, H, W, 3]; all of one N, H and W.
        reference: a folder of images, or .npz with `mu` [F] and `sigma` [F, F], with `arr_0` [M, H, W, 3], or both.
        inception: torch-fidelity's file of weights (`inception.find_inception` finds it).
        cleanfid_inception: clean-fid's file inception-2015-12-05.pt, for FID by its own features.
        allow_other_inception: take other weights than the published ones and label all scores with it.
        allow_few: take fewer than 2,048 images and label all scores with their number.
        num_bootstrap: resamples behind the interval of FID; 0 leaves it out.
        seed: of Inception Score's shuffle, KID's subsets and the bootstrap.
        batch_size: images per forward pass.
        cache: folder for features, under the hash of images and weights.

    Raises:
        ValueError: images, statistics or weights that cannot be used, or that are not what was asked for.
    """
    stopwatch = provenance.Stopwatch()
    if num_bootstrap < 0 or num_bootstrap == 1 or batch_size < 1:
        raise UserError("The batch size is at least 1, the bootstrap takes at least 2 resamples (or 0: none).")
    extract = load_inception(inception, allow_other=allow_other_inception)  # first: bad files must not cost hours
    extract_cleanfid = None
    if cleanfid_inception is not None:
        extract_cleanfid = load_cleanfid_inception(cleanfid_inception, allow_other=allow_other_inception)
    sets = open_samples(samples, allow_few=allow_few)
    target = load_reference(reference, extract, batch_size=batch_size, cache=cache)
    _check_reference(target, sets[0], allow_few)

    def labelled(scores: dict[str, float], published: bool) -> dict[str, float]:
        suffix = "" if published else f"-{OTHER}"
        count = f" ({len(sets[0]):,} images)" if len(sets[0]) < FEW else ""
        return {f"{name}{suffix}{count}": value for name, value in scores.items()}

    rows: list[Row] = []
    scores_of_sets: list[dict[str, float]] = []
    not_run: dict[str, str] = {}
    for i, images in enumerate(sets, start=1):
        features, logits = inception_features(images, extract, batch_size=batch_size, cache=cache)
        intervals = fid_interval(features, target.statistics, num_bootstrap, seed) if num_bootstrap else {}
        scores = score_features(features, logits, target, seed) | intervals
        values = labelled(scores, extract.published)
        if extract_cleanfid is not None:
            whole, reasons = cleanfid_scores(images, target, extract_cleanfid, batch_size)
            values |= labelled(whole, extract_cleanfid.published)
            not_run |= reasons
        scores_of_sets.append(values)
        rows.append(Row(id=f"evaluation/{i}", label=images.name, metrics={"images": len(images), **values}))
    if len(sets) > 1:
        rows += _rows_over_sets(scores_of_sets)
    not_run |= _missing(target, cleanfid_inception)
    rows += [Row(id=f"evaluation/{name}", label=name, metrics={}, not_run=why) for name, why in not_run.items()]

    weights = {"inception": extract.sha256}
    if extract_cleanfid is not None:
        weights["clean-fid's inception"] = extract_cleanfid.sha256
    return Results(
        scale="evaluation",
        provenance=Provenance(
            **stopwatch.record(),
            seed=seed,
            data_sha256={images.name: images.sha256 for images in sets} | {target.name: target.sha256},
            weights_sha256=weights,
            settings={
                "samples": {"sets": len(sets), "images": len(sets[0]), "size": list(sets[0].size)},
                "reference": {
                    "statistics": "computed here" if target.from_images else "read",
                    "images behind the statistics": target.num_images,
                    "images": 0 if target.images is None else len(target.images),
                },
                "published weights": extract.published,
                "bootstrap": num_bootstrap,
                "notes": _notes(sets, target, num_bootstrap),
            },
        ),
        rows=rows,
        trends=[],
    )


def open_samples(samples: Sequence[Path | str], *, allow_few: bool = False) -> list[ImageSet]:
    """Open sets of samples, without reading pixels.

    Raises:
        ValueError: sets of different numbers or sizes, or twice the same; fewer than 2,048 images unless allowed.
    """
    if not samples:
        raise UserError("There are no samples to evaluate.")
    sets = [open_images(path) for path in samples]
    first = sets[0]
    for other in sets[1:]:
        if (len(other), other.size) != (len(first), first.size):
            raise UserError(
                f"Sets of samples are compared only if they are alike: {first.name} has {len(first)} images of "
                f"{list(first.size)} pixels, {other.name} {len(other)} of {list(other.size)}."
            )
    if len({images.sha256 for images in sets}) < len(sets):
        raise UserError("Two of the sets of samples hold the same images: they are no two seeds.")
    if len(first) < 2:
        raise UserError(f"{first.name} holds 1 image; scores need at least 2.")
    if len(first) < FEW and not allow_few:
        raise UserError(_too_few(first.name, len(first)))
    return sets


def score_features(features: Tensor, logits: Tensor, reference: Reference, seed: int = SEED) -> dict[str, float]:
    """Return the scores of one set of samples by name; those that need reference images only if there are any.

    Args:
        features: [N, F].
        logits: [N, K].
        reference: what `load_reference` returns.
        seed: of Inception Score's shuffle and KID's subsets.
    """
    statistics = metrics.statistics_of(features)
    inception_score, inception_score_std = metrics.inception_score(logits, seed)
    scores = {
        "FID": metrics.fidelity_distance(statistics, reference.statistics),
        "FID-cleanfid": metrics.cleanfid_distance(statistics, reference.statistics),
        "IS": inception_score,
        "IS-std": inception_score_std,
    }
    if reference.features is None:
        return scores
    samples, references = features.double(), reference.features.double()
    device = _device()
    precision, recall = metrics.precision_and_recall(samples.to(device), references.to(device))
    kid, kid_std = metrics.kernel_distance(samples, references, seed)
    return scores | {"precision": precision, "recall": recall, "KID": kid, "KID-std": kid_std}


def cleanfid_scores(
    images: ImageSet, reference: Reference, inception: Inception, batch_size: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return FID by clean-fid's own features, in both its modes, and the reasons for what was not run.

    `FID-cleanfid-legacy` (mode legacy_tensorflow) resizes as TensorFlow 1 did, as torch-fidelity does: it should be
    the FID. `FID-cleanfid-clean` resizes with antialiasing; other numbers come out, which only compare with their like.
    """
    legacy = _cleanfid_statistics(images, inception, "legacy_tensorflow", batch_size)
    if not reference.from_images:
        why = f"{reference.name} has statistics of images resized as TensorFlow 1 did; mode clean needs the images"
        scores = {"FID-cleanfid-legacy": metrics.cleanfid_distance(legacy, reference.statistics)}
        return scores, {"FID-cleanfid-clean": why}
    assert reference.images is not None
    legacy_reference = _cleanfid_statistics(reference.images, inception, "legacy_tensorflow", batch_size)
    clean, clean_reference = (
        _cleanfid_statistics(x, inception, "clean", batch_size) for x in (images, reference.images)
    )
    return {
        "FID-cleanfid-legacy": metrics.cleanfid_distance(legacy, legacy_reference),
        "FID-cleanfid-clean": metrics.cleanfid_distance(clean, clean_reference),
    }, {}


def _cleanfid_statistics(images: ImageSet, inception: Inception, mode: str, batch_size: int) -> Statistics:
    """Return statistics of clean-fid's features; its resizer works on arrays [H, W, 3], one at a time."""
    resize = build_resizer(mode)

    def prepare(pixels: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(resize(x.permute(1, 2, 0).numpy())).permute(2, 0, 1) for x in pixels])

    batches = _forward(images, inception.network, batch_size, f"clean-fid, {mode}", prepare)
    return metrics.statistics_of(torch.cat([features for _, (features,) in batches]))


def _check_reference(reference: Reference, samples: ImageSet, allow_few: bool) -> None:
    """Refuse reference images of another size than the samples, and few of them unless they are allowed."""
    if reference.images is not None and reference.images.size != samples.size:
        raise UserError(
            f"The samples are {list(samples.size)} pixels, the images in {reference.name} "
            f"{list(reference.images.size)}: resizing changes FID, so do it knowingly and before."
        )
    if reference.num_images is not None and reference.num_images < FEW and not allow_few:
        raise UserError(_too_few(reference.name, reference.num_images))


def _too_few(name: str, number: int) -> str:
    return (
        f"{name} has {number:,} images. FID compares covariances of {NUM_FEATURES:,} features; of fewer images it "
        f"says little about the system. It can be asked for (--allow-few) and is labelled with the number of images."
    )


def _rows_over_sets(scores: Sequence[dict[str, float]]) -> list[Row]:
    """Return mean and standard deviation over seeds; spreads and bounds within one set have none."""
    within = ("IS-std", "KID-std", "FID-low", "FID-high", "FID-bias")
    names = [name for name in scores[0] if not name.startswith(within)]
    mean = {name: float(np.mean([s[name] for s in scores])) for name in names}
    deviation = {name: float(np.std([s[name] for s in scores], ddof=1)) for name in names}
    return [
        Row(id="evaluation/mean", label=f"mean of {len(scores)}", metrics=mean),
        Row(id="evaluation/std", label="standard deviation", metrics=deviation),
    ]


def _missing(reference: Reference, cleanfid_inception: Path | str | None) -> dict[str, str]:
    """Return the scores that could not be computed, with the reasons."""
    reasons = {}
    if reference.features is None:
        reasons["precision, recall, KID"] = (
            f"{reference.name} has only mu and sigma; these scores compare with images: give a folder, or ADM's "
            "reference batch, whose arr_0 has 10,000"
        )
    if cleanfid_inception is None:
        reasons["FID-cleanfid-legacy, FID-cleanfid-clean"] = (
            f"clean-fid's own features need its weights {CLEANFID_FILE} ({CLEANFID_URL}): name them with "
            "--cleanfid-inception"
        )
    return reasons


def _notes(sets: Sequence[ImageSet], reference: Reference, num_bootstrap: int) -> list[str]:
    """Return what a reader must know to judge the scores."""
    notes = [
        f"FID of a finite set is biased upwards, the more the fewer images: these are of {len(sets[0]):,}, published "
        "values of 50,000. Only FIDs of equal numbers of images compare."
    ]
    if num_bootstrap:
        notes.append(
            f"FID-low to FID-high: 95% of {num_bootstrap} FIDs of images resampled from the set, moved by -FID-bias, "
            "the first-order estimate of the bias (at thousands of images an order of magnitude only). It covers which "
            "images the system happened to draw; not the choice of the reference images, training, other weights or "
            "implementations of Inception, nor the bias, which is still in the FID."
        )
    if len(sets[0]) < FEW:
        notes.append(f"Fewer than {FEW:,} images: these scores serve to test the path, not to judge a system.")
    if reference.num_images is not None and reference.num_images < FEW:
        notes.append(f"The reference has fewer than {FEW:,} images ({reference.num_images:,}).")
    if any(images.lossy for images in sets):
        notes.append("Some samples are compressed with loss (JPEG or WebP), which changes FID.")
    return notes
