"""Latents cached on disk: what the generators train on, so that the autoencoder runs once per image.

The cache is a `datasets` Arrow table of the posterior's moments (mean and log-variance), and of the mirrored
image's, as main_cache.py of the official code keeps them: training still draws a fresh posterior sample each time.

Shape letters: C latent channels, h, w latent height and width.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokenbridge.data.images import pixels_to_images, to_pixels
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset


def cache_latents(
    autoencoder: Any,
    images: Dataset,
    folder: Path | str,
    *,
    image_size: int | None = None,
    channels: int = 3,
    with_mirrored: bool = True,
    batch_size: int = 64,
) -> Dataset:
    """Encode a data set once; return, and keep in `folder`, a table of moments and labels.

    Columns: `moments` float32 [2C, h, w], `moments_mirrored` likewise (if asked for), `label` (if there is one).
    A folder that exists already is loaded instead; it appears whole or not at all.

    Args:
        autoencoder: diffusers' AutoencoderKL (or another with a `latent_dist`).
        images: data set with the columns `image` and, optionally, `label`.
        folder: where the table lies.
        image_size: centre-crop to this size.
        channels: 1 or 3 image channels.
        with_mirrored: also encode the mirrored images (not for digits: a mirrored digit is none).
        batch_size: images encoded at a time.
    """
    from datasets import Array3D, Dataset, Features, Value

    folder = Path(folder)
    if not folder.exists():
        device = next(autoencoder.parameters()).device

        def rows(images: Dataset) -> Iterator[dict[str, Any]]:
            for batch in images.iter(batch_size):
                pixels = pixels_to_images(to_pixels(batch["image"], size=image_size, channels=channels)).to(device)
                columns = {"moments": _moments(autoencoder, pixels)}
                if with_mirrored:
                    columns["moments_mirrored"] = _moments(autoencoder, pixels.flip(-1))
                for i in range(len(pixels)):
                    row: dict[str, Any] = {name: value[i].numpy() for name, value in columns.items()}
                    if "label" in batch:
                        row["label"] = batch["label"][i]
                    yield row

        if not len(images):
            raise UserError("There are no images to encode.")
        first = next(rows(images.select([0])))
        features = Features(
            {
                name: Value("int64") if name == "label" else Array3D(value.shape, "float32")
                for name, value in first.items()
            }
        )
        with tempfile.TemporaryDirectory() as cache, replacing_folder(folder) as temporary:
            table = Dataset.from_generator(rows, gen_kwargs={"images": images}, features=features, cache_dir=cache)
            table.save_to_disk(str(temporary))
    return Dataset.load_from_disk(str(folder)).with_format("torch")


@torch.inference_mode()
def _moments(autoencoder: Any, images: torch.Tensor) -> torch.Tensor:
    return autoencoder.encode(images).latent_dist.parameters.float().cpu()
