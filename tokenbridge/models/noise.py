"""The random numbers of images: a stream for each image, or the official code's global streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError


@dataclass(frozen=True)
class PerImage:
    """Every image has a stream of its own, made from (seed, image index): it does not depend on its batch."""

    seed: int
    indices: Sequence[int]  # of the batch's images in the run

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"A seed is at least 0, not {self.seed}.")


@dataclass(frozen=True)
class Official:
    """numpy's and torch's global streams, drawn from in the order of the official code."""


Noise = PerImage | Official
"""Where a system draws the random numbers of a batch of images from."""


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END (as in the official code)
    uniforms: Tensor  # [B, L, C] in [0, 1): one for every token, by position and place in generation order


@dataclass(frozen=True)
class GlobalNoise:
    """The orders of a batch of images; its tokens are drawn from torch's global stream as they come."""

    orders: Tensor  # [B, L] int64, as in ImageNoise


def image_streams(seed: int, image_indices: Sequence[int]) -> list[np.random.Generator]:
    """Return each image's own random stream, made from (seed, image index)."""
    if seed < 0:
        raise UserError(f"A seed is at least 0, not {seed}.")
    return [np.random.default_rng((seed, index)) for index in image_indices]


def image_noise(seed: int, image_indices: Sequence[int], num_positions: int, num_channels: int) -> ImageNoise:
    """Draw each image's stream from (seed, image index), on the CPU so that every device sees the same."""
    orders, uniforms = [], []
    for stream in image_streams(seed, image_indices):
        orders.append(stream.permutation(num_positions))
        uniforms.append(stream.random((num_positions, num_channels), dtype=np.float32))
    return ImageNoise(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(uniforms)))


def global_noise(num_images: int, num_positions: int) -> GlobalNoise:
    """Draw orders from numpy's global stream, and leave the tokens to torch's, as the official code does.

    Source: models/tokenbridge.py, `sample_orders`: one shuffle of the positions for each image in turn.
    """
    orders = [np.random.permutation(num_positions) for _ in range(num_images)]  # noqa: NPY002  the official generator
    return GlobalNoise(torch.from_numpy(np.stack(orders)))
