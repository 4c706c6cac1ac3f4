"""The bootstrap of FID: how FID varies when the images are drawn again from the set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tokenbridge.evaluation.metrics import SEED, Statistics
from tokenbridge.results.score import Score
from tokenbridge.utils.console import track
from tokenbridge.utils.devices import best_device

INTERVAL = (0.025, 0.975)  # quantiles of the bootstrap
CHUNK = 4096  # images whose features are held in float64 at once; changes memory, not values


def with_interval(fid: Score, features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> Score:
    """Return the FID of a set of images with the bootstrap's interval and bias.

    A resample has fewer different images than the set, and FID grows as images become fewer, so the resampled FIDs
    lie above the FID of the set. That difference, the bias, estimates how far the FID of N images lies above the FID
    of infinitely many. The interval is the interval of the resampled FIDs, moved down by the bias.

    Args:
        fid: the FID of the features against the reference.
        features: the features of the images, [N, F].
        reference: the statistics of the reference, which are taken as exact.
        num_bootstrap: the number of resamples, at least 2.
        seed: the seed of the draws.
    """
    resampled = bootstrap_fid(features, reference, num_bootstrap, seed)
    bias = resampled.mean() - fid.value
    low, high = np.quantile(resampled - bias, INTERVAL)
    return replace(fid, low=float(low), high=float(high), bias=float(bias))


def bootstrap_fid(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> np.ndarray:
    """Return the FIDs [num_bootstrap], float64, of resamples of N images, drawn with replacement.

    With the reference's covariance RᵀR, the trace in FID is the trace of the root of R S Rᵀ. Its eigenvalues are those
    of a Gram matrix of the projected features, so the features are extracted once, and R is computed once.
    """
    num_images = len(features)
    device = best_device()
    features = features.to(device)
    mean_r = torch.from_numpy(reference.mean).to(device)
    root_r = torch.from_numpy(_root_of(reference.covariance)).to(device)
    # In float64 only chunk by chunk: of 50,000 images Inception's features alone are 0.8 GB in it.
    projected = torch.cat([part.double() @ root_r.T for part in features.split(CHUNK)])
    projected -= projected.mean(dim=0)
    norms = torch.cat([part.double().square().sum(dim=1) for part in features.split(CHUNK)])
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in track(range(num_bootstrap), "bootstrap"):
        drawn = torch.randint(num_images, (num_images,), generator=generator)
        weights = torch.bincount(drawn, minlength=num_images).double().to(device)
        parts = zip(weights.split(CHUNK), features.split(CHUNK), strict=True)
        mean = torch.stack([w @ x.double() for w, x in parts]).sum(dim=0) / num_images
        variance = (weights @ norms - num_images * mean.dot(mean)) / (num_images - 1)
        distances.append((mean - mean_r).square().sum() + variance - 2 * _trace_of_root(projected, weights))
    return torch.stack(distances).cpu().numpy() + np.trace(reference.covariance)


def _trace_of_root(projected: Tensor, weights: Tensor) -> Tensor:
    """Return the trace of the root of R S Rᵀ, where S is the covariance of images that were drawn so many times.

    Args:
        projected: features times Rᵀ, [N, F].
        weights: how often each was drawn, [N].
    """
    num_images, num_features = projected.shape
    mean = weights @ projected / num_images
    scale = (weights / (num_images - 1)).sqrt()[:, None]
    if num_images < num_features:
        centred = (projected - mean) * scale
        gram = centred @ centred.T
    else:
        gram = torch.zeros(num_features, num_features, dtype=projected.dtype, device=projected.device)
        drawn = weights.nonzero()[:, 0]  # a third of the images is not, and needs no product
        for rows in drawn.split(CHUNK):
            centred = (projected[rows] - mean) * scale[rows]
            gram.addmm_(centred.T, centred)
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()


def _root_of(covariance: np.ndarray) -> np.ndarray:
    """Return R [F, F] with RᵀR = covariance [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
