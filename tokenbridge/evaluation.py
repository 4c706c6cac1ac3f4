"""Samples against reference statistics: FID, Inception Score, precision, recall and KID by Inception.

Features are those of torch-fidelity's Inception, a port of the TensorFlow network that published numbers use; the
scores are torch-fidelity's functions of them (`metrics`), so that they are what its own command prints. FID is
computed again by clean-fid's formula from the same features and, where clean-fid's weights are given, from clean-fid's
own features.

The reference is an .npz with `mu` and `sigma` (as LTH14/mar and TokenBridge ship), ADM's reference batch, which has
10,000 images in `arr_0` as well (guided-diffusion, evaluations/README.md), or a folder of images. ADM's evaluator
measures distances for precision and recall in half precision; torch-fidelity does here in float64.

Shape letters: N samples, M reference images, F features, K classes.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from tokenbridge import inception, metrics, provenance
from tokenbridge.artifacts import ARTIFACTS, INCEPTION
from tokenbridge.data import load_images
from tokenbridge.files import replacing, sha256_of
from tokenbridge.image_sets import DAMAGED, CroppedImages, ImageArray, ImageFiles, open_images
from tokenbridge.inception import InceptionWeights
from tokenbridge.metrics import Statistics
from tokenbridge.results import Provenance, Results, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

NUM_FEATURES = 2048  # of Inception's last pooling layer
FEW = NUM_FEATURES  # with fewer images than features the covariance has no full rank: FID then says little
SEED = 2020  # torch-fidelity's default, and so the official evaluation's: shuffle of IS, subsets of KID
INTERVAL = (0.025, 0.975)  # quantiles of the bootstrap
OTHER = "other-inception"  # what scores by unpublished weights are labelled with
CACHE = Path("runs") / "features"
NUM_WORKERS = 4  # processes that decode images for a GPU; a CPU has no cores to spare

# The hash that k-diffusion checks and several public repositories quote for NVIDIA's TorchScript file.
CLEANFID_FILE = "inception-2015-12-05.pt"
CLEANFID_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{CLEANFID_FILE}"
CLEANFID_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"

ImageSet = ImageFiles | ImageArray


@dataclass(frozen=True)
class Inception:
    """A network whose scores may be called FID only if its weights are the published ones."""

    network: Callable[[Tensor], tuple[Tensor, ...]]
    sha256: str  # of the file of weights
    published: bool


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    name: str
    sha256: str
    statistics: Statistics
    features: Tensor | None  # float32 [M, F], of the reference images; None where there are only statistics
    images: ImageSet | None
    num_images: int | None  # behind the statistics, where known
    from_images: bool  # whether the statistics were made here, from `images`


def evaluate(
    samples: Sequence[Path | str],
    reference: Path | str,
    *,
    inception: Path | str,
    cleanfid_inception: Path | str | None = None,
    allow_other_inception: bool = False,
    allow_few: bool = False,
    num_bootstrap: int = 100,
    seed: int = SEED,
    batch_size: int = 64,
    cache: Path | str = CACHE,
) -> Results:
    """Score one or more sets of samples against a reference.

    Runs on the GPU if there is one. Several sets are seeds of one system: each has its row, then follow mean and
    standard deviation (over n - 1). What cannot be computed is a row with the reason. With few images the settings
    shrink to what is there: Inception Score splits to N, KID subsets and neighbours to the smaller set.

    Args:
        samples: folders of images, or .npz files with uint8 `arr_0` [N, H, W, 3]; all of one N, H and W.
        reference: a folder of images, or .npz with `mu` [F] and `sigma` [F, F], with `arr_0` [M, H, W, 3], or both.
        inception: torch-fidelity's file of weights (`inception.find_inception` finds it).
        cleanfid_inception: clean-fid's file inception-2015-12-05.pt, for FID by its own features.
        allow_other_inception: take other weights than the published ones and label all scores with it.
        allow_few: take fewer than 2,048 images and label all scores with their number.
        num_bootstrap: resamples behind the interval of FID; 0 leaves it out.
        seed: of Inception Score's shuffle, KID's subsets and the bootstrap.
        batch_size: images per forward pass.
        cache: folder for features, under the hash of images and weights.

    Raises:
        ValueError: images, statistics or weights that cannot be used, or that are not what was asked for.
    """
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    if num_bootstrap < 0 or num_bootstrap == 1 or batch_size < 1:
        raise ValueError("The batch size is at least 1, the bootstrap takes at least 2 resamples (or 0: none).")
    extract = load_inception(inception, allow_other=allow_other_inception)  # first: bad files must not cost hours
    extract_cleanfid = None
    if cleanfid_inception is not None:
        extract_cleanfid = load_cleanfid_inception(cleanfid_inception, allow_other=allow_other_inception)
    sets = open_samples(samples, allow_few=allow_few)
    target = load_reference(reference, extract, batch_size=batch_size, cache=cache)
    _check_reference(target, sets[0], allow_few)

    def labelled(scores: dict[str, float], published: bool) -> dict[str, float]:
        suffix = "" if published else f"-{OTHER}"
        count = f" ({len(sets[0]):,} images)" if len(sets[0]) < FEW else ""
        return {f"{name}{suffix}{count}": value for name, value in scores.items()}

    rows: list[Row] = []
    scores_of_sets: list[dict[str, float]] = []
    not_run: dict[str, str] = {}
    for i, images in enumerate(sets, start=1):
        features, logits = inception_features(images, extract, batch_size=batch_size, cache=cache)
        intervals = fid_interval(features, target.statistics, num_bootstrap, seed) if num_bootstrap else {}
        scores = score_features(features, logits, target, seed) | intervals
        values = labelled(scores, extract.published)
        if extract_cleanfid is not None:
            whole, reasons = cleanfid_scores(images, target, extract_cleanfid, batch_size)
            values |= labelled(whole, extract_cleanfid.published)
            not_run |= reasons
        scores_of_sets.append(values)
        rows.append(Row(id=f"evaluation/{i}", label=images.name, metrics={"images": len(images), **values}))
    if len(sets) > 1:
        rows += _rows_over_sets(scores_of_sets)
    not_run |= _missing(target, cleanfid_inception)
    rows += [Row(id=f"evaluation/{name}", label=name, metrics={}, not_run=why) for name, why in not_run.items()]

    weights = {"inception": extract.sha256}
    if extract_cleanfid is not None:
        weights["clean-fid's inception"] = extract_cleanfid.sha256
    return Results(
        scale="evaluation",
        provenance=Provenance(
            command=provenance.command(),
            seed=seed,
            started=started.isoformat(timespec="seconds"),
            wall_seconds=round(time.perf_counter() - clock, 1),
            **provenance.commit(),
            versions=provenance.versions(),
            hardware=provenance.hardware(),
            data_sha256={images.name: images.sha256 for images in sets} | {target.name: target.sha256},
            weights_sha256=weights,
            settings={
                "samples": {"sets": len(sets), "images": len(sets[0]), "size": list(sets[0].size)},
                "reference": {
                    "statistics": "computed here" if target.from_images else "read",
                    "images behind the statistics": target.num_images,
                    "images": 0 if target.images is None else len(target.images),
                },
                "published weights": extract.published,
                "bootstrap": num_bootstrap,
                "notes": _notes(sets, target, num_bootstrap),
            },
        ),
        rows=rows,
        trends=[],
    )


def load_inception(path: Path | str, *, allow_other: bool = False) -> Inception:
    """Load torch-fidelity's Inception, on the GPU if there is one; it returns features [B, F] and logits [B, K].

    Raises:
        ValueError: there is no such file, it does not hold Inception's weights, or not the published ones.
    """
    declared = ARTIFACTS[INCEPTION]
    assert declared.sha256 is not None
    sha256 = _hash_of_weights(path, declared.file, declared.sha256, allow_other)
    weights = InceptionWeights(Path(path), sha256, sha256 == declared.sha256)
    network: Any = inception.load_inception(weights).to(_device())
    return Inception(network, sha256, weights.published)


def load_cleanfid_inception(path: Path | str, *, allow_other: bool = False) -> Inception:
    """Load clean-fid's Inception, on the GPU if there is one; it returns features [B, F].

    Raises:
        ValueError: there is no such file, it has another name, or is not the published one.
    """
    path = Path(path)
    sha256 = _hash_of_weights(path, CLEANFID_FILE, CLEANFID_SHA256, allow_other)
    if path.name != CLEANFID_FILE:
        raise ValueError(f"clean-fid asks for a file called {CLEANFID_FILE}, not {path.name}.")
    try:
        network: Any = InceptionV3W(str(path.parent), download=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} does not hold clean-fid's Inception: {reason}") from error
    network.to(_device())

    def extract(images: Tensor) -> tuple[Tensor, ...]:
        # Pixels come from clean-fid's resizing (299 x 299), or as they are, for the network to resize as TensorFlow.
        network.resize_inside = images.dtype == torch.uint8
        return (network(images.float()),)

    return Inception(extract, sha256, sha256 == CLEANFID_SHA256)


def open_samples(samples: Sequence[Path | str], *, allow_few: bool = False) -> list[ImageSet]:
    """Open sets of samples, without reading pixels.

    Raises:
        ValueError: sets of different numbers or sizes, or twice the same; fewer than 2,048 images unless allowed.
    """
    if not samples:
        raise ValueError("There are no samples to evaluate.")
    sets = [open_images(path) for path in samples]
    first = sets[0]
    for other in sets[1:]:
        if (len(other), other.size) != (len(first), first.size):
            raise ValueError(
                f"Sets of samples are compared only if they are alike: {first.name} has {len(first)} images of "
                f"{list(first.size)} pixels, {other.name} {len(other)} of {list(other.size)}."
            )
    if len({images.sha256 for images in sets}) < len(sets):
        raise ValueError("Two of the sets of samples hold the same images: they are no two seeds.")
    if len(first) < 2:
        raise ValueError(f"{first.name} holds 1 image; scores need at least 2.")
    if len(first) < FEW and not allow_few:
        raise ValueError(_too_few(first.name, len(first)))
    return sets


def load_reference(
    path: Path | str, inception: Inception, *, batch_size: int = 64, cache: Path | str = CACHE
) -> Reference:
    """Load statistics, and the features of reference images if there are any; see `evaluate` for the formats.

    Raises:
        ValueError: there is neither, statistics of another feature size, not finite, or made with other weights.
    """
    path = Path(path)
    stored, meta, names = _read_statistics(path) if path.is_file() else (None, {}, ["arr_0"])
    made_with = meta.get("inception_sha256", inception.sha256)
    if made_with != inception.sha256:
        raise ValueError(
            f"The statistics in {path} were made with Inception weights of SHA-256 {made_with[:16]}…, "
            f"but these weights have {inception.sha256[:16]}…: features of two networks cannot be compared."
        )
    images = open_images(path) if stored is None or "arr_0" in names else None
    features = None
    if images is not None:
        if len(images) < 2:
            raise ValueError(f"{path} holds 1 image; a reference has at least 2.")
        features, _ = inception_features(images, inception, batch_size=batch_size, cache=cache)
    if stored is not None:
        sha256 = sha256_of(path) if images is None else images.sha256
        return Reference(str(path), sha256, stored, features, images, meta.get("num_images"), from_images=False)
    assert images is not None
    assert features is not None
    statistics = metrics.statistics_of(features)
    return Reference(str(path), images.sha256, statistics, features, images, len(images), from_images=True)


def inception_features(
    images: ImageSet, inception: Inception, *, batch_size: int = 64, cache: Path | str = CACHE
) -> tuple[Tensor, Tensor]:
    """Return features [N, F] and logits [N, K], float32 on the CPU; from the cache, if they were extracted before.

    Raises:
        ValueError: features that are not finite, or a damaged file in the cache.
    """
    version = importlib.metadata.version("torch-fidelity")
    file = Path(cache) / f"{images.sha256}-{inception.sha256[:16]}-torch-fidelity-{version}.safetensors"
    if file.is_file():
        try:
            stored = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"The cached features {file} are damaged: {error}. Delete the file.") from error
        return stored["features"], stored["logits"]
    batches = [outputs for _, outputs in _forward(images, inception.network, batch_size, "features")]
    features, logits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise ValueError(f"Inception's features of {images.name} are not finite: the weights are damaged.")
    with replacing(file) as temporary:
        save_file({"features": features, "logits": logits}, temporary)
    return features, logits


def score_features(features: Tensor, logits: Tensor, reference: Reference, seed: int = SEED) -> dict[str, float]:
    """Return the scores of one set of samples by name; those that need reference images only if there are any.

    Args:
        features: [N, F].
        logits: [N, K].
        reference: what `load_reference` returns.
        seed: of Inception Score's shuffle and KID's subsets.
    """
    statistics = metrics.statistics_of(features)
    inception_score, inception_score_std = metrics.inception_score(logits, seed)
    scores = {
        "FID": metrics.fidelity_distance(statistics, reference.statistics),
        "FID-cleanfid": metrics.cleanfid_distance(statistics, reference.statistics),
        "IS": inception_score,
        "IS-std": inception_score_std,
    }
    if reference.features is None:
        return scores
    samples, references = features.double(), reference.features.double()
    device = _device()
    precision, recall = metrics.precision_and_recall(samples.to(device), references.to(device))
    kid, kid_std = metrics.kernel_distance(samples, references, seed)
    return scores | {"precision": precision, "recall": recall, "KID": kid, "KID-std": kid_std}


def fid_interval(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> dict[str, float]:
    """Return the bootstrap's interval and bias of FID: `FID-low`, `FID-high`, `FID-bias`.

    A resample has fewer different images than the set, and FID grows as images become fewer: resampled FIDs lie
    above the FID of the set. That difference, `FID-bias`, is the bootstrap's estimate of how far FID of N images lies
    above that of infinitely many. The interval is that of the resampled FIDs, moved down by it.

    Args:
        features: [N, F].
        reference: taken as exact.
        num_bootstrap: resamples, at least 2.
        seed: of the draws.
    """
    resampled = bootstrap_fid(features, reference, num_bootstrap, seed)
    fid = metrics.fidelity_distance(metrics.statistics_of(features), reference)
    bias = resampled.mean() - fid
    low, high = np.quantile(resampled - bias, INTERVAL)
    return {"FID-low": float(low), "FID-high": float(high), "FID-bias": float(bias)}


def bootstrap_fid(features: Tensor, reference: Statistics, num_bootstrap: int, seed: int = SEED) -> np.ndarray:
    """Return FID [num_bootstrap], float64, of N images drawn with replacement, again and again.

    With reference covariance RᵀR, the trace in FID is that of the root of R S Rᵀ, whose eigenvalues are those of a
    Gram matrix of the projected features: no feature is extracted, and no root taken, twice.
    """
    num_images, num_features = features.shape
    device = _device()
    x = features.double().to(device)
    mean_r = torch.from_numpy(reference.mean).to(device)
    projected = x @ torch.from_numpy(metrics.root_of(reference.covariance)).to(device).T
    norms = x.square().sum(dim=1)
    generator = torch.Generator().manual_seed(seed)
    distances = []
    console = Console(stderr=True)
    for _ in track(range(num_bootstrap), "bootstrap", console=console, transient=True):
        drawn = torch.randint(num_images, (num_images,), generator=generator)
        weights = torch.bincount(drawn, minlength=num_images).double().to(device)
        mean = weights @ x / num_images
        variance = (weights @ norms - num_images * mean.dot(mean)) / (num_images - 1)
        centred = (projected - weights @ projected / num_images) * (weights / (num_images - 1)).sqrt()[:, None]
        gram = centred @ centred.T if num_images < num_features else centred.T @ centred
        root = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        distances.append((mean - mean_r).square().sum() + variance - 2 * root)
    return torch.stack(distances).cpu().numpy() + np.trace(reference.covariance)


def cleanfid_scores(
    images: ImageSet, reference: Reference, inception: Inception, batch_size: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return FID by clean-fid's own features, in both its modes, and the reasons for what was not run.

    `FID-cleanfid-legacy` (mode legacy_tensorflow) resizes as TensorFlow 1 did, as torch-fidelity does: it should be
    the FID. `FID-cleanfid-clean` resizes with antialiasing; other numbers come out, which only compare with their like.
    """
    legacy = _cleanfid_statistics(images, inception, "legacy_tensorflow", batch_size)
    if not reference.from_images:
        why = f"{reference.name} has statistics of images resized as TensorFlow 1 did; mode clean needs the images"
        scores = {"FID-cleanfid-legacy": metrics.cleanfid_distance(legacy, reference.statistics)}
        return scores, {"FID-cleanfid-clean": why}
    assert reference.images is not None
    legacy_reference = _cleanfid_statistics(reference.images, inception, "legacy_tensorflow", batch_size)
    clean, clean_reference = (
        _cleanfid_statistics(x, inception, "clean", batch_size) for x in (images, reference.images)
    )
    return {
        "FID-cleanfid-legacy": metrics.cleanfid_distance(legacy, legacy_reference),
        "FID-cleanfid-clean": metrics.cleanfid_distance(clean, clean_reference),
    }, {}


