"""The images of a run on the disk: PNG files, or one .npz in ADM's format.

Shape letters: N images of the run, n images that are read, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import io
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokenbridge.data.folders import IMAGE_SUFFIXES
from tokenbridge.data.pictures import save_images
from tokenbridge.sampling.config import RunConfig
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import replacing

ARRAY = "arr_0.npy"
NAME = re.compile(r"(\d{6,})\.png")
PART = re.compile(r"(\d{6,})-(\d{6,})\.npy")


def read_first_images(samples: Path, num_images: int) -> Tensor:
    """Return the first images of an .npz, uint8 [n, C, H, W], without reading the others.

    50,000 images do not fit into the memory of many machines.
    """
    with _array(samples) as (file, shape):
        shape = (min(num_images, shape[0]), *shape[1:])
        pixels = np.frombuffer(bytearray(file.read(math.prod(shape))), np.uint8).reshape(shape)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@contextmanager
def _array(samples: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Yield the images of an .npz of ours as an open file after its header, and their shape."""
    with zipfile.ZipFile(samples) as archive, archive.open(ARRAY) as file:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or by_columns or len(shape) != 4:
            raise UserError(f"{samples} holds {dtype} {list(shape)}, not images of a run.")
        yield file, shape


class PngFolder:
    """Images as PNG files in a folder.

    Args:
        folder: of the run.
        config: of the run.
        name: the name of the folder of images.
        shape: (C, H, W) of an image.
    """

    def __init__(self, folder: Path, config: RunConfig, name: str | None, shape: tuple[int, int, int]) -> None:
        self.samples = self.pieces = folder / (name or "images")
        self.config = config
        self.mode, self.size = {1: "L", 3: "RGB"}[shape[0]], (shape[2], shape[1])

    def inspect(self) -> tuple[set[int], int]:
        """Open what is there; return the numbers of the images that are whole, and the number of damaged files.

        Raises:
            UserError: an image is there that the run did not make.
        """
        numbers, strange = self._listed()
        if strange:
            raise UserError(_not_of_the_run(self.samples, strange, self.config.num_images))
        with ThreadPoolExecutor() as pool:
            whole = {number for number, good in zip(numbers, pool.map(self._opens, numbers), strict=True) if good}
        return whole, len(numbers) - len(whole)

    def count(self) -> int:
        """Return how many images are there, by their names."""
        return len(self._listed()[0])

    def own_files(self) -> list[Path]:
        """Return the files that the run has made.

        Raises:
            UserError: an image is there that the run did not make.
        """
        numbers, strange = self._listed()
        if strange:
            raise UserError(_not_of_the_run(self.samples, strange, self.config.num_images))
        return [self._path(number) for number in numbers]

    def write(self, number: int, pixels: Tensor, present: set[int]) -> None:
        """Write the images of a batch, except those that exist already."""
        rows = [row for row, index in enumerate(self.config.batch(number)) if index not in present]
        save_images(self.samples, pixels[rows], [self.config.batch(number)[row] for row in rows])

    def finish(self, labels: NDArray[Any] | None) -> None:
        """Do nothing, because the folder already is the result."""

    def _path(self, number: int) -> Path:
        return self.samples / f"{number:06d}.png"

    def _opens(self, number: int) -> bool:
        try:
            with Image.open(self._path(number)) as image:
                fits = (image.format, image.mode, image.size) == ("PNG", self.mode, self.size)
                image.verify()
                return fits
        except Exception:  # a damaged image raises anything
            return False

    def _listed(self) -> tuple[list[int], list[str]]:
        """Return the numbers of the files that have a name of the run's, and the names of other images."""
        numbers, strange = [], []
        for entry in os.scandir(self.samples) if self.samples.is_dir() else ():
            found = NAME.fullmatch(entry.name)
            number = int(found[1]) if found else -1
            if 0 <= number < self.config.num_images and entry.name == f"{number:06d}.png" and entry.is_file():
                numbers.append(number)
            elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith("."):
                strange.append(entry.name)
        return sorted(numbers), sorted(strange)


