"""What a user may choose when a target is reproduced, and photographs in the place of ImageNet for stand-ins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import skimage.data
from PIL import Image

from tokenbridge.sampling.config import Randomness
from tokenbridge.utils.devices import Dtype
from tokenbridge.utils.errors import UserError

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # shipped by scikit-image


@dataclass(frozen=True)
class Options:
    """How a target is reproduced; None is the target's own way. `targets.USED_BY` says which target uses what.

    Files that are not named are looked for by `artifacts.resolve`.
    """

    num_images: int | None = None  # of each system at a scale, of each model in table 3, in all in table 1
    seed: int = 0
    batch_size: int | None = None
    stand_in: bool = False  # prove the path with drawn weights and few images: no result

    data: str | None = None  # images in the place of the scale's
    weights: Path | None = None  # of a scale, its folder of models; else the model's file, or a folder with it
    reference: Path | None = None  # of a scale, results to compare with; else ADM's statistics of ImageNet

    folder: Path | None = None  # holds the published files
    imagenet: Path | None = None
    vae: Path | None = None  # the tokenizer's file
    inception: Path | None = None
    other_inception: Path | None = None  # unpublished weights: scores are labelled and not compared
    reference_batch: Path | None = None  # ADM's images, for precision and recall
    precision_recall: bool = True

    size: str | None = None  # of a system: "l"
    variant: str | None = None  # of the preset's sampling settings
    randomness: Randomness | None = None
    labels: Literal["balanced", "random"] | None = None
    dtype: Dtype | None = None
    compiled: bool = False
    num_bootstrap: int | None = None  # resamples behind the interval of FID; 0 leaves it out

    def images_or(self, default: int) -> int:
        """Return the number of images, which must be enough for a Fréchet distance.

        Raises:
            UserError: fewer than two.
        """
        number = default if self.num_images is None else self.num_images
        if number < 2:
            raise UserError(f"A Fréchet distance needs at least 2 images, not {number}.")
        return number


def write_photographs(folder: Path) -> None:
    """Write the photographs as images of a class each: `folder/train/astronaut/astronaut.png`."""
    for name in PHOTOGRAPHS:
        path = folder / "train" / name / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(getattr(skimage.data, name)()).save(path)