def make_reference(
    source: str,
    out: Path | str,
    *,
    inception: Path | str,
    split: str = "train",
    image_size: int = 256,
    keep_images: int = 0,
    allow_other_inception: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Write the statistics of a data set with ADM's centre crop: `mu`, `sigma`, `num_images`, `meta` (JSON).

    Sums are added up in float64 batch by batch, so that a data set of any size passes. Runs on the GPU if there is one.

    Args:
        source: what `load_images` takes: a folder, Parquet or the name of a data set.
        out: .npz to write.
        inception: torch-fidelity's file of weights.
        split: of the source.
        image_size: pixels of the crop.
        keep_images: store so many of the images, drawn by `seed`, as `arr_0`, for precision, recall and KID.
        allow_other_inception: take other weights than the published ones.
        seed: of that draw.
        batch_size: images per forward pass.

    Returns:
        What `meta` says: source, number of images, hashes of pixels and weights, provenance.

    Raises:
        ValueError: images or weights that cannot be used, or more images to keep than there are.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"Statistics are written as .npz, not as {out.name}.")
    if image_size < 1 or batch_size < 1:
        raise ValueError("Image size and batch size are at least 1.")
    extract = load_inception(inception, allow_other=allow_other_inception)
    images = CroppedImages(load_images(source, split), image_size)
    if len(images) < 2 or not 0 <= keep_images <= len(images):
        raise ValueError(f"{source} has {len(images)} images: at least 2 are needed, and {keep_images} are to be kept.")
    kept = np.random.default_rng(seed).choice(len(images), keep_images, replace=False)
    place = {index: i for i, index in enumerate(sorted(kept.tolist()))}
    array = np.empty((keep_images, image_size, image_size, 3), np.uint8)

    digest = hashlib.sha256()
    total = np.zeros(NUM_FEATURES)
    products = np.zeros((NUM_FEATURES, NUM_FEATURES))
    index = 0
    for pixels, (features, _) in _forward(images, extract.network, batch_size, "features"):
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
        "format": "tokenbridge-reference/1",
        "source": source,
        "split": split,
        "image_size": image_size,
        "crop": "ADM's centre crop (guided-diffusion, image_datasets.py)",
        "num_images": len(images),
        "pixels_sha256": digest.hexdigest(),
        "inception_sha256": extract.sha256,
        "published_weights": extract.published,
        "command": provenance.command(),
        **provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }
    arrays: dict[str, Any] = {"mu": mean, "sigma": covariance, "num_images": len(images), "meta": json.dumps(meta)}
    if keep_images:
        arrays["arr_0"] = array
    with replacing(out) as temporary:
        np.savez(temporary, **arrays)
    return meta


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _forward(
    images: ImageSet | CroppedImages,
    network: Callable[[Tensor], tuple[Tensor, ...]],
    batch_size: int,
    what: str,
    prepare: Callable[[Tensor], Tensor] = lambda pixels: pixels,
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """Yield pixels [B, 3, H, W] and the network's outputs, on the CPU, batch by batch.

    Convolutions are float32 on a GPU too: TF32, PyTorch's default there, keeps 10 bits of each factor.
    """
    device = _device()
    # An .npz is read in order, by one reader.
    num_workers = NUM_WORKERS if device.type == "cuda" and not isinstance(images, ImageArray) else 0
    loader: Iterable[Tensor] = DataLoader(images, batch_size=batch_size, num_workers=num_workers)
    for pixels in track(loader, what, console=Console(stderr=True), transient=True):
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = network(prepare(pixels).to(device))
        yield pixels, tuple(x.cpu() for x in outputs)


def _cleanfid_statistics(images: ImageSet, inception: Inception, mode: str, batch_size: int) -> Statistics:
    """Return statistics of clean-fid's features; its resizer works on arrays [H, W, 3], one at a time."""
    resize = build_resizer(mode)

    def prepare(pixels: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(resize(x.permute(1, 2, 0).numpy())).permute(2, 0, 1) for x in pixels])

    batches = _forward(images, inception.network, batch_size, f"clean-fid, {mode}", prepare)
    return metrics.statistics_of(torch.cat([features for _, (features,) in batches]))


