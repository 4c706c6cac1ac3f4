"""The scores of samples against a reference: FID, Inception Score, precision, recall and KID by Inception.

The features come from torch-fidelity's Inception, a port of the TensorFlow network that published numbers use. The
scores are torch-fidelity's functions of them (`metrics`), so they equal what its own command prints. FID is computed
again by clean-fid's formula from the same features and, where clean-fid's weights are given, from clean-fid's own
features.

The reference is an .npz with `mu` and `sigma` (LTH14/mar and TokenBridge ship one), ADM's reference batch, which also
has 10,000 images in `arr_0` (guided-diffusion, evaluations/README.md), or a folder of images. ADM's evaluator measures
the distances for precision and recall in half precision, whereas this module measures them in float64.

Shape letters: N samples, M reference images, F features, K classes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch import Tensor

from tokenbridge.data.image_sets import ImageSet, open_images
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.bootstrap import with_interval
from tokenbridge.evaluation.features import CACHE, forward, inception_features
from tokenbridge.evaluation.inception import CLEANFID_FILE, CLEANFID_URL, NUM_FEATURES, Inception, loaded
from tokenbridge.evaluation.metrics import SEED, Statistics
from tokenbridge.evaluation.reference import Reference, load_reference
from tokenbridge.results.score import Score, to_metrics
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


FEW = NUM_FEATURES  # with fewer images than features, the covariance lacks full rank and FID says little
CLEANFID_MODES = ("FID-cleanfid-legacy", "FID-cleanfid-clean")


@dataclass(frozen=True)
class ScoredSet:
    """The scores of one set of samples."""

    name: str
    num_images: int
    scores: tuple[Score, ...]  # from the features of torch-fidelity's Inception
    cleanfid: tuple[Score, ...] = ()  # from clean-fid's own features

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by name, as a row of results holds them."""
        return to_metrics(self.scores) | to_metrics(self.cleanfid)


@dataclass(frozen=True)
class Evaluation:
    """Sets of samples, scored against one reference."""

    sets: tuple[ScoredSet, ...]  # more than one where one system sampled with several seeds
    not_run: dict[tuple[str, ...], str]  # the metrics that were not computed, with the reasons
    notes: tuple[str, ...]  # what a reader must know to judge the scores
    data_sha256: dict[str, str]  # the hashes of the samples and the reference, by name
    weights_sha256: dict[str, str]
    settings: dict[str, Any]

    @property
    def mean(self) -> tuple[Score, ...]:
        """The mean of each score over the sets."""
        return self._over_sets(lambda values: float(np.mean(values)))

    @property
    def deviation(self) -> tuple[Score, ...]:
        """The standard deviation of each score over the n sets, with the divisor n - 1."""
        return self._over_sets(lambda values: float(np.std(values, ddof=1)))

    def _over_sets(self, summary: Callable[[list[float]], float]) -> tuple[Score, ...]:
        """Summarise each score; spreads and bounds within one set have no summary."""
        found = [{score.name: score for score in (*one.scores, *one.cleanfid)} for one in self.sets]
        names = [name for name in found[0] if all(name in scores for scores in found)]  # a cross-check may have failed
        return tuple(
            replace(found[0][name].bare, value=summary([scores[name].value for scores in found])) for name in names
        )


