"""Sets of images: folders and arrays, read one by one, and what is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scored_images import SIZE, array_file, folder_of, random_images, statistics_file

from tokenbridge.data.image_sets import ImageArray, ImageFiles, open_images
from tokenbridge.evaluation import evaluate as evaluation
from tokenbridge.evaluation.features import inception_features
from tokenbridge.evaluation.inception import Inception
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ("scored_images",)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    order=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    compressed=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_arrays_are_read_image_by_image(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], order: list[int], compressed: bool
) -> None:
    array = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    file = tmp_path_factory.mktemp("npz") / "samples.npz"
    (np.savez_compressed if compressed else np.savez)(file, array, mu=np.zeros(3))
    with patch.object(np, "load", side_effect=AssertionError("the whole array was read")):
        images = ImageArray(file)
        assert (len(images), images.size) == (shape[0], shape[1:])
        for index in [*range(len(images)), *(i % len(images) for i in order)]:
            assert torch.equal(images[index], torch.from_numpy(array[index]).permute(2, 0, 1))


def test_grey_images_and_halves_of_a_killed_run(tmp_path: Path) -> None:
    folder_of(tmp_path / "a", random_images(6, 2)[:, :1])
    (tmp_path / "a" / ".000002-abc.png").write_bytes(b"half")
    (tmp_path / "a" / "run.json").write_text("{}")
    images = ImageFiles(tmp_path)
    assert len(images) == 2
    assert images[0].shape == (3, SIZE, SIZE)
    assert torch.equal(images[0][0], images[0][2])


def mixed_sizes(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    Image.new("RGB", (16, 16)).save(path / "grid.png")
    return path


def not_an_image(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    (path / "notes.png").write_text("not an image")
    return path


def cut_png(path: Path) -> Path:
    folder_of(path, random_images(7, 2))
    file = path / "000001.png"
    file.write_bytes(file.read_bytes()[:200])
    return path


def only_text(path: Path) -> Path:
    path.mkdir()
    (path / "readme.txt").write_text("no images")
    return path


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def cut_file(path: Path) -> Path:
    file = array_file(path, np.zeros((4, 8, 8, 3), np.uint8))
    file.write_bytes(file.read_bytes()[:-100])
    return file


def damaged_file(path: Path) -> Path:
    """Change a pixel, so that the archive's checksum is wrong."""
    file = array_file(path, np.zeros((2, SIZE, SIZE, 3), np.uint8))
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("arr_0.npy").header_offset
    content = bytearray(file.read_bytes())
    content[start + 1000] = 1
    file.write_bytes(content)
    return file


def bare_name(path: Path) -> Path:
    """Write an array whose name in the archive lacks .npy."""
    file = path.with_suffix(".npz")
    content = io.BytesIO()
    np.save(content, np.zeros((2, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("arr_0", content.getvalue())
    return file


def claimed(path: Path, shape: tuple[int, ...], descr: object = "|u1", compressed: bool = False) -> Path:
    """Write an archive whose array claims a shape, with ten values in it."""
    file = path.with_suffix(".npz")
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": descr, "fortran_order": False, "shape": shape})
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("arr_0.npy", content.getvalue() + bytes(10))
    return file


def encrypted(path: Path) -> Path:
    """Set the bit that says that a member is encrypted."""
    file = array_file(path, np.zeros((2, 8, 8, 3), np.uint8))
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    file.write_bytes(content)
    return file


def pointer(path: Path) -> Path:
    file = path.with_suffix(".npz")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return file


def one_image(path: Path) -> Path:
    return folder_of(path, random_images(8, 1))


BAD_SAMPLES = [
    (lambda p: p / "absent", "neither a folder"),
    (empty, "no images.*nothing"),
    (only_text, r"no images.*readme\.txt"),
    (mixed_sizes, r"different sizes.*000000\.png is 32 x 32; grid\.png is 16 x 16"),
    (not_an_image, r"notes\.png is cut off or is not an image"),
    (cut_png, r"000001\.png cannot be read as an image"),
    (one_image, "holds 1 image"),
    (lambda p: array_file(p, np.zeros((4, 8, 8, 3), np.float32)), "uint8.*not float32"),
    (lambda p: array_file(p, np.zeros((4, 3, 8, 8), np.uint8)), r"uint8 \[N, H, W, 3\], not uint8 \[4, 3, 8, 8\]"),
    (lambda p: array_file(p, np.zeros((0, 8, 8, 3), np.uint8)), "uint8"),
    (lambda p: statistics_file(p.with_suffix(".npz")), "no images.*arr_0.*mu"),
    (cut_file, r"cannot be read as an \.npz file of images"),
    (damaged_file, "damaged"),
    (bare_name, r"holds no images.*this file has \[\]"),
    (
        lambda p: claimed(p, (10**13, 8, 8, 3)),
        r"is uint8 \[10000000000000, 8, 8, 3\], but 10 bytes of values are there",
    ),
    (lambda p: claimed(p, (10**13, 8, 8, 3), compressed=True), "10 bytes of values are there"),
    (lambda p: claimed(p, (2, 8, 8, 3), "|O"), "arr_0 of .* holds objects, which would be code"),
    (lambda p: claimed(p, (-1, 8, 8, 3)), "cannot be read as|must be uint8|bytes of values"),
    (encrypted, r"cannot be read as an \.npz file of images: RuntimeError"),
    (pointer, "is a pointer of Git LFS"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SAMPLES)
def test_bad_samples(make: Callable[[Path], Path], message: str, tmp_path: Path, inception: Inception) -> None:
    samples = make(tmp_path / "samples")
    with pytest.raises(ValueError, match=message) as caught:
        inception_features(evaluation.open_samples([samples], allow_few=True)[0], inception, cache=tmp_path)
    assert str(samples) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_what_is_scored_is_what_was_hashed(kind: str, tmp_path: Path, inception: Inception) -> None:
    """Images that are written to after their hash was taken are refused: their features would get the old hash."""

    def make(name: str, seed: int) -> Path:
        pixels = random_images(seed, 3)
        if kind == "folder":
            return folder_of(tmp_path / name, pixels)
        return array_file(tmp_path / name, pixels.permute(0, 2, 3, 1).numpy())

    path, other = make("samples", 0), make("other", 1)
    images = open_images(path)
    images[0]
    for file in other.iterdir() if other.is_dir() else [other]:
        file.replace(path / file.name if other.is_dir() else path)
    with pytest.raises(UserError, match="has changed since its hash was taken"):
        inception_features(images, inception, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.safetensors"))
