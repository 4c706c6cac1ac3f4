"""Tables of encoded images, on which the generators are trained: the moments of latents, or tokens.

The table of latents is kept on the disk. Like main_cache.py of the official code, it holds the moments (mean and
log-variance) of the posteriors of images and mirrored images, so that training still draws a new posterior sample in
every step.

Shape letters: B batch, C latent channels, h, w latent height and width, H, W height and width of images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenbridge.data.images import pixels_to_images, to_pixels
from tokenbridge.data.sources import cropped
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import replacing_folder

FILES = ("dataset_info.json", "state.json", "data-*.arrow")

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
    """Return a table of the moments and labels of a data set; encode the images only if `folder` does not exist.

    The table has the columns `moments` (float32 [2C, h, w]), `moments_mirrored` if mirrored images are encoded, and
    `label` if the images have labels. It is written to `folder` atomically.

    Args:
        autoencoder: diffusers' AutoencoderKL, or another model whose `encode` returns a `latent_dist`.
        images: data set with the column `image` and, optionally, `label`.
        image_size: images are centre-cropped at this size, unless it is None.
        channels: 1 or 3 image channels.
        with_mirrored: encode mirrored images too (which is wrong for digits, because mirrored digits are not digits).
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
        first = pixels_to_images(to_pixels(cropped(images, image_size, channels)[:1]["image"], channels=channels))
        with tempfile.TemporaryDirectory() as cache, replacing_folder(folder, FILES) as temporary:
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
    with reading(folder, "a table of encoded images; remove it to encode them again"):
        table = Dataset.load_from_disk(str(folder)).with_format("torch")
        if len(table) != len(images):
            raise ValueError(f"it has {len(table)} rows for {len(images)} images")
        table[[0, len(table) - 1]]  # the rows of a file that was cut are found missing when they are read
    return table


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
    """Return a table of the encoded images, in the order of the images.

    The table has the columns `column`, `{column}_mirrored` if mirrored images are encoded, and `label` if the images
    have labels.

    Args:
        images: data set with the column `image` and, optionally, `label`.
        encode: a function from a batch of images [B, channels, H, W] in [-1, 1] to one value for each image.
        column: name of the column of values.
        feature: type of the values in the `datasets` library.
        image_size: images are centre-cropped at this size, unless it is None.
        channels: 1 or 3 image channels.
        with_mirrored: encode mirrored images too.
        file: the table is written to this file; None keeps it in memory.
    """
    from datasets import Features, Value

    def encode_batch(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = pixels_to_images(to_pixels(batch["image"], channels=channels))
        values = {column: encode(pixels).cpu().numpy()}
        if with_mirrored:
            values[f"{column}_mirrored"] = encode(pixels.flip(-1)).cpu().numpy()
        return {**values, "label": batch["label"]} if "label" in batch else values

    features = {column: feature} | ({f"{column}_mirrored": feature} if with_mirrored else {})
    if "label" in images.column_names:
        features["label"] = Value("int64")
    return cropped(images, image_size, channels).map(
        encode_batch,
        batched=True,
        batch_size=batch_size,
        remove_columns=images.column_names,
        features=Features(features),
        keep_in_memory=file is None,
        cache_file_name=None if file is None else str(file),
        load_from_cache_file=False,
        new_fingerprint=column,  # without it, datasets would pickle and hash the autoencoder
        desc="encode images",
    )
