"""The options of a reproduction, and the photographs that stand-ins use in the place of ImageNet."""

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
    """How a target is reproduced. None means the target's own choice; `targets.USED_BY` lists who uses which option.

    `artifacts.resolve` looks for files that are not named.
    """

    num_images: int | None = None  # for each system at a scale and each model in table 3; the total in table 1
    seed: int = 0
    batch_size: int | None = None
    stand_in: bool = False  # test the path with drawn weights and few images; not a result

    data: str | None = None  # images that replace the scale's
    weights: Path | None = None  # a scale's folder of models, or a model's file or the folder with it
    reference: Path | None = None  # the results to compare a scale with, or ADM's statistics of ImageNet

    folder: Path | None = None  # the folder of published files
    imagenet: Path | None = None
    vae: Path | None = None  # the tokenizer's file
    inception: Path | None = None
    other_inception: Path | None = None  # other weights, whose scores are labelled and not compared
    reference_batch: Path | None = None  # ADM's images, for precision and recall
    precision_recall: bool = True

    size: str | None = None  # the size of a system, such as "l"
    variant: str | None = None  # the name of the preset's sampling settings
    randomness: Randomness | None = None
    labels: Literal["balanced", "random"] | None = None
    dtype: Dtype | None = None
    compiled: bool = False
    num_bootstrap: int | None = None  # resamples behind the interval of FID; 0 leaves it out

    def images_or(self, default: int) -> int:
        """Return the number of images, which must be enough for a Fréchet distance.

        Raises:
            UserError: there are fewer than two.
        """
        number = default if self.num_images is None else self.num_images
        if number < 2:
            raise UserError(f"A Fréchet distance needs at least 2 images, not {number}.")
        return number


def write_photographs(folder: Path) -> None:
    """Write each photograph as the only image of a class: `folder/train/astronaut/astronaut.png`."""
    for name in PHOTOGRAPHS:
        path = folder / "train" / name / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(getattr(skimage.data, name)()).save(path)
