"""Reading images: any tree of any files gives what an independent reader finds, and bad files give one sentence."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tokenbridge.data import decode
from tokenbridge.data.image_sets import CroppedImages, ImageFiles
from tokenbridge.data.images import to_pixels
from tokenbridge.data.sources import labels_of, load_images, pixels_of
from tokenbridge.utils.errors import UserError

SIDE = 6
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


# ------------------------------------------------------------------------------------------- the law of the reader


def colours(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def opaque(mode: str, seed: int) -> Image.Image:
    image = Image.fromarray(colours(seed)).convert(mode)
    image.putalpha(255)
    return image


KINDS: dict[str, tuple[str, Callable[[int], Image.Image]]] = {
    "rgb": ("PNG", lambda seed: Image.fromarray(colours(seed))),
    "grey": ("PNG", lambda seed: Image.fromarray(colours(seed)[..., 0])),
    "bit": ("PNG", lambda seed: Image.fromarray(colours(seed)[..., 0] > 127)),
    "palette": ("PNG", lambda seed: Image.fromarray(colours(seed)).quantize(16)),
    "rgba": ("PNG", lambda seed: opaque("RGB", seed)),
    "la": ("PNG", lambda seed: opaque("L", seed)),
    "grey16": ("PNG", lambda seed: Image.fromarray(colours(seed).astype(np.uint16)[..., 0] * 256 + seed % 256)),
    "grey16-tiff": ("TIFF", lambda seed: Image.fromarray(colours(seed).astype(np.uint16)[..., 1] * 257)),
    "cmyk": ("JPEG", lambda seed: Image.fromarray(colours(seed)).convert("CMYK")),
    "jpeg": ("JPEG", lambda seed: Image.fromarray(colours(seed))),
    "bmp": ("BMP", lambda seed: Image.fromarray(colours(seed))),
    "gif": ("GIF", lambda seed: Image.fromarray(colours(seed)).quantize(8)),
    "ppm": ("PPM", lambda seed: Image.fromarray(colours(seed))),
    "webp": ("WEBP", lambda seed: Image.fromarray(colours(seed))),
    "turned": ("JPEG", lambda seed: Image.fromarray(colours(seed))),
}
SUFFIXES = {
    "PNG": (".png", ".PNG", "", ".dat"),
    "JPEG": (".jpg", ".JPEG", ".jpe", ".img"),
    "BMP": (".bmp", ".png"),
    "GIF": (".gif", ""),
    "PPM": (".ppm", ".pnm"),
    "TIFF": (".tif", ".TIFF"),
    "WEBP": (".webp", ".bin"),
}
NAMES = ("train", "test", "val", "dev", "a b", "[x]", "*", "?", "{1,2}", "ü", "%41", "-", "x.png", "0", "10", "2", "~")


@st.composite
def trees(draw: st.DrawFn) -> dict[str, str]:
    """Draw files: path below the folder (without suffix), and what kind of image each is, or "text" or "hidden"."""
    paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
    names = draw(st.lists(paths, min_size=1, max_size=8, unique=True))
    names = [name for name in names if not any(other.startswith(name + "/") for other in names)]
    return {name: draw(st.sampled_from([*KINDS, "text", "hidden"])) for name in names}


def write_tree(folder: Path, files: dict[str, str]) -> dict[Path, np.ndarray]:
    """Write a tree; return what an independent reader makes of each image: Pillow's values, and numpy alone."""
    expected: dict[Path, np.ndarray] = {}
    for number, (name, kind) in enumerate(sorted(files.items())):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "text":
            path.with_name(path.name + ".txt").write_text("P1 is no image")
        elif kind == "hidden":
            path.with_name(f".{path.name}.png").write_bytes(b"half")
        else:
            form, make = KINDS[kind]
            image = make(number)
            path = path.with_name(path.name + SUFFIXES[form][number % len(SUFFIXES[form])])
            options: dict[str, Any] = {"exif": oriented()} if kind == "turned" else {}
            image.save(path, format=form, **options)
            with Image.open(path) as read:
                if kind.startswith("grey16"):
                    values = (np.asarray(read).astype(np.uint32) // 256).astype(np.uint8)
                else:
                    values = np.asarray(read.convert("RGB"))
            expected[path] = np.stack([values] * 3, axis=-1) if values.ndim == 2 else values
    return expected


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def is_split(expected: dict[Path, np.ndarray], folder: Path) -> bool:
    parts = [path.relative_to(folder).parts for path in expected]
    return all(len(p) > 1 and p[0] in ("train", "test", "val", "validation") for p in parts)


@given(files=trees())
@settings(max_examples=60)
def test_any_tree_is_read_whole(tmp_path_factory: pytest.TempPathFactory, files: dict[str, str]) -> None:
    folder = tmp_path_factory.mktemp("tree")
    expected = write_tree(folder, files)
    if not expected:
        with pytest.raises(UserError, match="no images"):
            ImageFiles(folder)
        return
    pixels = torch.from_numpy(np.stack([expected[path] for path in sorted(expected, key=lambda p: p.parts)]))
    pixels = pixels.permute(0, 3, 1, 2)
    images = ImageFiles(folder)
    assert torch.equal(torch.stack([images[i] for i in range(len(images))]), pixels)
    if not is_split(expected, folder):
        for split in ("train", "test"):
            dataset = load_images(str(folder), split)
            assert torch.equal(pixels_of(dataset), pixels)
            classes = [path.relative_to(folder).parts[0] for path in sorted(expected, key=lambda p: p.parts)]
            if all(len(path.relative_to(folder).parts) > 1 for path in expected):
                assert [dataset.features["label"].names[i] for i in labels_of(dataset)] == classes
                assert dataset.features["label"].names == sorted(set(classes))
            else:
                assert dataset.column_names == ["image"]
            cropped = CroppedImages(dataset, 4)
            assert torch.equal(cropped[0], to_pixels([Image.fromarray(pixels[0].permute(1, 2, 0).numpy())], size=4)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_parquet_holds_the_same_pixels(kind: str, tmp_path: Path) -> None:
    (path, values) = next(iter(write_tree(tmp_path / "folder", {"x": kind}).items()))
    row = {"bytes": path.read_bytes(), "path": "/etc/hostname"}
    pq.write_table(pa.table({"image": [row] * 3}), tmp_path / "all.parquet", row_group_size=2)
    pixels = pixels_of(load_images(str(tmp_path / "all.parquet")))
    assert torch.equal(pixels, torch.from_numpy(np.stack([values] * 3)).permute(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------ known layouts of folders


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours(seed)).save(path, format="PNG")
    return path


def imagenet(folder: Path) -> str:
    for split in ("train", "val"):
        for i in range(4):
            save(folder / split / f"n0{i % 2}" / f"ILSVRC2012_{split}_0000000{i}.JPEG", i + 10 * (split == "val"))
    (folder / "devkit").mkdir()
    (folder / "devkit" / "readme.txt").write_text("no image")
    return str(folder)


@pytest.mark.parametrize(
    ("inner", "split", "seeds"),
    [
        ("", "val", [10, 12, 11, 13]),
        ("", "validation", [10, 12, 11, 13]),
        ("", "train", [0, 2, 1, 3]),
        ("val", "test", [10, 12, 11, 13]),
        ("val", "train", [10, 12, 11, 13]),
        ("val/n01", "test", [11, 13]),
    ],
)
def test_imagenet_as_everybody_has_it(
    inner: str, split: str, seeds: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    imagenet(tmp_path / "imagenet")
    source = tmp_path / "imagenet" / inner
    pixels = pixels_of(load_images(str(source), split))
    assert torch.equal(pixels, torch.from_numpy(np.stack([colours(s) for s in seeds])).permute(0, 3, 1, 2))
    err = capfd.readouterr().err
    assert f"{len(seeds)} images" in err
    assert str(source) in err


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the splits \['train', 'val'\], but not 'test'"):
        load_images(imagenet(tmp_path / "imagenet"), "test")


def test_what_is_passed_over_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "a.png")
    for name in (".DS_Store", "notes.txt", "more.txt", "labels.csv", "without"):
        (tmp_path / name).write_text("x")
    ImageFiles(tmp_path)
    assert "1 image in " in (err := capfd.readouterr().err)
    for part in ("1 hidden", "2 .txt", "1 .csv", "1 without suffix"):
        assert part in err


def test_links_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x.png", 1)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "y.png").symlink_to(save(tmp_path / "y.png", 2))
    assert len(pixels_of(load_images(str(tmp_path / "folder")))) == len(ImageFiles(tmp_path / "folder")) == 2


def test_an_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "images" / "closed" / "x.png")
    save(tmp_path / "images" / "open" / "x.png")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (ImageFiles, lambda folder: load_images(str(folder))):
        with pytest.raises(UserError, match="closed cannot be read: Permission denied"):
            read(tmp_path / "images")


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xfe")
    save(tmp_path / "images" / name / f"{name}.png", 3)
    save(tmp_path / "images" / "b" / "x.png", 3)
    dataset = load_images(str(tmp_path / "images"))
    assert len(pixels_of(dataset)) == 2
    assert len(set(dataset.features["label"].names)) == 2


def test_an_image_is_cropped_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole images that are alive at one time are counted: a crop needs one of them, not all."""
    for i in range(6):
        Image.fromarray(RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    alive, most = set[int](), 0
    read = decode.decode_image

    class Whole(Image.Image):
        def __del__(self) -> None:
            alive.discard(id(self))

    def counted(content: bytes, name: str) -> Image.Image:
        nonlocal most
        image = read(content, name)
        image.__class__ = Whole
        alive.add(id(image))
        most = max(most, len(alive))
        return image

    monkeypatch.setattr(decode, "decode_image", counted)
    assert pixels_of(load_images(str(tmp_path)), size=8).shape == (6, 3, 8, 8)
    assert 1 <= most <= 2


def test_a_parquet_file_that_changed_is_read_again(tmp_path: Path) -> None:
    """Same size, same time: what `cp -p` leaves."""
    file = tmp_path / "all.parquet"

    def write(seed: int) -> None:
        content = io.BytesIO()
        Image.fromarray(colours(seed)).save(content, format="BMP")
        pq.write_table(pa.table({"image": [content.getvalue()]}), file, compression="none", use_dictionary=False)

    write(1)
    stat = file.stat()
    first = pixels_of(load_images(str(file)))
    write(2)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    second = pixels_of(load_images(str(file)))
    assert not torch.equal(first, second)
    assert torch.equal(second[0].permute(1, 2, 0), torch.from_numpy(colours(2)))


# ----------------------------------------------------------------------------------------------- a corpus of bad inputs


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", **options)
    return content.getvalue()


def huge_png() -> bytes:
    """Return a PNG whose header claims 20,000 x 20,000 pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.fromarray(colours(seed)) for seed in (1, 2)]
    frames[0].save(content, format="GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


def half_transparent() -> Image.Image:
    image = Image.fromarray(colours(0))
    image.putalpha(Image.fromarray(colours(1)[..., 0]))
    return image


def tiff(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, format="TIFF")
    return content.getvalue()


WHOLE = png_bytes(Image.fromarray(colours(0)))
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"not an image", "is cut off or is not an image"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS"),
    "cut": (WHOLE[:90], "cannot be read as an image"),
    "header only": (WHOLE[:20], "cannot be read as an image"),
    "flipped": (WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:], "cannot be read as an image"),
    "huge": (huge_png(), "cannot be read as an image: DecompressionBombError"),
    "animation": (animation(), "is an animation or has several pages"),
    "transparent": (png_bytes(half_transparent()), "has transparent pixels"),
    "transparent grey": (png_bytes(half_transparent().convert("LA")), "has transparent pixels"),
    "transparent palette": (
        png_bytes(Image.fromarray(colours(0)).quantize(4), transparency=0),
        "has transparent pixels",
    ),
    "transparent colour": (
        png_bytes(Image.new("RGB", (SIDE, SIDE), (1, 2, 3)), transparency=(1, 2, 3)),
        "has transparent pixels",
    ),
    "float": (tiff(colours(0)[..., 0] / np.float32(255)), "floating-point, signed or 32-bit values"),
    "int32": (tiff(colours(0)[..., 0].astype(np.int32)), "floating-point, signed or 32-bit values"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n", "is cut off or is not an image"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_images_are_one_sentence_wherever_they_are_read(kind: str, tmp_path: Path) -> None:
    content, message = BAD_IMAGES[kind]
    save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "b.png").write_bytes(content)
    pq.write_table(pa.table({"image": [WHOLE, content]}), tmp_path / "all.parquet")
    named: list[tuple[str, Callable[[], Any]]] = [
        (r"b\.png", lambda: [*map(ImageFiles(tmp_path / "images").__getitem__, range(2))]),
        (r"b\.png", lambda: pixels_of(load_images(str(tmp_path / "images")))),
        (r"Row 1 of .*all\.parquet", lambda: pixels_of(load_images(str(tmp_path / "all.parquet")))),
    ]
    for name, read in named:
        with pytest.raises(UserError, match=f"{name} .*{message}") as caught:
            read()
        assert "\n" not in str(caught.value)
        assert "BytesIO" not in str(caught.value)


def dangling(folder: Path) -> None:
    (folder / "x.png").symlink_to(folder / "absent")


def loop(folder: Path) -> None:
    (folder / "x").symlink_to(folder)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "x.png")


