"""The workbench: the models and images that every table of a small scale needs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.configs.scales import find_model_folder
from tokenbridge.data.sources import labels_of, load_images, pixels_of
from tokenbridge.sampling.load import ModelSampler, scale_model
from tokenbridge.tokenizers.base import LatentTokenizer, VQTokenizer
from tokenbridge.training.train import how_to_train, load
from tokenbridge.utils.devices import best_device
from tokenbridge.utils.errors import MissingFileError, UserError
from tokenbridge.utils.provenance import hash_of_dataset
from tokenbridge.weights.diffusers import WEIGHTS_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenbridge.configs.schema import Scale
    from tokenbridge.evaluation.classifier import Classifier


MAIN_SYSTEM = "tokenbridge-64"


@dataclass(frozen=True)
class Workbench:
    """The models, the images and the classifier of a scale."""

    scale: Scale
    weights: Path
    classifier: Classifier
    train_pixels: Tensor  # uint8 [N, C, H, W]
    test_pixels: Tensor
    test_labels: Tensor
    device: torch.device

    @property
    def extractor(self) -> str:
        """The name of the feature extractor, which scores carry."""
        return self.scale.extractor

    def model(self, name: str) -> Any:
        """Load a model of the scale.

        Raises:
            MissingFileError: it has no weights.
        """
        return load(self.scale, name, self.weights).to(self.device)

    def sampler(self, name: str) -> ModelSampler:
        """Load a generator of the scale with its tokenizer.

        Raises:
            MissingFileError: one of the two has no weights.
        """
        return scale_model(self.scale, self.scale.recipe(name), self.weights).load(self.device)

    @functools.cached_property
    def latents(self) -> LatentTokenizer:
        """The autoencoder with continuous latents."""
        return LatentTokenizer(self.model("vae"))

    @functools.cached_property
    def vq(self) -> VQTokenizer:
        """The VQ autoencoder."""
        return VQTokenizer(self.model("vq"))


def hashes_of_models(read: Mapping[Path, str], scale: Scale, weights: Path | str) -> dict[str, str]:
    """Return, by MODEL/FILE, the hashes of those files of the scale's models that were read (`hashed.recording`)."""
    folders = {find_model_folder(scale, recipe.name, weights) for recipe in scale.recipes}
    return {f"{p.parent.name}/{p.name}": sha256 for p, sha256 in read.items() if p.parent in folders}


def hashes_of_images(scale: Scale) -> dict[str, str]:
    """Return, by DATA/SPLIT, the hashes of the scale's images."""
    return {f"{scale.data}/{split}": hash_of_dataset(load_images(scale.data, split)) for split in ("train", "test")}


def open_workbench(scale: Scale, weights: Path | str) -> Workbench:
    """Load the classifier and the images of a scale.

    Raises:
        MissingFileError: the weights of the classifier are missing.
        UserError: the images are missing, or the test images are the training images.
    """
    weights = Path(weights)
    if not any((weights / recipe.name / WEIGHTS_FILE).is_file() for recipe in scale.recipes):
        # Shipped tokenizers stand in for those that a folder lacks, but not for a folder that is another one.
        raise MissingFileError(
            f"No model of the scale {scale.name} is in {weights}. {how_to_train(scale, '', weights)}."
        )
    device = best_device()
    classifier = load(scale, "classifier", weights).to(device)
    train, test = (load_images(scale.data, split) for split in ("train", "test"))
    train_pixels, test_pixels = (pixels_of(d, size=scale.image_size, channels=scale.channels) for d in (train, test))
    if torch.equal(train_pixels, test_pixels):
        raise UserError(
            f"{scale.data!r} gives the same images as training and as test set. Of a folder, the images in train/ and "
            "in test/ are those sets."
        )
    return Workbench(scale, weights, classifier, train_pixels, test_pixels, labels_of(test), device)
