"""Images in memory: ADM's crop, uint8 pixels, and floats in [-1, 1]; `sources.py` reads images.

Shape letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenbridge.data.decode import to_8_bits
from tokenbridge.utils.errors import UnusableImageError, UserError

MODES = {1: "L", 3: "RGB"}
"""Pillow's name of images by their channels."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centre square at `size` pixels by ADM's rule (guided-diffusion, image_datasets.py).

    The image is halved with a box filter while its shorter side is at least twice the size. A bicubic filter then
    scales the shorter side to the size, and the centre is cropped. An image that has the size already is not changed.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(images: Iterable[Image.Image], *, size: int | None = None, channels: int = 3) -> Tensor:
    """Turn PIL images into uint8 pixels [B, C, H, W], centre-cropped at `size` pixels if a size is given.

    Raises:
        UserError: there are no images, they have different sizes and no size is given, or see `decode.to_8_bits`.
    """
    # Before the crop (as in ADM): palettes cannot be averaged.
    converted = [to_8_bits(image).convert(MODES[channels]) for image in images]
    if not converted:
        raise UserError("There are no images to convert.")
    if size is not None:
        converted = [centre_crop(image, size) for image in converted]
    check_sizes({image.size for image in converted})
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in converted]))
    return pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()


def check_sizes(sizes: set[tuple[int, int]]) -> None:
    """Refuse images of several sizes (W, H)."""
    if len(sizes) > 1:
        raise UserError(f"The images have different sizes {sorted(sizes)[:4]}; give one size to crop them to.")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Turn uint8 pixels [B, C, H, W] into PIL images, which are RGB, or grey if C is 1."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def pixels_to_images(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to float images in [-1, 1], which all models take and return."""
    return pixels.float() / 127.5 - 1.0


def bounded(images: Tensor) -> Tensor:
    """Clamp images to [-1, 1] and turn infinity into NaN, which `finite` then refuses, where a clamp makes it white."""
    return torch.where(images.isfinite(), images.clamp(-1, 1), torch.nan)


def finite(images: Tensor) -> Tensor:
    """Return images as they are.

    Raises:
        UnusableImageError: a value is NaN or infinite; as a pixel it would be black or white.
    """
    if not bool(images.isfinite().all()):
        raise UnusableImageError(
            "Images have NaN or infinite values, so the weights are damaged or need a higher precision."
        )
    return images


# Three rules turn images into 8 bits. The rule affects the scores of an evaluation, so each rule is a function.


def images_to_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels: clamp, and round to the nearest value (halves to even).

    MAR's and TokenBridge's evaluations have this rule (engine_mar.py, `evaluate`). It is the default here.
    """
    return ((finite(images).float() + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)


def llamagen_pixels(images: Tensor) -> Tensor:
    """Map float images x in [-1, 1] to uint8 pixels by LlamaGen's rule: clamp 127.5 x + 128, then truncate.

    This rounds to the nearest value, and halves up (autoregressive/sample/sample_c2i_ddp.py).
    """
    return (127.5 * finite(images) + 128.0).clamp(0, 255).to(torch.uint8)


def truncated_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels by truncation, the rule of torchvision's ToPILImage.

    TokenBridge's reconstruction.py (`save_image`) truncates in this way, although its sampler rounds.
    """
    return ((finite(images) + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
