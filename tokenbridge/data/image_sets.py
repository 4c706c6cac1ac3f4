"""Sets of images that are read one by one, because 50,000 images of 256 pixels take 10 GB.

A set is a folder of images, an .npz in the format of ADM's evaluation (guided-diffusion, evaluations/README.md:
`arr_0`, uint8 [N, H, W, 3]), or a data set with a centre crop. Each set is a torch data set of uint8 pixels [3, H, W].

Shape letters: N images, H height, W width.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenbridge.data.images import IMAGE_SUFFIXES, decoding_errors, to_pixels
from tokenbridge.utils.console import track
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of

if TYPE_CHECKING:
    import datasets

DAMAGED = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
"""The exceptions that reading a damaged .npz may raise."""


class ImageFiles(Dataset[Tensor]):
    """The images of a folder and its sub-folders in the order of their paths; grey images become RGB.

    Files whose name starts with a dot are ignored, because a killed run may leave such incomplete files behind.

    Raises:
        UserError: the folder has no images, a file is damaged or not an image, or images have different sizes.
    """

    def __init__(self, folder: Path | str) -> None:
        self.name = str(folder)
        root = Path(folder)
        visible = [f for f in sorted(root.rglob("*")) if f.is_file() and _is_visible(f.relative_to(root))]
        self.files = [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            held = f"only {', '.join(f.name for f in visible[:3])}" if visible else "nothing"
            raise UserError(f"There are no images ({', '.join(IMAGE_SUFFIXES)}) in {folder}: it holds {held}.")
        digest = hashlib.sha256()
        sizes: dict[tuple[int, int], Path] = {}
        for file in track(self.files, "check"):
            content = file.read_bytes()
            digest.update(hashlib.sha256(content).digest())
            try:
                with Image.open(io.BytesIO(content)) as image:
                    image.verify()  # for a PNG, the checksum of every chunk is verified, without decoding
            except (OSError, SyntaxError) as error:
                raise UserError(f"{file} is cut off or is not an image: {error}.") from error
            sizes.setdefault((image.height, image.width), file)
        if len(sizes) > 1:
            found = "; ".join(f"{file.name} is {h} x {w}" for (h, w), file in list(sizes.items())[:3])
            raise UserError(f"The images in {folder} have different sizes: {found}.")
        self.size = next(iter(sizes))  # (H, W)
        self.sha256 = digest.hexdigest()

    @property
    def lossy(self) -> bool:
        """Whether some images may have been compressed with loss."""
        return any(file.suffix.lower() in (".jpg", ".jpeg", ".webp") for file in self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with Image.open(self.files[index]) as image:
                return to_pixels([image])[0]
        except OSError as error:
            raise UserError(f"{self.files[index]} cannot be decoded: {error}.") from error


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
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                if "arr_0" in names:
                    with archive.open("arr_0.npy") as file:
                        shape, fortran_order, dtype = _read_header(file)
                        self._start = file.tell()
        except DAMAGED as error:
            raise UserError(f"{path} is cut off or is not an .npz file: {error}.") from error
        if "arr_0" not in names:
            raise UserError(f"{path} holds no images: in ADM's format they are arr_0, but this file has {names}.")
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran_order or shape[0] < 1:
            raise UserError(f"arr_0 of {path} must be uint8 [N, H, W, 3], not {dtype} {list(shape)}.")
        self._num_images, *self._image_shape = shape
        self.size = (shape[1], shape[2])
        self.sha256 = sha256_of(self.path)

    def __len__(self) -> int:
        return int(self._num_images)

    def __getitem__(self, index: int) -> Tensor:
        num_bytes = int(np.prod(self._image_shape))
        try:
            if self._file is None:
                self._file = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  (it stays open between images)
            self._file.seek(self._start + index * num_bytes)  # costs nothing if images are read in order
            content = self._file.read(num_bytes)
        except DAMAGED as error:
            raise UserError(f"{self.path} is damaged at image {index}: {error}.") from error
        if len(content) < num_bytes:
            raise UserError(f"{self.path} is cut off at image {index} of {len(self)}.")
        pixels = np.frombuffer(content, np.uint8).reshape(self._image_shape)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class CroppedImages(Dataset[Tensor]):
    """The images of a data set (`images.load_images`) as RGB, with ADM's centre crop at `size` pixels."""

    def __init__(self, dataset: datasets.Dataset, size: int) -> None:
        self.dataset = dataset
        self.size = (size, size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        with decoding_errors():
            image = self.dataset[index]["image"]
        return to_pixels([image], size=self.size[0])[0]


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


def _is_visible(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts)


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and type of an .npy file, and leave the file at its first value."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)
