"""Image metrics: samples against a reference, and reconstructions against their originals.

Fréchet distance, Inception Score, precision, recall and KID are torch-fidelity's (0.4.0,
https://github.com/toshas/torch-fidelity), of features that are given: `score` takes a `Classifier`'s,
`evaluation.evaluate` Inception's. As a cross-check, clean-fid (0.1.35, https://github.com/GaParmar/clean-fid)
computes the Fréchet distance again. All take float64: torch-fidelity averages in the precision it is given.
PSNR and SSIM are scikit-image's. Scores carry the extractor's name (`FID-digits`): only Inception's is FID.

Shape letters: N samples, M reference images, C channels, H height, W width, F features, K classes.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import cleanfid.fid
import numpy as np
import scipy.linalg
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from tokenbridge.data.images import pixels_to_images
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenbridge.evaluation.classifier import Classifier

ISC_SPLITS = 10  # parts that the Inception Score is averaged over (torch-fidelity's and the paper's default)
KID_SUBSET_SIZE = 1000  # images per KID subset (torch-fidelity's default)
PRC_NEIGHBOURS = 3  # radius of the manifold: distance to the 3rd neighbour (the paper's and ADM's value)
PRC_BATCH_SIZE = 1000  # rows of the distance matrix held at once; changes memory, not values


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features: what the Fréchet distance compares."""

    mean: np.ndarray  # [F], float64
    covariance: np.ndarray  # [F, F], float64, over N - 1


@dataclass(frozen=True)
class Scores:
    """Scores of one set of samples. Means and deviations as torch-fidelity returns them, nothing rounded."""

    extractor: str  # whose features these are, e.g. "digits"
    num_samples: int
    num_reference: int
    fid: float  # >= 0 but for rounding; squared feature units
    inception_score: float  # in [1, K]
    inception_score_std: float  # over the splits
    precision: float  # in [0, 1]: share of the samples inside the reference's manifold
    recall: float  # in [0, 1]: share of the reference inside the samples' manifold
    kid: float  # unbiased, so slightly below 0 for equal distributions
    kid_std: float  # over the subsets
    fid_cleanfid: float  # cross-check of `fid`

    def __post_init__(self) -> None:
        if not self.extractor.strip():
            raise UserError("Scores need the name of their feature extractor.")

    def labelled(self) -> dict[str, float]:
        """Return the scores under the names they are reported by: `FID-digits`, `IS-digits`, ..."""
        scores = {
            "FID": self.fid,
            "IS": self.inception_score,
            "IS-std": self.inception_score_std,
            "precision": self.precision,
            "recall": self.recall,
            "KID": self.kid,
            "KID-std": self.kid_std,
            "FID-cleanfid": self.fid_cleanfid,
        }
        return {f"{name}-{self.extractor}": value for name, value in scores.items()}


def score(
    samples: Tensor,
    reference: Tensor,
    classifier: Classifier,
    *,
    extractor: str = "digits",
    batch_size: int = 256,
    seed: int = 0,
) -> Scores:
    """Score samples against reference images.

    Runs where the classifier is. With few images the settings shrink to what is there: KID subsets to the
    smaller set, Inception Score splits to N, neighbours to one less than the smaller set.

    Args:
        samples: generated images, uint8 [N, C, H, W], N >= 2.
        reference: real images, uint8 [M, C, H, W], M >= 2.
        classifier: the feature extractor; left as it was.
        extractor: its name, which every score is labelled with.
        batch_size: images per forward pass.
        seed: of the Inception Score's shuffle and the KID subsets.

    Raises:
        ValueError: another dtype or shape, fewer than two images, features not finite, an empty name.
    """
    _check_images("The samples", samples, minimum=2)
    _check_images("The reference images", reference, minimum=2)
    if samples.shape[1:] != reference.shape[1:]:
        raise UserError(f"Samples are {list(samples.shape[1:])} and reference images {list(reference.shape[1:])}.")
    sample_features, logits = extract_features(samples, classifier, batch_size)
    reference_features, _ = extract_features(reference, classifier, batch_size)
    fid_cleanfid = frechet_distance(sample_features, reference_features)  # first: refuses NaN clearly
    inception, inception_std = inception_score(logits, seed)
    precision, recall = precision_and_recall(sample_features, reference_features)
    kid, kid_std = kernel_distance(sample_features, reference_features, seed)
    return Scores(
        extractor=extractor,
        num_samples=len(samples),
        num_reference=len(reference),
        fid=fidelity_distance(statistics_of(sample_features), statistics_of(reference_features)),
        inception_score=inception,
        inception_score_std=inception_std,
        precision=precision,
        recall=recall,
        kid=kid,
        kid_std=kid_std,
        fid_cleanfid=fid_cleanfid,
    )


