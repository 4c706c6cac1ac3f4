"""Reference statistics, which are read from a file or computed from a data set."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tokenbridge.data.arrays import Archive, open_archive
from tokenbridge.data.image_sets import CroppedImages, ImageSet, open_images
from tokenbridge.data.sources import load_images
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.features import CACHE, forward, inception_features
from tokenbridge.evaluation.inception import NUM_FEATURES, Inception, loaded
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.utils import provenance
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import check_writable, replacing, sha256_of
from tokenbridge.utils.hashed import unchanged

FORMAT = "tokenbridge-reference/1"
MAX_META = 2**20  # bytes
LARGEST = 1e12  # of a mean or covariance of features, whose squares are still numbers


@dataclass(frozen=True)
class Reference:
    """The reference that samples are compared with."""

    name: str
    sha256: str
    statistics: Statistics
    features: Tensor | None  # features of the reference images, float32 [M, F]; None without images
    images: ImageSet | None
    num_images: int | None  # the number of images behind the statistics; None if it is unknown
    from_images: bool  # whether the statistics were computed here from `images`


def load_reference(
    path: Path | str, inception: Inception | Callable[[], Inception], *, batch_size: int = 64, cache: Path | str = CACHE
) -> Reference:
    """Load statistics, and the features of reference images if there are any. `evaluate` describes the formats.

    Raises:
        UserError: `path` holds neither statistics nor images, or the statistics have another feature size, are not
            finite, or were computed with other weights.
    """
    path = Path(path)
    # The statistics, the images and the hash of a file are read one after the other.
    with unchanged(path) if path.is_file() else nullcontext():
        return _load_reference(path, inception, batch_size, cache)


def _load_reference(
    path: Path, inception: Inception | Callable[[], Inception], batch_size: int, cache: Path | str
) -> Reference:
    stored, meta, names = _read_file(path) if path.is_file() else (None, {}, ["arr_0"])
    images = open_images(path) if stored is None or "arr_0" in names else None
    if images is not None and len(images) < 2:
        raise UserError(f"{path} holds 1 image, but a reference needs at least 2.")
    inception = loaded(inception)
    made_with = meta.get("inception_sha256", inception.sha256)
    if made_with != inception.sha256:
        raise UserError(
            f"The statistics in {path} were made with Inception weights of SHA-256 {made_with[:16]}…, "
            f"but these weights have {inception.sha256[:16]}…: features of two networks cannot be compared."
        )
    features = None
    if images is not None:
        features, _ = inception_features(images, inception, batch_size=batch_size, cache=cache)
    if stored is not None:
        sha256 = sha256_of(path) if images is None else images.sha256
        return Reference(str(path), sha256, stored, features, images, meta.get("num_images"), from_images=False)
    assert images is not None
    assert features is not None
    statistics = metrics.statistics_of(features)
    return Reference(str(path), images.sha256, statistics, features, images, len(images), from_images=True)


def make_reference(
    source: str,
    out: Path | str,
    *,
    inception: Inception | Callable[[], Inception],
    split: str = "train",
    image_size: int = 256,
    keep_images: int = 0,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Write the statistics of a data set with ADM's centre crop: `mu`, `sigma`, `num_images`, `meta` (JSON).

    Sums are accumulated in float64 batch by batch, so that a data set may have any size. This runs on the GPU if there
    is one.

    Args:
        source: a folder, a Parquet file or the name of a data set, as `load_images` takes it.
        out: the .npz to write.
        inception: torch-fidelity's Inception, or a function that loads it.
        split: the split of the source.
        image_size: pixels of the crop.
        keep_images: the number of images, drawn by `seed`, to store as `arr_0` for precision, recall and KID.
        seed: the seed of that draw.
        batch_size: images per forward pass.

    Returns:
        The content of `meta`: source, number of images, hashes of pixels and weights, provenance.

    Raises:
        UserError: the images cannot be used, there are fewer than `keep_images`, or a number is out of range.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise UserError(f"Statistics are written as .npz, so {out.name} needs another name.")
    if image_size < 1 or batch_size < 1:
        raise UserError("The image size and the batch size must be at least 1.")
    images = CroppedImages(load_images(source, split), image_size)
    if len(images) < 2 or not 0 <= keep_images <= len(images):
        raise UserError(f"{source} has {len(images)} images, but needs at least 2 and the {keep_images} to keep.")
    check_writable(out, lambda: _read_meta(out))
    inception = loaded(inception)
    kept = np.random.default_rng(seed).choice(len(images), keep_images, replace=False)
    place = {index: i for i, index in enumerate(sorted(kept.tolist()))}
    array = np.empty((keep_images, image_size, image_size, 3), np.uint8)

    digest = hashlib.sha256()
    total = np.zeros(NUM_FEATURES)
    products = np.zeros((NUM_FEATURES, NUM_FEATURES))
    index = 0
    for pixels, (features, _) in forward(images, inception.network, batch_size, "features"):
        digest.update(pixels.numpy().tobytes())
        for picture in pixels:
            if index in place:
                array[place[index]] = picture.permute(1, 2, 0).numpy()
            index += 1
        values = features.double().numpy()
        total += values.sum(axis=0)
        products += values.T @ values
    mean = total / len(images)
    covariance = (products - len(images) * np.outer(mean, mean)) / (len(images) - 1)
    meta = {
        "format": FORMAT,
        "source": source,
        "split": split,
        "image_size": image_size,
        "crop": "ADM's centre crop (guided-diffusion, image_datasets.py)",
        "num_images": len(images),
        "pixels_sha256": digest.hexdigest(),
        "inception_sha256": inception.sha256,
        "published_weights": inception.published,
        "command": provenance.command(),
        **provenance.origin(),
    }
    arrays: dict[str, Any] = {"mu": mean, "sigma": covariance, "num_images": len(images), "meta": json.dumps(meta)}
    if keep_images:
        arrays["arr_0"] = array
    with replacing(out) as temporary:
        np.savez(temporary, **arrays)
    return meta


def _read_meta(path: Path) -> None:
    """Raise an error unless a file is one of statistics that `make_reference` wrote."""
    with zipfile.ZipFile(path) as archive:
        archive.getinfo("meta.npy")


def read_statistics(path: Path | str) -> Statistics:
    """Read the statistics in an .npz: `mu` [2048] and `sigma` [2048, 2048], as float64.

    Raises:
        UserError: the file is damaged or has no statistics, or they have another feature size or are not finite.
    """
    statistics, _, names = _read_file(Path(path))
    if statistics is None:
        raise UserError(f"{path} has no statistics (mu and sigma), only {names}.")
    return statistics


def _read_file(path: Path) -> tuple[Statistics | None, dict[str, Any], list[str]]:
    """Return the statistics in a reference's .npz if it has any, what it says of them, and the names of its arrays."""
    with open_archive(path, "an .npz file of statistics") as archive:
        names = archive.names
        if not {"mu", "sigma"} <= set(names):
            if "arr_0" in names:
                return None, {}, names
            raise UserError(f"{path} has neither statistics (mu and sigma) nor images (arr_0), only {names}.")
        headers = {key: archive.open(key)[0] for key in ("mu", "sigma")}
        mean, covariance = headers["mu"], headers["sigma"]
        if mean.shape != (NUM_FEATURES,) or covariance.shape != (NUM_FEATURES, NUM_FEATURES):
            raise UserError(
                f"The statistics in {path} have another feature size: mu is {list(mean.shape)} and sigma is "
                f"{list(covariance.shape)}, but Inception has {NUM_FEATURES} features."
            )
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
            raise UserError(f"The statistics in {path} are {mean.dtype} and {covariance.dtype}, not floating point.")
        arrays = [archive.read(key, headers[key].num_bytes).astype(np.float64) for key in ("mu", "sigma")]
        meta = _meta_of(archive)
    statistics = Statistics(*arrays)
    _check_statistics(statistics, path)
    return statistics, meta, names