def evaluate(
    samples: Sequence[Path | str],
    reference: Path | str,
    *,
    inception: Inception | Callable[[], Inception],
    cleanfid_inception: Inception | None = None,
    allow_few: bool = False,
    num_bootstrap: int = 100,
    seed: int = SEED,
    batch_size: int = 64,
    cache: Path | str = CACHE,
) -> Evaluation:
    """Score one or more sets of samples against a reference, on the GPU if there is one.

    With few images some settings are reduced, as `metrics.scores_of` describes.

    Args:
        samples: folders of images, or .npz files with uint8 `arr_0` [N, H, W, 3]; N, H and W are equal in all sets.
        reference: a folder of images, or an .npz with `mu` [F] and `sigma` [F, F], with `arr_0` [M, H, W, 3], or both.
        inception: torch-fidelity's Inception, or a function that loads it, which is called once samples and reference
            are open. Scores are labelled if its weights are not the published ones.
        cleanfid_inception: clean-fid's Inception, for FID by its own features.
        allow_few: whether fewer than 2,048 images are accepted, and all scores labelled with their number.
        num_bootstrap: the number of resamples behind the interval of FID; 0 leaves the interval out.
        seed: the seed of Inception Score's shuffle, KID's subsets and the bootstrap.
        batch_size: images per forward pass.
        cache: the folder of cached features, which are found by the hashes of images and weights.

    Raises:
        UserError: the images or statistics cannot be read or do not fit together, or a number is out of range.
    """
    if num_bootstrap < 0 or num_bootstrap == 1 or batch_size < 1:
        raise UserError("The batch size must be at least 1, and the bootstrap needs at least 2 resamples (or 0: none).")
    sets = open_samples(samples, allow_few=allow_few)
    load = functools.cache(functools.partial(loaded, inception))
    target = load_reference(reference, load, batch_size=batch_size, cache=cache)
    inception = load()
    _check_reference(target, sets[0], allow_few)
    num_images = len(sets[0]) if len(sets[0]) < FEW else None  # the scores of few images are labelled

    scored: list[ScoredSet] = []
    not_run: dict[tuple[str, ...], str] = {}
    for images in sets:
        features, logits = inception_features(images, inception, batch_size=batch_size, cache=cache)
        scores, reasons = metrics.scores_of(
            features,
            logits,
            target.statistics,
            target.features,
            seed=seed,
            extractor=inception.extractor,
            num_images=num_images,
        )
        not_run |= reasons
        if num_bootstrap:
            scores = [
                with_interval(s, features, target.statistics, num_bootstrap, seed) if s.metric == "FID" else s
                for s in scores
            ]
        cleanfid: list[Score] = []
        if cleanfid_inception is not None:
            found, reasons = cleanfid_scores(images, target, cleanfid_inception, batch_size)
            cleanfid = [replace(score, num_images=num_images) for score in found]
            not_run |= reasons
        scored.append(ScoredSet(images.name, len(images), tuple(scores), tuple(cleanfid)))
    weights = {"inception": inception.sha256}
    if cleanfid_inception is not None:
        weights["clean-fid's inception"] = cleanfid_inception.sha256
    return Evaluation(
        sets=tuple(scored),
        not_run=not_run | _missing(target, cleanfid_inception),
        notes=tuple(_notes(sets, target, num_bootstrap)),
        data_sha256={images.name: images.sha256 for images in sets} | {target.name: target.sha256},
        weights_sha256=weights,
        settings={
            "samples": {"sets": len(sets), "images": len(sets[0]), "size": list(sets[0].size)},
            "reference": {
                "statistics": "computed here" if target.from_images else "read",
                "images behind the statistics": target.num_images,
                "images": 0 if target.images is None else len(target.images),
            },
            "published weights": inception.published,
            "bootstrap": num_bootstrap,
        },
    )


def open_samples(samples: Sequence[Path | str], *, allow_few: bool = False) -> list[ImageSet]:
    """Open sets of samples without reading their pixels.

    Raises:
        UserError: the sets differ in number or size of images, two are the same, or one has fewer than 2,048 images
            and this is not allowed.
    """
    if not samples:
        raise UserError("There are no samples to evaluate.")
    sets = [open_images(path) for path in samples]
    first = sets[0]
    for other in sets[1:]:
        if (len(other), other.size) != (len(first), first.size):
            raise UserError(
                f"All sets of samples need the same number and size of images, but {first.name} has {len(first)} "
                f"images of {list(first.size)} pixels, and {other.name} has {len(other)} of {list(other.size)}."
            )
    if len({images.sha256 for images in sets}) < len(sets):
        raise UserError("Two of the sets of samples hold the same images, so they do not come from two seeds.")
    if len(first) < 2:
        raise UserError(f"{first.name} holds 1 image, but scores need at least 2.")
    if len(first) < FEW and not allow_few:
        raise UserError(_too_few(first.name, len(first)))
    return sets