def _hash_of_weights(path: Path | str, name: str, sha256: str, allow_other: bool) -> str:
    """Return the SHA-256 of a file of weights; refuse another than the published one unless that is allowed."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file of Inception weights {path}.")
    found = sha256_of(path)
    if found != sha256 and not allow_other:
        raise ValueError(
            f"{path} is not the published {name}: its SHA-256 is {found}, not {sha256}. Scores by other weights are "
            f"no FID; they can be asked for (--allow-other-inception) and are labelled FID-{OTHER}."
        )
    return found


def _check_reference(reference: Reference, samples: ImageSet, allow_few: bool) -> None:
    """Refuse reference images of another size than the samples, and few of them unless they are allowed."""
    if reference.images is not None and reference.images.size != samples.size:
        raise ValueError(
            f"The samples are {list(samples.size)} pixels, the images in {reference.name} "
            f"{list(reference.images.size)}: resizing changes FID, so do it knowingly and before."
        )
    if reference.num_images is not None and reference.num_images < FEW and not allow_few:
        raise ValueError(_too_few(reference.name, reference.num_images))


def _too_few(name: str, number: int) -> str:
    return (
        f"{name} has {number:,} images. FID compares covariances of {NUM_FEATURES:,} features; of fewer images it "
        f"says little about the system. It can be asked for (--allow-few) and is labelled with the number of images."
    )


def _read_statistics(path: Path) -> tuple[Statistics | None, dict[str, Any], list[str]]:
    """Return the statistics in an .npz if it has any, what it says of them, and the names of its arrays."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            values = {key: archive[key] for key in ("mu", "sigma", "meta") if key in names}
    except (*DAMAGED, TypeError, pickle.UnpicklingError) as error:  # TypeError: a plain .npy is no context
        raise ValueError(f"{path} is no .npz file of statistics, or cut off: {error}.") from error
    if not {"mu", "sigma"} <= values.keys():
        if "arr_0" in names:
            return None, {}, names
        raise ValueError(f"{path} has neither statistics (mu and sigma) nor images (arr_0), only {names}.")
    mean, covariance = values["mu"], values["sigma"]
    if mean.shape != (NUM_FEATURES,) or covariance.shape != (NUM_FEATURES, NUM_FEATURES):
        raise ValueError(
            f"The statistics in {path} are of another feature size: mu is {list(mean.shape)} and sigma "
            f"{list(covariance.shape)}, but Inception has {NUM_FEATURES} features."
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise ValueError(f"The statistics in {path} are {mean.dtype} and {covariance.dtype}, not floating point.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"The statistics in {path} are not finite.")
    meta = json.loads(str(values["meta"])) if "meta" in values else {}
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64)), meta, names


