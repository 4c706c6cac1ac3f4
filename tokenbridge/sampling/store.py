"""The images of a run on the disk: PNG files, or one .npz in ADM's format.

Shape letters: N images of the run, n images that are read, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenbridge.data.pictures import save_images
from tokenbridge.sampling.config import RunConfig
from tokenbridge.utils.files import replacing


def read_first_images(samples: Path, num_images: int) -> Tensor:
    """Return the first images of an .npz, uint8 [n, C, H, W], without reading the others.

    50,000 images do not fit into the memory of many machines.
    """
    with zipfile.ZipFile(samples) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        shape = (min(num_images, shape[0]), *shape[1:])
        pixels = np.frombuffer(bytearray(file.read(math.prod(shape) * dtype.itemsize)), dtype).reshape(shape)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


class PngFolder:
    """Images as PNG files in a folder."""

    def __init__(self, folder: Path, config: RunConfig, name: str | None) -> None:
        self.samples = self.pieces = folder / (name or "images")
        self.config = config

    def present(self) -> set[int]:
        """Return the numbers of the finished images."""
        names = (path.name for path in self.samples.glob("*.png"))
        return {int(name[:-4]) for name in names if re.fullmatch(r"\d{6,}\.png", name)}

    def write(self, number: int, pixels: Tensor, present: set[int]) -> None:
        """Write the images of a batch, except those that exist already."""
        rows = [row for row, index in enumerate(self.config.batch(number)) if index not in present]
        save_images(self.samples, pixels[rows], [self.config.batch(number)[row] for row in rows])

    def finish(self, labels: NDArray[Any] | None) -> None:
        """Do nothing, because the folder already is the result."""


class Npz:
    """Images as one .npz in ADM's format, which is assembled from one part for every batch."""

    def __init__(self, folder: Path, config: RunConfig, name: str | None) -> None:
        self.samples = folder / f"{name or 'samples'}.npz"
        self.pieces = folder / "parts"
        self.config = config

    def _part(self, number: int) -> Path:
        return self.pieces / f"{number:06d}.npy"

    def present(self) -> set[int]:
        """Return the numbers of the finished images."""
        if self.samples.exists():
            return set(range(self.config.num_images))
        done = (number for number in range(self.config.num_batches) if self._part(number).exists())
        return {index for number in done for index in self.config.batch(number)}

    def write(self, number: int, pixels: Tensor, present: set[int]) -> None:
        """Write the part of a batch."""
        pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()  # [B, H, W, 3]
        content = io.BytesIO()  # if numpy itself wrote the file, the error of a full disk would have no errno
        np.save(content, pixels.numpy())
        with replacing(self._part(number)) as temporary:
            temporary.write_bytes(content.getbuffer())

    def finish(self, labels: NDArray[Any] | None) -> None:
        """Assemble the parts, reading one at a time, and remove them."""
        paths = [self._part(number) for number in range(self.config.num_batches)]
        if not self.samples.exists():
            header = np.lib.format.header_data_from_array_1_0(np.load(paths[0], mmap_mode="r"))
            header["shape"] = (self.config.num_images, *header["shape"][1:])
            with replacing(self.samples) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                # A memory map of all images would need their size on the disk once more, and on a full disk the process
                # would be killed by a signal.
                with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for path in paths:
                        file.write(np.load(path).data)
                if labels is not None:
                    with archive.open("arr_1.npy", "w") as file:
                        np.lib.format.write_array(file, labels)
        remove(paths)
        if self.pieces.exists():
            self.pieces.rmdir()


STORES: dict[str, type[PngFolder] | type[Npz]] = {"png": PngFolder, "npz": Npz}


def remove(paths: Iterable[Path]) -> None:
    """Remove files, some of which may be missing."""
    for path in list(paths):
        path.unlink(missing_ok=True)