def heic(folder: Path) -> None:
    (folder / "x.HEIC").write_bytes(b"x")


def both(folder: Path) -> None:
    pq.write_table(pa.table({"image": [WHOLE]}), folder / "x.parquet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (dangling, r"x\.png is a link to nothing"),
        (loop, "x is a link to a folder that it lies in"),
        (pipe, r"x\.png is no regular file"),
        (heic, r"x\.HEIC is an image of a kind that is not read"),
        (both, r"holds both images \(a\.png\) and Parquet files \(x\.parquet\)"),
    ],
)
def test_bad_folders(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    make(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        load_images(str(tmp_path / "images"))


SECRET = {"bytes": None, "path": "secret.png"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": pa.array([], pa.binary())}, "no images in .*: it has no rows"),
        ({"image": [WHOLE, None]}, "Row 1 of .* has no image"),
        ({"image": [{"bytes": WHOLE, "path": ""}, SECRET]}, "Row 1 of .* has no image, only the path 'secret.png'"),
        ({"image": ["secret.png"]}, "'image' of .* holds string, and no bytes of images"),
        ({"image": [[1, 2]]}, "'image' of .* holds list.*, and no bytes of images"),
        ({"image": [WHOLE], "label": [-2]}, "Row 0 of .* has the label -2, which is no class"),
        ({"text": ["x"]}, r"has no image column, only \['text'\]"),
    ],
)
def test_bad_parquet(columns: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "secret.png")
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=message):
        load_images("x.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-30], "cannot be read as a Parquet file"),
        (lambda content: b"", "cannot be read as a Parquet file"),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        (lambda content: content[:60] + bytes(60) + content[120:], r"x\.parquet"),
    ],
)
def test_damaged_parquet(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [WHOLE] * 3}), file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        pixels_of(load_images(str(file)))


def test_labels_that_are_missing_are_said(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [WHOLE] * 2, "label": [0, None]}), tmp_path / "x.parquet")
    dataset = load_images(str(tmp_path / "x.parquet"))
    assert len(dataset) == 2
    with pytest.raises(UserError, match="Image 1 of this data set has no label"):
        labels_of(dataset)


def test_images_of_the_hub_open_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Value

    secret = save(tmp_path / "secret.png")
    rows = {"image": [{"bytes": None, "path": str(secret)}]}
    stored = Features({"image": {"bytes": Value("binary"), "path": Value("string")}})
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict(rows, features=stored))
    with pytest.raises(UserError, match="has no bytes, only the path"):
        pixels_of(load_images("somebody/data"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
