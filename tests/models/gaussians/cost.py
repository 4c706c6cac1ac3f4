"""Operations of one image."""

from __future__ import annotations

from .model import Gaussians
from .sampling import GaussiansSampling


def count_flop(model: Gaussians, settings: GaussiansSampling) -> dict[str, float]:
    """Return the operations of one image by part."""
    return {"linear layer": 2.0 * model.output.in_features * model.output.out_features}
