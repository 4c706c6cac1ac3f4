"""The configuration of a sampling run: number of images, labels, random numbers and format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError

Randomness = Literal["per-image", "official"]
Format = Literal["png", "npz"]
MAX_IMAGES = 10_000_000  # the labels of a run are held in memory


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run, apart from the sampling settings of the model."""

    num_images: int
    # One label for each image; or "random", with all classes equally likely; or None for balanced labels.
    labels: tuple[int, ...] | Literal["random"] | None = None
    seed: int = 0
    randomness: Randomness = "per-image"
    batch_size: int = 16  # in each process
    format: Format = "png"

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise UserError(f"The number of images must be at least 1, not {self.num_images}.")
        if self.num_images > MAX_IMAGES:
            raise UserError(f"A run makes {MAX_IMAGES:,} images at most, not {self.num_images:,}.")
        if self.batch_size < 1:
            raise UserError(f"The batch size must be at least 1, not {self.batch_size}.")
        if self.seed < 0:
            raise UserError(f"The seed must be at least 0, not {self.seed}.")
        if self.randomness == "official" and self.seed >= 2**32:
            raise UserError(f"A seed of the official streams is below 2**32, not {self.seed}.")
        if self.randomness not in get_args(Randomness):
            raise UserError(f"Unknown randomness {self.randomness!r}; there are {', '.join(get_args(Randomness))}.")
        if self.format not in get_args(Format):
            raise UserError(f"Unknown format {self.format!r}; there are {', '.join(get_args(Format))}.")
        if isinstance(self.labels, tuple) and len(self.labels) != self.num_images:
            raise UserError(f"There are {len(self.labels)} labels for {self.num_images} images.")

    @property
    def draws_labels(self) -> bool:
        """Whether labels are drawn from the same stream as the images, so that they are not known beforehand."""
        return self.labels == "random" and self.randomness == "official"

    @property
    def num_batches(self) -> int:
        """The number of batches in the run."""
        return -(-self.num_images // self.batch_size)

    def batch(self, number: int) -> range:
        """Return the numbers of the images in a batch."""
        start = number * self.batch_size
        return range(start, min(start + self.batch_size, self.num_images))


def balanced_labels(num_images: int, num_classes: int) -> tuple[int, ...]:
    """Return the labels of the official evaluation, which has equally many images of every class, class after class.

    The official engine (engine_tokenbridge.py) accepts only a multiple of the number of classes. For other numbers of
    images, the counts of two classes differ by at most 1 here.
    """
    return tuple(i * num_classes // num_images for i in range(num_images))


def random_labels(num_images: int, num_classes: int, seed: int) -> tuple[int, ...]:
    """Return independent random labels, drawn from a stream of the seed that no image has."""
    stream = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    return tuple(stream.integers(num_classes, size=num_images).tolist())


def run_labels(config: RunConfig, num_classes: int) -> Tensor | None:
    """Return the labels [N] of a run; None if they are drawn together with the images (`RunConfig.draws_labels`).

    Raises:
        UserError: a label is not in [0, num_classes).
    """
    if config.draws_labels:
        return None
    if config.labels == "random":
        return torch.tensor(random_labels(config.num_images, num_classes, config.seed))
    labels = config.labels or balanced_labels(config.num_images, num_classes)
    if strange := sorted({label for label in labels if not 0 <= label < num_classes}):
        raise UserError(f"There is no class {strange[0]}; the labels are 0 to {num_classes - 1}.")
    return torch.tensor(labels)
