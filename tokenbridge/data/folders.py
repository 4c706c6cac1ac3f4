"""Which images a folder holds: one rule for every command.

The images of a folder are all files in it and in its sub-folders, at any depth, whose name has a suffix of
`IMAGE_SUFFIXES` in any case, or whose content begins as a PNG, JPEG, WebP, GIF or TIFF does. Their order is that of
their paths. Links to files and folders are followed. Names that begin with a dot, which killed runs and systems leave,
and the folder `__MACOSX` are passed over, as are files of other kinds; how many is said in a sentence.

What cannot be read is an error with its name, never left out: a folder without permission, a link to nothing, a device
with an image's name, an image of a kind that is not read here.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tokenbridge.utils.errors import UserError
from tokenbridge.utils.text import plain

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
OTHER_IMAGE_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jxl", ".jp2", ".j2k", ".tga", ".psd", ".exr", ".hdr", ".dds"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),  # raw photographs, some of which begin as TIFF
)
PARQUET = ".parquet"
NUM_NAMED = 6  # kinds of files that were passed over

_BEGINNINGS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Found:
    """The files of a folder."""

    folder: Path
    images: list[Path]
    parquet: list[Path]
    others: Counter[str]  # suffixes of the files that were passed over
    some_others: list[str]  # names of a few of them

    @property
    def held(self) -> str:
        """What a folder holds that has no images, to follow "it holds"."""
        if not self.others:
            return "nothing"
        return f"only {', '.join(self.some_others)}" if self.some_others else f"only {self.others['hidden']} hidden"

    @property
    def passed_over(self) -> str:
        """What was passed over, to follow the number of images in a sentence; empty if nothing was."""
        if not self.others:
            return ""
        named = [f"{number:,} {plain(kind)}" for kind, number in self.others.most_common(NUM_NAMED)]
        rest = sum(self.others.values()) - sum(number for _, number in self.others.most_common(NUM_NAMED))
        return f"; passed over: {', '.join([*named, *([f'{rest:,} more'] if rest else [])])}"


def find_files(folder: Path | str) -> Found:
    """List the images and Parquet files of a folder and its sub-folders, in the order of their paths.

    Raises:
        UserError: something in the folder cannot be read (see the module).
    """
    root = Path(folder)
    images, parquet, others, some_others = [], [], Counter[str](), list[str]()
    waiting: list[tuple[Path, frozenset[str]]] = [(root, frozenset())]
    while waiting:
        inner, above = waiting.pop()
        try:
            real = os.path.realpath(inner)
            if real in above:
                raise UserError(f"{inner} is a link to a folder that it lies in.")
            with os.scandir(inner) as scanned:
                entries = list(scanned)
            for entry in entries:
                path = inner / entry.name
                suffix = path.suffix.lower()
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    others["hidden"] += 1
                elif entry.is_dir():
                    waiting.append((path, above | {real}))
                elif suffix in OTHER_IMAGE_SUFFIXES:
                    raise UserError(
                        f"{path} is an image of a kind that is not read. Convert it to PNG, or take it out of the "
                        "folder."
                    )
                elif entry.is_file():
                    if suffix in IMAGE_SUFFIXES or (suffix != PARQUET and _begins_as_image(path)):
                        images.append(path)
                    elif suffix == PARQUET:
                        parquet.append(path)
                    else:
                        others[suffix or "without suffix"] += 1
                        some_others = sorted([*some_others, entry.name])[:NUM_NAMED]
                elif entry.is_symlink() and not path.exists():
                    raise UserError(f"{path} is a link to nothing.")
                elif suffix in IMAGE_SUFFIXES:
                    raise UserError(f"{path} is no regular file.")
                else:
                    others["no regular file"] += 1
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{error.filename or inner} cannot be read: {error.strerror}.") from error
    return Found(root, sorted(images, key=_parts), sorted(parquet, key=_parts), others, some_others)


def _parts(path: Path) -> tuple[str, ...]:
    return path.parts


def _begins_as_image(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(12)
    return start.startswith(_BEGINNINGS) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")
