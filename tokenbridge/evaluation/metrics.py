"""Image metrics, which compare samples with a reference and reconstructions with their originals.

Every FID, Inception Score, precision, recall and KID of this package comes from here. Each is a thin function around
torch-fidelity's (0.4.0, https://github.com/toshas/torch-fidelity). It takes features, which come from a `Classifier`
at the small scales and from Inception otherwise. As a cross-check, clean-fid (0.1.35,
https://github.com/GaParmar/clean-fid) computes the Fréchet distance again. PSNR and SSIM are scikit-image's. Scores
carry the extractor's name (`FID-digits`): only that of the published Inception is called FID.

Shape letters: N samples, M reference images, C channels, H height, W width, F features, K classes.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import cleanfid.fid
import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from tokenbridge.data.images import pixels_to_images
from tokenbridge.results.score import Score
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenbridge.evaluation.classifier import Classifier

SEED = 2020  # for IS's shuffle and KID's subsets: torch-fidelity's default, and hence the official evaluation's
ISC_SPLITS = 10  # the number of parts that IS is averaged over (torch-fidelity's and the paper's default)
KID_SUBSET_SIZE = 1000  # images per KID subset (torch-fidelity's default)
PRC_NEIGHBOURS = 3  # radius of the manifold: distance to the 3rd neighbour (the paper's and ADM's value)
SSIM_WINDOW = 7  # pixels
PRC_DISTANCES = 25_000_000  # distances held at once (twice, for a moment); changes memory, not values


@dataclass(frozen=True)
class Statistics:
    """The mean and covariance of features, which the Fréchet distance compares."""

    mean: np.ndarray  # [F], float64
    covariance: np.ndarray  # [F, F], float64, with the divisor N - 1


def score(
    samples: Tensor,
    reference: Tensor,
    classifier: Classifier,
    *,
    extractor: str = "digits",
    batch_size: int = 256,
    seed: int = 0,
) -> list[Score]:
    """Score samples against reference images by the features of a classifier.

    Args:
        samples: generated images, uint8 [N, C, H, W], N >= 2.
        reference: real images, uint8 [M, C, H, W], M >= 2.
        classifier: the feature extractor. It runs on its device, and its training mode is restored.
        extractor: the classifier's name, which labels every score.
        batch_size: images per forward pass.
        seed: the seed of the Inception Score's shuffle and the KID subsets.

    Returns:
        The scores that `scores_of` returns.
    """
    _check_pixels(samples, minimum=2)
    _check_pixels(reference, minimum=2)
    features, logits = extract_features(samples, classifier, batch_size)
    others, _ = extract_features(reference, classifier, batch_size)
    scores, not_run = scores_of(features, logits, statistics_of(others), others, seed=seed, extractor=extractor)
    for why in not_run.values():
        warnings.warn(why, stacklevel=2)
    return scores


def scores_of(
    features: Tensor,
    logits: Tensor,
    reference: Statistics,
    reference_features: Tensor | None,
    *,
    seed: int,
    extractor: str | None,
    num_images: int | None = None,
) -> tuple[list[Score], dict[tuple[str, ...], str]]:
    """Return FID, FID by clean-fid's formula and Inception Score; with reference features also precision, recall, KID.

    The second value says why a score is missing: clean-fid's formula, a cross-check, has no value for some covariances.

    With few images the settings shrink to what is there: Inception Score splits to N, KID subsets to the smaller set,
    neighbours to one less than the smaller set.

    Args:
        features: features of the samples, [N, F].
        logits: logits of the samples, [N, K].
        reference: statistics of the reference images' features.
        reference_features: features of the reference images, [M, F].
        seed: the seed of the Inception Score's shuffle and the KID subsets.
        extractor: the label of the network that extracted the features, as `Score` takes it.
        num_images: the number of images that labels all scores, as `Score` takes it.
    """
    label: dict[str, Any] = {"extractor": extractor, "num_images": num_images}
    statistics = statistics_of(features)
    mean, std = inception_score(logits, seed)
    scores = [
        Score("FID", frechet_distance(statistics, reference), **label),
        Score("IS", mean, std=std, **label),
    ]
    not_run: dict[tuple[str, ...], str] = {}
    try:
        scores.insert(1, Score("FID-cleanfid", cleanfid_distance(statistics, reference), **label))
    except ValueError as error:  # clean-fid's, of a root that is not real
        not_run["FID-cleanfid",] = f"clean-fid's formula gives no number for these covariances: {error}"
    if reference_features is None:
        return scores, not_run
    # torch-fidelity averages in the precision it is given.
    samples, others = features.double(), reference_features.double()
    precision, recall = precision_and_recall(samples.to(best_device()), others.to(best_device()))
    mean, std = kernel_distance(samples, others, seed)
    scores += [
        Score("precision", precision, **label),
        Score("recall", recall, **label),
        Score("KID", mean, std=std, **label),
    ]
    return scores, not_run


def statistics_of(features: Tensor) -> Statistics:
    """Return the mean and covariance, in float64, of features [N, F], N >= 2.

    Raises:
        UserError: the features are not finite, as those of a network with damaged weights.
    """
    assert features.ndim == 2, f"features are [N, F], not {list(features.shape)}"
    assert len(features) >= 2, "statistics of features need two images"
    if not bool(features.isfinite().all()):
        raise UserError("The features are not finite: the weights of the network that extracts them are damaged.")
    values = fid_features_to_statistics(features.double().cpu())
    return Statistics(values["mu"], values["sigma"])


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return torch-fidelity's Fréchet distance, in squared feature units: FID, where the features are Inception's.

    It is at least 0 up to rounding.
    """
    assert a.mean.shape == b.mean.shape, f"features of two networks: {a.mean.shape} and {b.mean.shape}"
    pair = ({"mu": s.mean, "sigma": s.covariance} for s in (a, b))
    return float(fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID])


