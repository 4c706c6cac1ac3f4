"""Sampling: one normal number a latent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenbridge.models.noise import Noise, PerImage, image_streams
from tokenbridge.utils.errors import UserError

from .model import Gaussians


@dataclass(frozen=True)
class GaussiansSampling:
    """Everything that decides which image a seed gives."""

    temperature: float = 1.0  # multiplies the deviations

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"The temperature must be at least 0, not {self.temperature}.")


@torch.inference_mode()
def generate(model: Gaussians, labels: Tensor, settings: GaussiansSampling, noise: Noise) -> Tensor:
    """Return latents [B, C, h, w]."""
    assert isinstance(noise, PerImage)
    mean, deviation = model(labels)
    drawn = [s.standard_normal(model.shape, dtype=np.float32) for s in image_streams(noise.seed, noise.indices)]
    return mean + settings.temperature * deviation * torch.from_numpy(np.stack(drawn)).to(model.device)