class Npz:
    """Images as one .npz in ADM's format, which is assembled from parts of consecutive images (see `PngFolder`).

    A finished .npz of fewer images is the beginning of a larger one.
    """

    def __init__(self, folder: Path, config: RunConfig, name: str | None, shape: tuple[int, int, int]) -> None:
        self.samples = folder / f"{name or 'samples'}.npz"
        self.pieces = folder / "parts"
        self.config = config
        self.shape = (shape[1], shape[2], 3)

    def inspect(self) -> tuple[set[int], int]:
        """Open what is there; return the numbers of the images that are whole, and the number of damaged files."""
        beginning, parts = self._beginning, self._parts()
        if beginning > self.config.num_images:
            raise UserError(
                f"{self.samples} holds {beginning:,} images, and {self.config.num_images:,} are asked for; ask for at "
                "least as many, or name another folder."
            )
        whole = {part for part, path in parts.items() if self._fits(part, path)}
        damaged = len(parts) - len(whole) + (self.samples.exists() and not beginning)
        for part in parts.keys() - whole:
            parts[part].unlink()  # the images are made anew, perhaps in parts of other names
        return {*range(beginning), *(index for part in whole for index in range(*part))}, damaged

    def count(self) -> int:
        """Return how many images are there, by names."""
        return len({*range(self._beginning), *(index for part in self._parts() for index in range(*part))})

    def own_files(self) -> list[Path]:
        """Return the files that the run has made."""
        return [*self._parts().values(), *([self.samples] if self.samples.exists() else [])]

    def write(self, number: int, pixels: Tensor, present: set[int]) -> None:
        """Write the images of a batch, except those that exist already, a part for each unbroken row of images."""
        pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()  # [B, H, W, 3]
        batch = self.config.batch(number)
        missing = [index for index in batch if index not in present]
        starts = [index for index in missing if index - 1 not in missing]
        stops = [index + 1 for index in missing if index + 1 not in missing]
        for start, stop in zip(starts, stops, strict=True):
            content = io.BytesIO()  # if numpy itself wrote the file, the error of a full disk would have no errno
            np.save(content, pixels[start - batch.start : stop - batch.start].numpy())
            with replacing(self.pieces / f"{start:06d}-{stop:06d}.npy") as temporary:
                temporary.write_bytes(content.getbuffer())

    def finish(self, labels: NDArray[Any] | None) -> None:
        """Assemble the parts, reading one at a time, and remove them."""
        beginning, parts = self._beginning, self._parts()
        if beginning < self.config.num_images:
            header = np.lib.format.header_data_from_array_1_0(np.empty((0, *self.shape), np.uint8))
            header["shape"] = (self.config.num_images, *self.shape)
            with replacing(self.samples) as temporary, zipfile.ZipFile(temporary, "w") as archive:
                # A memory map of all images would need their size on the disk once more, and on a full disk the process
                # would be killed by a signal.
                with archive.open(ARRAY, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    if beginning:
                        with _array(self.samples) as (before, _):
                            shutil.copyfileobj(before, file)
                    done = beginning
                    for (start, stop), path in sorted(parts.items()):
                        if stop <= beginning:  # a killed process has assembled it already
                            continue
                        assert start == done, f"images {done} to {start} are missing"
                        file.write(np.load(path).data)
                        done = stop
                if labels is not None:
                    with archive.open("arr_1.npy", "w") as file:
                        np.lib.format.write_array(file, labels)
        remove(parts.values())
        if self.pieces.exists() and not any(self.pieces.iterdir()):
            self.pieces.rmdir()

    @functools.cached_property
    def _beginning(self) -> int:
        """Return how many images the .npz holds; 0 if there is none or it does not open."""
        try:
            with _array(self.samples) as (file, shape):
                length = sum(len(block) for block in iter(lambda: file.read(2**24), b""))  # which compares checksums
                return shape[0] if shape[1:] == self.shape and length == math.prod(shape) else 0
        except Exception:  # a damaged archive raises anything
            return 0

    def _parts(self) -> dict[tuple[int, int], Path]:
        """Return the parts by their first image and the one after their last."""
        found = {}
        for path in self.pieces.glob("*.npy"):
            if (match := PART.fullmatch(path.name)) and path.is_file():
                start, stop = int(match[1]), int(match[2])
                if start < stop <= self.config.num_images and path.name == f"{start:06d}-{stop:06d}.npy":
                    found[start, stop] = path
                else:
                    raise UserError(_not_of_the_run(self.pieces, [path.name], self.config.num_images))
        return found

    def _fits(self, part: tuple[int, int], path: Path) -> bool:
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # which compares the shape with the length
            return bool(pixels.dtype == np.uint8 and pixels.shape == (part[1] - part[0], *self.shape))
        except Exception:  # a damaged array raises anything
            return False


STORES: dict[str, type[PngFolder] | type[Npz]] = {"png": PngFolder, "npz": Npz}


def _not_of_the_run(folder: Path, names: list[str], num_images: int) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    which = "is not one" if len(names) == 1 else "are not some"
    return (
        f"{folder} holds {names[0]}{more}, which {which} of the {num_images:,} images of the run. Move it away, or "
        "ask for as many images as there are, because whoever counts the images would count it."
    )


def remove(paths: Iterable[Path]) -> None:
    """Remove files, some of which may be missing."""
    for path in list(paths):
        path.unlink(missing_ok=True)
