"""The spread of FID over images drawn again from a set."""

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


def with_interval(fid: Score, features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> Score:
    """Return the FID of a set of images with the bootstrap's interval and bias.

    A resample has fewer different images than the set, and FID grows as images become fewer: resampled FIDs lie
    above the FID of the set. That difference, the bias, is the bootstrap's estimate of how far FID of N images lies
    above that of infinitely many. The interval is that of the resampled FIDs, moved down by it.

    Args:
        fid: of the features against the reference.
        features: [N, F].
        reference: taken as exact.
        num_bootstrap: resamples, at least 2.
        seed: of the draws.
    """
    resampled = bootstrap_fid(features, reference, num_bootstrap, seed)
    bias = resampled.mean() - fid.value
    low, high = np.quantile(resampled - bias, INTERVAL)
    return replace(fid, low=float(low), high=float(high), bias=float(bias))


def bootstrap_fid(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> np.ndarray:
    """Return FID [num_bootstrap], float64, of N images drawn with replacement, again and again.

    With reference covariance RᵀR, the trace in FID is that of the root of R S Rᵀ, whose eigenvalues are those of a
    Gram matrix of the projected features: no feature is extracted, and no root taken, twice.
    """
    num_images, num_features = features.shape
    device = best_device()
    x = features.double().to(device)
    mean_r = torch.from_numpy(reference.mean).to(device)
    projected = x @ torch.from_numpy(_root_of(reference.covariance)).to(device).T
    norms = x.square().sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in track(range(num_bootstrap), "bootstrap"):
        drawn = torch.randint(num_images, (num_images,), generator=generator)
        weights = torch.bincount(drawn, minlength=num_images).double().to(device)
        mean = weights @ x / num_images
        variance = (weights @ norms - num_images * mean.dot(mean)) / (num_images - 1)
        centred = (projected - weights @ projected / num_images) * (weights / (num_images - 1)).sqrt()[:, None]
        gram = centred @ centred.T if num_images < num_features else centred.T @ centred
        root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        distances.append((mean - mean_r).square().sum() + variance - 2 * root)
    return torch.stack(distances).cpu().numpy() + np.trace(reference.covariance)


def _root_of(covariance: np.ndarray) -> np.ndarray:
    """Return R [F, F] with RᵀR = covariance [F, F]."""
    values, vectors = np.linalg.eigh(covariance)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