def _meta_of(archive: Archive) -> dict[str, Any]:
    """Return what this package wrote beside statistics; a `meta` of somebody else is none of it.

    Raises:
        UserError: it is ours, and says something that cannot be.
    """
    if "meta" not in archive.names:
        return {}
    try:
        meta = json.loads(str(archive.read("meta", MAX_META)))
    except (ValueError, RecursionError):  # an array of objects, or no JSON
        return {}
    if not isinstance(meta, dict):
        return {}
    number, sha256 = meta.get("num_images"), meta.get("inception_sha256")
    fitting: dict[str, Any] = {}
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        fitting["num_images"] = number
    if isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256):
        fitting["inception_sha256"] = sha256
    wrong = {"num_images", "inception_sha256"} - fitting.keys()
    if meta.get("format") == FORMAT and wrong:
        raise UserError(f"meta of {archive.path} has no usable {' and no usable '.join(sorted(wrong))}.")
    return fitting


def _check_statistics(statistics: Statistics, path: Path) -> None:
    """Refuse a mean and a covariance that no features have."""
    mean, covariance = statistics.mean, statistics.covariance
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"The statistics in {path} are not finite.")
    largest = max(np.abs(mean).max(), np.abs(covariance).max())
    if largest > LARGEST:
        raise UserError(f"The statistics in {path} have values up to {largest:.3g}, which no features have.")
    # The tolerances are those of float32 sums over a million images, with room.
    scale = covariance.trace()
    if np.abs(covariance - covariance.T).max() > 1e-6 * abs(scale):
        raise UserError(f"sigma of {path} is not symmetric, so it is no covariance: the file is damaged.")
    try:
        np.linalg.cholesky(covariance + (1e-5 * abs(scale) + 1e-30) * np.eye(len(covariance)))
    except np.linalg.LinAlgError as error:
        raise UserError(f"sigma of {path} has negative eigenvalues, so it is no covariance.") from error
