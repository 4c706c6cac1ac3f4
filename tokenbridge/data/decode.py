"""One image file to 8-bit pixels: the rule by which every command reads images.

- The kind of a file is told by its content: PNG, JPEG, WebP, BMP, TIFF, GIF or PPM.
- Pixels are taken as they are stored. The orientation in a photograph's EXIF data and colour profiles are not applied,
  as in ADM's, torch-fidelity's and the official code. (A TIFF is turned by Pillow as its own header says.)
- Grey stays grey ("L"); all other colours become "RGB": palettes, CMYK, YCbCr.
- 16 bits become 8 by the high byte, which is what Pillow itself does with 16-bit colours. Whole numbers of other depths
  and floating-point values are refused, because nothing says which value is white.
- An alpha channel that is opaque everywhere is dropped. Any transparency is refused, because the colour behind it is
  not in the file.
- Animations and files of several pages are refused. Of a stereo photograph (MPO) the first picture is read.
- Files of more than `MAX_BYTES` and images of more than `MAX_PIXELS` are refused.

Whatever is wrong with an image is one `UserError` with its name.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # Pillow's names
MAX_PIXELS = 178_956_970  # 512 MiB of RGB, and Pillow's own limit
MAX_BYTES = 2**29
PIXELS_VERSION = 2  # raised when some file's pixels change; kept features are of one version
POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins in whose place Git LFS left a pointer

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # of TIFF
_WHITE_IS_ZERO = 0
_UNSIGNED = {1, 4}  # 4: undefined


def read_image(path: Path | str) -> Image.Image:
    """Return the image in a file as "L" or "RGB".

    Raises:
        UserError: the file is missing, damaged, too large, or not an image that the rule above covers.
    """
    with reading(path, "an image"):
        content = read_bytes(path, MAX_BYTES)
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """Return the image in the content of a file as "L" or "RGB"; `name` says in errors which image it is."""
    with open_image(content, name) as image:
        return to_8_bits(image, name)


def open_image(content: bytes, name: str) -> Image.Image:
    """Return an image whose header was read, and whose pixels are not yet decoded.

    Raises:
        UserError: see `read_image`, as far as a header tells.
    """
    if content.startswith(POINTER):
        raise UserError(f"{name} is a pointer of Git LFS: its content was not downloaded (`git lfs pull`).")
    if not content:
        raise UserError(f"{name} is empty.")
    with reading(name, "an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns from half of its limit on
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:  # its message speaks of a BytesIO
            raise UserError(f"{name} is cut off or is not an image ({', '.join(FORMATS)}).") from error
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read.")
        if image.format != "MPO" and getattr(image, "is_animated", False):
            raise UserError(f"{name} is an animation or has several pages. Save the one that is meant as an image.")
        _depth(image, name)
    return image


def to_8_bits(image: Image.Image, name: str = "An image") -> Image.Image:
    """Return an image of Pillow as "L" or "RGB", by the rule above."""
    with reading(name, "an image"):
        depth = _depth(image, name)
        if depth > 8:
            return Image.fromarray((np.asarray(image) >> (depth - 8)).astype(np.uint8))
        if image.mode in ("1", "L", "RGB") and "transparency" not in image.info:
            return image.convert("L" if image.mode == "1" else image.mode)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                raise UserError(
                    f"{name} has transparent pixels, and the colour behind them is not in the file. Save it on a "
                    "background, without transparency."
                )
        return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _depth(image: Image.Image, name: str) -> int:
    """Return the bits of one value, which are those of the file where Pillow decodes it to more than 8.

    Raises:
        UserError: the depth is not known, or the image has a transparency that Pillow does not scale with its values.
    """
    tags: Any = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    is_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")  # Pillow scales PPM
    unknown = image.mode in ("I", "F") and not is_16_bits
    if unknown or not set(tags.get(_SAMPLE_FORMAT, (1,))) <= _UNSIGNED:
        raise UserError(
            f"{name} has floating-point, signed or 32-bit values ({image.mode}), and nothing says which of them is "
            "white. Save it with 8 or 16 bits."
        )
    if is_16_bits and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise UserError(f"{name} has 16 bits of which 0 is white. Save it with black as 0.")
    transparent = image.info.get("transparency", ())
    if image.mode != "P" and (isinstance(transparent, int) or max(transparent, default=0) > 255):
        raise UserError(f"{name} names a value that is transparent. Save it without transparency.")
    return int(tags.get(_BITS_PER_SAMPLE, (16,))[0]) if is_16_bits else 8
