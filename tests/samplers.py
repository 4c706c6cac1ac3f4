"""Images of a model that a test has made, as the commands make them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenbridge.models.registry import SYSTEMS
from tokenbridge.sampling.load import ModelSampler
from tokenbridge.sampling.run import refuse
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


@dataclass(frozen=True)
class Flat:
    """A system whose image is one colour, made of seed, number and label; or drawn from the global streams."""

    salt: int = 0
    bad: tuple[int, ...] = ()
    what: str = "is black"
    name: str = "flat"
    stand_in: bool = False
    num_classes: int = 5
    image_size: int = 4
    channels: int = 1

    def images(self, labels: Tensor, indices: Sequence[int], seed: int | None) -> Tensor:
        if seed is None:
            values = [int(torch.randint(100, ())) + np.random.randint(100) + 1 for _ in indices]  # noqa: NPY002
        else:
            values = [1 + (seed * 31 + i * 7 + int(label)) % 250 for i, label in zip(indices, labels, strict=True)]
        bad = torch.tensor([i in self.bad for i in indices])
        if self.what != "is black":
            refuse(bad, self.what)
        colours = torch.tensor(values, dtype=torch.uint8).masked_fill(bad, 0)
        return colours[:, None, None, None].expand(-1, self.channels, self.image_size, self.image_size)

    def describe(self) -> dict[str, Any]:
        return {"salt": self.salt, "settings": {"depth": 3}}