def cleanfid_scores(
    images: ImageSet, reference: Reference, inception: Inception, batch_size: int
) -> tuple[list[Score], dict[tuple[str, ...], str]]:
    """Return FID by clean-fid's own features in both its modes, and the reasons why a mode was not run.

    `FID-cleanfid-legacy` (mode legacy_tensorflow) resizes as TensorFlow 1 and torch-fidelity do, so it should equal
    FID. `FID-cleanfid-clean` resizes with antialiasing. Its numbers differ, and compare only with one another.
    """
    legacy_name, clean_name = CLEANFID_MODES
    legacy = _cleanfid_statistics(images, inception, "legacy_tensorflow", batch_size)
    if not reference.from_images:
        why = f"{reference.name} has statistics of images resized as TensorFlow 1 does, but mode clean needs the images"
        distance = metrics.cleanfid_distance(legacy, reference.statistics)
        return [Score(legacy_name, distance, inception.extractor)], {(clean_name,): why}
    assert reference.images is not None
    legacy_reference = _cleanfid_statistics(reference.images, inception, "legacy_tensorflow", batch_size)
    clean, clean_reference = (
        _cleanfid_statistics(x, inception, "clean", batch_size) for x in (images, reference.images)
    )
    return [
        Score(legacy_name, metrics.cleanfid_distance(legacy, legacy_reference), inception.extractor),
        Score(clean_name, metrics.cleanfid_distance(clean, clean_reference), inception.extractor),
    ], {}


def _cleanfid_statistics(images: ImageSet, inception: Inception, mode: str, batch_size: int) -> Statistics:
    """Return the statistics of clean-fid's features. Its resizer takes one array [H, W, 3] at a time."""
    resize = build_resizer(mode)

    def prepare(pixels: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(resize(x.permute(1, 2, 0).numpy())).permute(2, 0, 1) for x in pixels])

    batches = forward(images, inception.network, batch_size, f"clean-fid, {mode}", prepare)
    return metrics.statistics_of(torch.cat([features for _, (features,) in batches]))


def _check_reference(reference: Reference, samples: ImageSet, allow_few: bool) -> None:
    """Refuse reference images of another size than the samples, and too few of them unless that is allowed."""
    if reference.images is not None and reference.images.size != samples.size:
        raise UserError(
            f"The samples are {list(samples.size)} pixels, but the images in {reference.name} are "
            f"{list(reference.images.size)}. Resizing changes FID, so nothing is resized here. Resize one set first."
        )
    if reference.num_images is not None and reference.num_images < FEW and not allow_few:
        raise UserError(_too_few(reference.name, reference.num_images))


def _too_few(name: str, number: int) -> str:
    return (
        f"{name} has {number:,} images. FID compares covariances of {NUM_FEATURES:,} features, so with fewer images "
        f"it says little about the system. With --allow-few it is computed and labelled with the number of images."
    )


def _missing(reference: Reference, cleanfid_inception: Inception | None) -> dict[tuple[str, ...], str]:
    """Return the metrics that could not be computed, with the reasons."""
    reasons: dict[tuple[str, ...], str] = {}
    if reference.features is None:
        reasons["precision", "recall", "KID"] = (
            f"{reference.name} has only mu and sigma, but these scores need reference images: give a folder of images, "
            "or ADM's reference batch, whose arr_0 has 10,000"
        )
    if cleanfid_inception is None:
        reasons[CLEANFID_MODES] = (
            f"clean-fid's own features need its weights {CLEANFID_FILE} ({CLEANFID_URL}): name the file with "
            "--cleanfid-inception"
        )
    return reasons


def _notes(sets: Sequence[ImageSet], reference: Reference, num_bootstrap: int) -> list[str]:
    """Return what a reader must know to judge the scores."""
    notes = [
        f"FID of a finite set is biased upwards, and more so with fewer images: these FIDs are of {len(sets[0]):,} "
        "images, published ones of 50,000. Only FIDs of equal numbers of images can be compared."
    ]
    if num_bootstrap:
        notes.append(
            f"FID-low and FID-high enclose 95% of {num_bootstrap} FIDs of images resampled from the set, moved down by "
            "FID-bias, a first-order estimate of the bias (with thousands of images it gives only the order of "
            "magnitude). The interval covers which images the system happened to draw. It does not cover the choice of "
            "the reference images, training, other weights or implementations of Inception, or the bias, which is "
            "still in the FID."
        )
    if len(sets[0]) < FEW:
        notes.append(
            f"The sets have fewer than {FEW:,} images: their scores test the path, they cannot judge a system."
        )
    if reference.num_images is not None and reference.num_images < FEW:
        notes.append(f"The reference has fewer than {FEW:,} images ({reference.num_images:,}).")
    if any(images.lossy for images in sets):
        notes.append("Some samples have lossy compression (JPEG or WebP), which changes FID.")
    return notes
