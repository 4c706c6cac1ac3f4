"""Images of a model that a test has made, as the commands make them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokenbridge.models.registry import SYSTEMS
from tokenbridge.sampling.load import ModelSampler
from tokenbridge.sampling.sample import sample_pixels


def sampler_of(system: str, model: Any, tokenizer: Any, settings: Any) -> ModelSampler:
    """Return the sampler of a model in memory."""
    return ModelSampler("test", SYSTEMS[system], model, tokenizer, settings, "fp32", {"generator": "0" * 64})


def sample_images(
    system: str, model: Any, tokenizer: Any, settings: Any, labels: Tensor, seed: int, *, batch_size: int = 250
) -> Tensor:
    """Return uint8 pixels [N, C, H, W] of one image for each label."""
    sampler = sampler_of(system, model, tokenizer, settings)
    return sample_pixels(sampler, labels, seed, batch_size=batch_size, show_progress=False)
