"""Arrays in .npz files of others: what the header says is checked before a value is read.

An .npz is a zip archive, whose members may unfold to anything: only as many bytes are read as the caller asks for.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from tokenbridge.data.decode import POINTER
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.hashed import opened


@dataclass(frozen=True)
class Header:
    """What an array's header says, and where its values begin."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype[Any]
    start: int  # bytes before the first value

    @property
    def num_bytes(self) -> int:
        """The size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Archive:
    """The arrays of an .npz file that is open."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        self.names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]

    def open(self, name: str) -> tuple[Header, IO[bytes]]:
        """Return the header of an array and its file, which stands at the first value.

        Raises:
            UserError: the file ends before its values do, or holds objects, which would be code.
        """
        file = self.archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        header = Header(*read(file), file.tell())
        if header.dtype.hasobject:
            raise UserError(f"{name} of {self.path} holds objects, which would be code.")
        held = self.archive.getinfo(f"{name}.npy").file_size - header.start
        if held != header.num_bytes:
            raise UserError(f"{name} of {self.path} is {header}, but {held:,} bytes of values are there.")
        return header, file

    def read(self, name: str, limit: int) -> np.ndarray:
        """Return an array of at most `limit` bytes."""
        header, file = self.open(name)
        if header.num_bytes > limit:
            raise UserError(f"{name} of {self.path} is {header}, which is larger than what is read ({limit:,} bytes).")
        content = file.read(header.num_bytes + 1)  # to the end, where the checksum is compared
        values = np.frombuffer(bytearray(content), header.dtype)
        return values.reshape(header.shape, order="F" if header.fortran_order else "C")


@contextmanager
def open_archive(path: Path | str, what: str) -> Iterator[Archive]:
    """Open an .npz file of somebody else. Its hash is recorded, see `utils.hashed`.

    Raises:
        UserError: also for whatever goes wrong within the block; it names the file, and `what` it should be.
    """
    path = Path(path)
    with reading(path, what), opened(path) as fixed:
        with fixed.open("rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise UserError(f"{path} is a pointer of Git LFS: its content was not downloaded (`git lfs pull`).")
        with zipfile.ZipFile(fixed) as archive:
            yield Archive(path, archive)