def inception_score(logits: Tensor, seed: int) -> tuple[float, float]:
    """Return torch-fidelity's Inception Score of logits [N, K], shuffled by `seed`: mean and deviation over splits."""
    values = isc_features_to_metric(logits, splits=min(ISC_SPLITS, len(logits)), rng_seed=seed)
    return values[KEY_METRIC_ISC_MEAN], values[KEY_METRIC_ISC_STD]


def precision_and_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return torch-fidelity's precision and recall (Kynkäänniemi et al., 2019) of features, on their device.

    Precision is the share of the samples inside the reference's manifold, recall the share of the reference inside
    the samples'. ADM's evaluator, which takes the reference first, returns the same two in the same order.

    Args:
        samples: features of the samples, [N, F], N >= 2, which are torch-fidelity's first input.
        reference: features of the reference images, [M, F], M >= 2, which are its second input.
    """
    neighbours = min(PRC_NEIGHBOURS, len(samples) - 1, len(reference) - 1)
    values = prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=neighbours,
        prc_batch_size=max(1, min(1000, PRC_DISTANCES // max(len(samples), len(reference)))),
        save_cpu_ram=True,  # never the whole distance matrix
        verbose=False,
    )
    return values[KEY_METRIC_PRECISION], values[KEY_METRIC_RECALL]


def kernel_distance(samples: Tensor, reference: Tensor, seed: int) -> tuple[float, float]:
    """Return torch-fidelity's KID of features [N, F] and [M, F]: mean and deviation over subsets drawn by `seed`."""
    size = min(KID_SUBSET_SIZE, len(samples), len(reference))
    values = kid_features_to_metric(samples, reference, kid_subset_size=size, rng_seed=seed, verbose=False)
    return values[KEY_METRIC_KID_MEAN], values[KEY_METRIC_KID_STD]


