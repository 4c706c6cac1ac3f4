"""The random numbers that images are drawn from: one stream for each image, or the official code's global streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError


@dataclass(frozen=True)
class PerImage:
    """Every image has a stream of its own, seeded with (seed, image index), so it does not depend on its batch."""

    seed: int
    indices: Sequence[int]  # for each image of the batch, its index in the run

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"The seed must be at least 0, not {self.seed}.")


@dataclass(frozen=True)
class Official:
    """Images are drawn from numpy's and torch's global streams, in the order of the official code."""


Noise = PerImage | Official
"""The source of the random numbers of a batch of images."""


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END, as in the official code
    uniforms: Tensor  # [B, L, C] in [0, 1), one for every token: by position, and by channel in generation order


@dataclass(frozen=True)
class GlobalNoise:
    """The orders of a batch of images, whose tokens are drawn from torch's global stream during sampling."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END, as in the official code


def image_streams(seed: int, image_indices: Sequence[int]) -> list[np.random.Generator]:
    """Return the random stream of each image, which is seeded with (seed, image index)."""
    if seed < 0:
        raise UserError(f"The seed must be at least 0, not {seed}.")
    return [np.random.default_rng((seed, index)) for index in image_indices]


def image_noise(seed: int, image_indices: Sequence[int], num_positions: int, num_channels: int) -> ImageNoise:
    """Draw the numbers of each image from its own stream, on the CPU, so that they are the same for every device."""
    orders, uniforms = [], []
    for stream in image_streams(seed, image_indices):
        orders.append(stream.permutation(num_positions))
        uniforms.append(stream.random((num_positions, num_channels), dtype=np.float32))
    return ImageNoise(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(uniforms)))


def global_noise(num_images: int, num_positions: int) -> GlobalNoise:
    """Draw orders from numpy's global stream; the official code draws the tokens from torch's during sampling.

    Source: models/tokenbridge.py, `sample_orders`: one shuffle of the positions for each image in turn.
    """
    orders = [np.random.permutation(num_positions) for _ in range(num_images)]  # noqa: NPY002  the official generator
    return GlobalNoise(torch.from_numpy(np.stack(orders)))
