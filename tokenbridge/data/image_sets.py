"""Sets of images that are read one by one, because 50,000 images of 256 pixels take 10 GB.

A set is a folder of images, an .npz in the format of ADM's evaluation (guided-diffusion, evaluations/README.md:
`arr_0`, uint8 [N, H, W, 3]), or a data set with a centre crop. Each set is a torch data set of uint8 pixels [3, H, W].

Shape letters: N images, H height, W width.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenbridge.data.arrays import open_archive
from tokenbridge.data.decode import MAX_BYTES, MAX_PIXELS, decode_image, open_image, to_8_bits
from tokenbridge.data.folders import IMAGE_SUFFIXES, find_files
from tokenbridge.data.images import to_pixels
from tokenbridge.data.sources import cropped
from tokenbridge.utils.console import log, track
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.files import read_bytes, sha256_of
from tokenbridge.utils.hashed import state_of
from tokenbridge.utils.text import plain

if TYPE_CHECKING:
    import datasets

MAX_IMAGES = 10**7


class ImageFiles(Dataset[Tensor]):
    """The images of a folder (`folders.py`), all of one size; grey images become RGB.

    How many there are, and what was passed over, is said on stderr.

    Raises:
        UserError: the folder has no images, a file cannot be read (`decode.py`), or images have different sizes.
    """

    def __init__(self, folder: Path | str) -> None:
        self.name = str(folder)
        found = find_files(folder)
        self.files = found.images
        if not self.files:
            held = f"{len(found.parquet)} Parquet files" if found.parquet else found.held
            raise UserError(f"There are no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}: it holds {held}.")
        self._hashes: list[bytes] = []
        sizes: dict[tuple[int, int], Path] = {}
        for file in track(self.files, "check"):
            with reading(file, "an image"):
                content = read_bytes(file, MAX_BYTES)
            self._hashes.append(hashlib.sha256(content).digest())
            with open_image(content, str(file)) as image, reading(file, "an image"):
                sizes.setdefault((image.height, image.width), file)
                if image.has_transparency_data:
                    to_8_bits(image, str(file))  # whether it is opaque is seen only in the pixels
                else:
                    image.verify()  # for a PNG, the checksum of every chunk is verified, without decoding
        if len(sizes) > 1:
            several = "; ".join(f"{file.name} is {h} x {w}" for (h, w), file in list(sizes.items())[:3])
            raise UserError(f"The images in {folder} have different sizes: {several}.")
        self.size = next(iter(sizes))  # (H, W)
        self.sha256 = hashlib.sha256(b"".join(self._hashes)).hexdigest()
        log(plain(f"{len(self):,} image{'s' if len(self) > 1 else ''} in {folder}{found.passed_over}"))

    @property
    def lossy(self) -> bool:
        """Whether some images may have been compressed with loss."""
        return any(file.suffix.lower() not in LOSSLESS for file in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        with reading(file, "an image"):
            content = read_bytes(file, MAX_BYTES)
        if hashlib.sha256(content).digest() != self._hashes[index]:
            raise UserError(f"{file} has changed since its hash was taken; run the command again when nobody writes.")
        return to_pixels([decode_image(content, str(file))])[0]


LOSSLESS = (".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")


class ImageArray(Dataset[Tensor]):
    """The images of an .npz, its array `arr_0` (uint8 [N, H, W, 3]); only one image at a time is in memory.

    Reading is fast only in the order of the images.

    Raises:
        UserError: the file is damaged, or `arr_0` is missing or has another type or shape.
    """

    lossy = False

    def __init__(self, path: Path | str) -> None:
        self.name = str(path)
        self.path = Path(path)
        self._file: Any = None
        self._state = state_of(self.path) if self.path.is_file() else ()
        with open_archive(self.path, "an .npz file of images") as archive:
            if "arr_0" not in archive.names:
                raise UserError(
                    f"{path} holds no images: in ADM's format they are arr_0, but this file has {archive.names}."
                )
            header, _ = archive.open("arr_0")
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or header.fortran_order or 0 in shape:
            raise UserError(f"arr_0 of {path} must be uint8 [N, H, W, 3], not {header}.")
        if shape[0] > MAX_IMAGES or shape[1] * shape[2] > MAX_PIXELS:
            raise UserError(f"arr_0 of {path} is {header}: at most {MAX_IMAGES:,} images are read.")
        self._start = header.start
        self._num_images, *self._image_shape = shape
        self.size = (shape[1], shape[2])
        self.sha256 = sha256_of(self.path)
        log(plain(f"{len(self):,} image{'s' if len(self) > 1 else ''} in {path}"))

    def __len__(self) -> int:
        return int(self._num_images)

    def __getitem__(self, index: int) -> Tensor:
        num_bytes = int(np.prod(self._image_shape))
        with reading(self.path, f"an .npz file of images: it is damaged at image {index}"):
            if self._file is None:
                self._file = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  (it stays open between images)
            self._file.seek(self._start + index * num_bytes)  # costs nothing if images are read in order
            content = self._file.read(num_bytes)
        if state_of(self.path) != self._state:
            raise UserError(f"{self.path} has changed since its hash was taken; run the command again.")
        if len(content) < num_bytes:
            raise UserError(f"{self.path} is cut off at image {index} of {len(self)}.")
        pixels = np.frombuffer(content, np.uint8).reshape(self._image_shape)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class CroppedImages(Dataset[Tensor]):
    """The images of a data set (`sources.load_images`) as RGB, with ADM's centre crop at `size` pixels."""

    def __init__(self, dataset: datasets.Dataset, size: int) -> None:
        self.dataset = cropped(dataset, size, 3)
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return to_pixels([self.dataset[index]["image"]])[0]


ImageSet = ImageFiles | ImageArray


def open_images(path: Path | str) -> ImageSet:
    """Open a folder of images, or an .npz in ADM's format.

    Raises:
        UserError: `path` is neither of the two, or `ImageFiles` or `ImageArray` refuses it.
    """
    if Path(path).is_dir():
        return ImageFiles(path)
    if Path(path).is_file() and Path(path).suffix == ".npz":
        return ImageArray(path)
    raise UserError(f"{path} is neither a folder of images nor an .npz file.")