def statistics_of(features: Tensor) -> Statistics:
    """Return mean and covariance, in float64, of features [N, F], N >= 2."""
    values = fid_features_to_statistics(features.double().cpu())
    return Statistics(values["mu"], values["sigma"])


def fidelity_distance(a: Statistics, b: Statistics) -> float:
    """Return torch-fidelity's Fréchet distance: FID, where the features are Inception's."""
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
        samples: [N, F], N >= 2; torch-fidelity's first input.
        reference: [M, F], M >= 2; its second.
    """
    neighbours = min(PRC_NEIGHBOURS, len(samples) - 1, len(reference) - 1)
    values = prc_features_to_metric(
        samples,
        reference,
        prc_neighborhood=neighbours,
        prc_batch_size=PRC_BATCH_SIZE,
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

    Evaluated without dropout, in the classifier's own precision. The results are widened because
    torch-fidelity averages in the precision it is given: float32 features would get a float32 mean.

    Args:
        images: uint8 [N, C, H, W] of the classifier's size, N >= 1, on any device.
        classifier: evaluated where it is; its training mode is restored.
        batch_size: images per forward pass.

    Raises:
        ValueError: another dtype or shape, no images, or a batch size below 1.
    """
    _check_images("The images", images, minimum=1)
    if batch_size < 1:
        raise UserError(f"The batch size is at least 1, not {batch_size}.")
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


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return clean-fid's Fréchet distance of two sets of features: the cross-check of torch-fidelity's.

    In squared feature units; see `cleanfid_distance`, which this is but where scipy no longer has what clean-fid
    needs: there the factors come from the features, which keeps their rank.

    Args:
        features_a: [N, F], N >= 2, F >= 2.
        features_b: [M, F], M >= 2.

    Raises:
        ValueError: other shapes, or values that are not finite.
    """
    a, b = (features.detach().double().cpu().numpy() for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(*a.shape, *b.shape) < 2:
        raise UserError(f"Features are [N, F] and [M, F], all at least 2, not {a.shape} and {b.shape}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("Features must be finite.")
    if not _sqrtm_has_disp():
        return frechet_distance_by_singular_values(a, b)
    return cleanfid_distance(statistics_of(features_a), statistics_of(features_b))


def cleanfid_distance(a: Statistics, b: Statistics) -> float:
    """Return clean-fid's Fréchet distance of two sets of statistics.

    |mean_a - mean_b|² + tr(S_a) + tr(S_b) - 2 tr sqrt(S_a S_b), with means and covariances S in float64, in
    squared feature units. Results below 0, which only rounding makes, become 0.

    clean-fid takes the matrix square root by `scipy.linalg.sqrtm(..., disp=False)`, and scipy 1.18 drops
    `disp`. There the trace is computed here, without forming S_a S_b: with S = RᵀR, the square roots of its
    eigenvalues are the singular values of R_a R_bᵀ. Where the covariances have full rank both ways agree to
    rounding. Where they have not (fewer images than features), rounding errors of 1e-16 in eigenvalues that
    should be 0 become 1e-8 under the root, in clean-fid and torch-fidelity alike; singular values avoid that.
    """
    if not _sqrtm_has_disp():
        return _distance(a.mean, root_of(a.covariance), b.mean, root_of(b.covariance))
    # clean-fid prints if the root is not finite.
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # `disp` is deprecated; singular covariances are expected
        distance = cleanfid.fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    return max(0.0, float(distance))


def root_of(covariance: np.ndarray) -> np.ndarray:
    """Return R [F, F] with RᵀR = covariance [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def _sqrtm_has_disp() -> bool:
    return "disp" in inspect.signature(scipy.linalg.sqrtm).parameters


def frechet_distance_by_singular_values(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the same distance from factors R of the covariances, S = RᵀR (see `cleanfid_distance`)."""
    root_a, root_b = (
        np.linalg.qr(x - x.mean(axis=0), mode="r") / np.sqrt(len(x) - 1) for x in (a, b)
    )  # [min(N, F), F]
    return _distance(a.mean(axis=0), root_a, b.mean(axis=0), root_b)


def _distance(mean_a: np.ndarray, root_a: np.ndarray, mean_b: np.ndarray, root_b: np.ndarray) -> float:
    trace = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    means = np.sum((mean_a - mean_b) ** 2)
    return max(0.0, float(means + np.sum(root_a**2) + np.sum(root_b**2) - 2 * trace))


def class_accuracy(samples: Tensor, labels: Tensor, classifier: Classifier, *, batch_size: int = 256) -> float:
    """Return the share, in [0, 1], of samples that the classifier takes for the class they were asked to be.

    Args:
        samples: uint8 [N, C, H, W], N >= 1.
        labels: integers [N] in [0, K).
        classifier: see `extract_features`.
        batch_size: images per forward pass.

    Raises:
        ValueError: images that `extract_features` refuses, or not one label per image.
    """
    if list(labels.shape) != [len(samples)]:
        raise UserError(f"{len(samples)} samples need as many labels, not {list(labels.shape)}.")
    _, logits = extract_features(samples, classifier, batch_size)
    return (logits.argmax(dim=1) == labels.cpu()).double().mean().item()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image, float64 [N], in dB; infinite for equal images.

    Args:
        images: uint8 [N, C, H, W].
        reconstructions: uint8 [N, C, H, W].

    Raises:
        ValueError: another dtype, different shapes, or no images.
    """
    with np.errstate(divide="ignore"):  # equal images
        return _per_image(partial(peak_signal_noise_ratio, data_range=255), images, reconstructions)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Return the structural similarity of each image, float64 [N] in [-1, 1]; 1 for equal images.

    scikit-image's defaults: a uniform 7x7 window and sample covariances; mean over channels.

    Args:
        images: uint8 [N, C, H, W], H and W at least 7.
        reconstructions: uint8 [N, C, H, W].

    Raises:
        ValueError: another dtype, different shapes, no images, or images smaller than the window.
    """
    return _per_image(partial(structural_similarity, data_range=255, channel_axis=0), images, reconstructions)


def _per_image(metric: Callable[[np.ndarray, np.ndarray], float], first: Tensor, second: Tensor) -> Tensor:
    """Apply a metric of two arrays [C, H, W] to each pair of images."""
    _check_images("The images", first, minimum=1)
    _check_images("The reconstructions", second, minimum=1)
    if first.shape != second.shape:
        raise UserError(f"Images are {list(first.shape)} and reconstructions {list(second.shape)}.")
    pairs = zip(first.cpu().numpy(), second.cpu().numpy(), strict=True)
    return torch.tensor([metric(a, b) for a, b in pairs], dtype=torch.float64)


def _check_images(what: str, images: Tensor, minimum: int) -> None:
    """Refuse anything but `minimum` or more uint8 images [N, C, H, W]."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise UserError(f"{what} must be uint8 [N, C, H, W], not {images.dtype} {list(images.shape)}.")
    if len(images) < minimum:
        raise UserError(f"{what} must be at least {minimum}, not {len(images)}.")


class ImageDataset(Dataset[Tensor]):
    """Images of a tensor one by one; torch-fidelity takes neither a tensor nor TensorDataset's tuples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.cpu()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