def _rows_over_sets(scores: Sequence[dict[str, float]]) -> list[Row]:
    """Return mean and standard deviation over seeds; spreads and bounds within one set have none."""
    within = ("IS-std", "KID-std", "FID-low", "FID-high", "FID-bias")
    names = [name for name in scores[0] if not name.startswith(within)]
    mean = {name: float(np.mean([s[name] for s in scores])) for name in names}
    deviation = {name: float(np.std([s[name] for s in scores], ddof=1)) for name in names}
    return [
        Row(id="evaluation/mean", label=f"mean of {len(scores)}", metrics=mean),
        Row(id="evaluation/std", label="standard deviation", metrics=deviation),
    ]


def _missing(reference: Reference, cleanfid_inception: Path | str | None) -> dict[str, str]:
    """Return the scores that could not be computed, with the reasons."""
    reasons = {}
    if reference.features is None:
        reasons["precision, recall, KID"] = (
            f"{reference.name} has only mu and sigma; these scores compare with images: give a folder, or ADM's "
            "reference batch, whose arr_0 has 10,000"
        )
    if cleanfid_inception is None:
        reasons["FID-cleanfid-legacy, FID-cleanfid-clean"] = (
            f"clean-fid's own features need its weights {CLEANFID_FILE} ({CLEANFID_URL}): name them with "
            "--cleanfid-inception"
        )
    return reasons


def _notes(sets: Sequence[ImageSet], reference: Reference, num_bootstrap: int) -> list[str]:
    """Return what a reader must know to judge the scores."""
    notes = [
        f"FID of a finite set is biased upwards, the more the fewer images: these are of {len(sets[0]):,}, published "
        "values of 50,000. Only FIDs of equal numbers of images compare."
    ]
    if num_bootstrap:
        notes.append(
            f"FID-low to FID-high: 95% of {num_bootstrap} FIDs of images resampled from the set, moved by -FID-bias, "
            "the first-order estimate of the bias (at thousands of images an order of magnitude only). It covers which "
            "images the system happened to draw; not the choice of the reference images, training, other weights or "
            "implementations of Inception, nor the bias, which is still in the FID."
        )
    if len(sets[0]) < FEW:
        notes.append(f"Fewer than {FEW:,} images: these scores serve to test the path, not to judge a system.")
    if reference.num_images is not None and reference.num_images < FEW:
        notes.append(f"The reference has fewer than {FEW:,} images ({reference.num_images:,}).")
    if any(images.lossy for images in sets):
        notes.append("Some samples are compressed with loss (JPEG or WebP), which changes FID.")
    return notes