@torch.no_grad()
def extract_features(images: Tensor, classifier: Classifier, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Return the classifier's features [N, F] and logits [N, K] of images, float64 on the CPU.

    The classifier runs without dropout, in its own precision. The results are widened because torch-fidelity
    averages in the precision of its input, and float32 features would get a float32 mean.

    Args:
        images: uint8 [N, C, H, W], N >= 1, on any device.
        classifier: the feature extractor. It runs on its device, and its training mode is restored.
        batch_size: images per forward pass.

    Raises:
        UserError: the images do not have the classifier's size.
    """
    _check_pixels(images)
    size = classifier.config.image_size
    expected = [classifier.config.in_channels, size, size]
    if list(images.shape[1:]) != expected:
        raise UserError(f"The classifier takes images of {expected}, not {list(images.shape[1:])}.")
    was_training = classifier.training
    classifier.eval()
    try:
        batches = (pixels_to_images(batch.to(classifier.device)) for batch in images.split(batch_size))
        outputs = [classifier(batch) for batch in batches]
    finally:
        classifier.train(was_training)
    features, logits = (torch.cat(parts).double().cpu() for parts in zip(*outputs, strict=True))
    return features, logits


def cleanfid_distance(a: Statistics, b: Statistics) -> float:
    """Return clean-fid's Fréchet distance of the same statistics, as a cross-check of torch-fidelity's.

    It is |mean_a - mean_b|² + tr(S_a) + tr(S_b) - 2 tr sqrt(S_a S_b), with means and covariances S in float64, in
    squared feature units. Results below 0, which only rounding causes, become 0.

    Where the covariances have full rank, it agrees with `frechet_distance` up to rounding. Where they lack it (with
    fewer images than features), rounding errors of 1e-16 in eigenvalues that should be 0 become 1e-8 under the root, in
    clean-fid and torch-fidelity alike. clean-fid needs the argument `disp` of scipy's `sqrtm`, which scipy 1.18 drops.
    """
    assert a.mean.shape == b.mean.shape, f"features of two networks: {a.mean.shape} and {b.mean.shape}"
    # clean-fid prints to stdout if the root is not finite.
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # `disp` is deprecated; singular covariances are expected
        distance = cleanfid.fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return max(0.0, float(distance))


def class_accuracy(samples: Tensor, labels: Tensor, classifier: Classifier, *, batch_size: int = 256) -> float:
    """Return the share, in [0, 1], of samples that the classifier assigns to the class they were sampled for.

    Args:
        samples: uint8 [N, C, H, W], N >= 1.
        labels: integers [N] in [0, K).
        classifier: the classifier, as `extract_features` takes it.
        batch_size: images per forward pass.
    """
    assert list(labels.shape) == [len(samples)], f"{len(samples)} samples, but labels {list(labels.shape)}"
    _, logits = extract_features(samples, classifier, batch_size)
    return (logits.argmax(dim=1) == labels.cpu()).double().mean().item()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, float64 [N], in dB. It is infinite for equal images.

    Args:
        images: uint8 [N, C, H, W].
        reconstructions: uint8 [N, C, H, W].
    """
    with np.errstate(divide="ignore"):  # equal images
        return _per_image(partial(peak_signal_noise_ratio, data_range=255), images, reconstructions)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity of each image, float64 [N] in [-1, 1]. It is 1 for equal images.

    scikit-image's defaults are used: a uniform window of 7 x 7 pixels, sample covariances, and the mean over channels.

    Args:
        images: uint8 [N, C, H, W].
        reconstructions: uint8 [N, C, H, W].

    Raises:
        UserError: the images are smaller than the window.
    """
    if min(images.shape[-2:]) < SSIM_WINDOW:
        height, width = images.shape[-2:]
        raise UserError(f"SSIM compares windows of {SSIM_WINDOW} pixels, but these images have {height} x {width}.")
    return _per_image(
        partial(structural_similarity, data_range=255, channel_axis=0, win_size=SSIM_WINDOW), images, reconstructions
    )


def _per_image(metric: Callable[[np.ndarray, np.ndarray], float], first: Tensor, second: Tensor) -> Tensor:
    """Apply a metric of two arrays [C, H, W] to each pair of images."""
    _check_pixels(first)
    _check_pixels(second)
    assert first.shape == second.shape, f"images {list(first.shape)}, reconstructions {list(second.shape)}"
    pairs = zip(first.cpu().numpy(), second.cpu().numpy(), strict=True)
    return torch.tensor([metric(a, b) for a, b in pairs], dtype=torch.float64)


def _check_pixels(images: Tensor, minimum: int = 1) -> None:
    assert images.dtype == torch.uint8, f"images are uint8, not {images.dtype}"
    assert images.ndim == 4, f"images are [N, C, H, W], not {list(images.shape)}"
    assert len(images) >= minimum, f"at least {minimum} images are needed, not {len(images)}"
