"""Images encoded once: tables of latents' moments or of tokens, which the generators are trained on.

The table of latents is kept on the disk. It holds the posterior's moments (mean and log-variance), and those of the
mirrored image, as main_cache.py of the official code keeps them: training still draws a fresh posterior sample each
time.

Shape letters: B batch, C latent channels, h, w latent height and width, H, W height and width of images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.data.images import pixels_to_images, to_pixels
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing_folder

if TYPE_CHECKING:
    from collections.abc import Callable

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
        autoencoder: diffusers' AutoencoderKL, or another whose `encode` returns a `latent_dist`.
        images: data set with the columns `image` and, optionally, `label`.
        folder: where the table lies.
        image_size: centre-crop to this size.
        channels: 1 or 3 image channels.
        with_mirrored: also encode the mirrored images (not for digits, whose mirror images are no digits).
        batch_size: images encoded at a time.
    """
    from datasets import Array3D, Dataset

    folder = Path(folder)
    if not folder.exists():
        device = next(autoencoder.parameters()).device

        @torch.inference_mode()
        def encode(batch: Tensor) -> Tensor:
            return autoencoder.encode(batch.to(device)).latent_dist.parameters.float()

        if not len(images):
            raise UserError("There are no images to encode.")
        first = pixels_to_images(to_pixels(images[:1]["image"], size=image_size, channels=channels))
        with tempfile.TemporaryDirectory() as cache, replacing_folder(folder) as temporary:
            table = encode_images(
                images,
                encode,
                "moments",
                Array3D(tuple(encode(first).shape[1:]), "float32"),
                image_size=image_size,
                channels=channels,
                with_mirrored=with_mirrored,
                batch_size=batch_size,
                file=Path(cache) / "moments.arrow",
            )
            table.save_to_disk(str(temporary))
    return Dataset.load_from_disk(str(folder)).with_format("torch")


def encode_images(
    images: Dataset,
    encode: Callable[[Tensor], Tensor],
    column: str,
    feature: Any,
    *,
    image_size: int | None,
    channels: int,
    with_mirrored: bool,
    batch_size: int = 64,
    file: Path | None = None,
) -> Dataset:
    """Return a table of the encoded images, in their order.

    Columns: `column`, `{column}_mirrored` of the mirrored images (if asked for), and `label` (if there is one).

    Args:
        images: data set with the columns `image` and, optionally, `label`.
        encode: takes a batch of images [B, channels, H, W] in [-1, 1] to one value each.
        column: name of the values.
        feature: type of the values, of the `datasets` library.
        image_size: centre-crop to this size.
        channels: 1 or 3 image channels.
        with_mirrored: also encode the mirrored images.
        batch_size: images encoded at a time.
        file: where the table lies; None keeps it in memory.
    """
    from datasets import Features, Value

    def encode_batch(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = pixels_to_images(to_pixels(batch["image"], size=image_size, channels=channels))
        values = {column: encode(pixels).cpu().numpy()}
        if with_mirrored:
            values[f"{column}_mirrored"] = encode(pixels.flip(-1)).cpu().numpy()
        return {**values, "label": batch["label"]} if "label" in batch else values

    features = {column: feature} | ({f"{column}_mirrored": feature} if with_mirrored else {})
    if "label" in images.column_names:
        features["label"] = Value("int64")
    return images.map(
        encode_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=images.column_names,
        features=Features(features),
        keep_in_memory=file is None,
        cache_file_name=None if file is None else str(file),
        load_from_cache_file=False,
        new_fingerprint=column,  # or else the autoencoder would be pickled and hashed
        desc="encode images",
    )
