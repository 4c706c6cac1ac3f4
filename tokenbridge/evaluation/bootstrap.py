"""The spread of FID over images drawn again from a set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.features import _device
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.utils.console import track

SEED = 2020  # torch-fidelity's default, and so the official evaluation's: shuffle of IS, subsets of KID
INTERVAL = (0.025, 0.975)  # quantiles of the bootstrap


def fid_interval(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> dict[str, float]:
    """Return the bootstrap's interval and bias of FID: `FID-low`, `FID-high`, `FID-bias`.

    A resample has fewer different images than the set, and FID grows as images become fewer: resampled FIDs lie
    above the FID of the set. That difference, `FID-bias`, is the bootstrap's estimate of how far FID of N images lies
    above that of infinitely many. The interval is that of the resampled FIDs, moved down by it.

    Args:
        features: [N, F].
        reference: taken as exact.
        num_bootstrap: resamples, at least 2.
        seed: of the draws.
    """
    resampled = bootstrap_fid(features, reference, num_bootstrap, seed)
    fid = metrics.fidelity_distance(metrics.statistics_of(features), reference)
    bias = resampled.mean() - fid
    low, high = np.quantile(resampled - bias, INTERVAL)
    return {"FID-low": float(low), "FID-high": float(high), "FID-bias": float(bias)}


def bootstrap_fid(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> np.ndarray:
    """Return FID [num_bootstrap], float64, of N images drawn with replacement, again and again.

    With reference covariance RᵀR, the trace in FID is that of the root of R S Rᵀ, whose eigenvalues are those of a
    Gram matrix of the projected features: no feature is extracted, and no root taken, twice.
    """
    num_images, num_features = features.shape
    device = _device()
    x = features.double().to(device)
    mean_r = torch.from_numpy(reference.mean).to(device)
    projected = x @ torch.from_numpy(metrics.root_of(reference.covariance)).to(device).T
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
