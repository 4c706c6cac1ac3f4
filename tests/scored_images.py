"""Sets of random images, and an Inception with random weights, to score them by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import cleanfid.fid
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tokenbridge.data.image_sets import open_images
from tokenbridge.data.pictures import save_images
from tokenbridge.evaluation import metrics
from tokenbridge.evaluation.features import inception_features
from tokenbridge.evaluation.inception import NUM_FEATURES, Inception, load_inception, write_random_inception
from tokenbridge.evaluation.metrics import Statistics
from tokenbridge.evaluation.reference import Reference, load_reference, make_reference

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_SAMPLES, NUM_REFERENCE, SIZE = 18, 20, 32


LABEL = f"-other-inception ({NUM_SAMPLES} images)"


# Two float64 computations of one formula. Fewer features than images are not 0 (`weights`), so that no rounding
# error of an eigenvalue that should be 0 goes through a square root.
EXACT = 1e-9


def random_images(seed: int, number: int, offset: int = 0) -> Tensor:
    """Draw images [N, 3, H, W] with a gradient of random strength under noise, so that features differ."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(number, 3, 1, 1, generator=generator)
    noise = torch.rand(number, 3, SIZE, SIZE, generator=generator)
    return ((strength * torch.linspace(0, 1, SIZE) + noise) * 100 + offset).to(torch.uint8)


def folder_of(path: Path, images: Tensor) -> Path:
    save_images(path, images)
    return path


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images of two seeds and of a reference."""
    folder = tmp_path_factory.mktemp("evaluation")
    folder_of(folder / "seed0", random_images(1, NUM_SAMPLES))
    folder_of(folder / "seed1", random_images(2, NUM_SAMPLES))
    folder_of(folder / "reference", random_images(3, NUM_REFERENCE, offset=20))
    return folder


@pytest.fixture(scope="session")
def weights(root: Path) -> Path:
    """Return random weights in torch-fidelity's format; about ten of the features are not 0."""
    file = root / "random.pth"
    write_random_inception(file)
    tensors = torch.load(file, weights_only=True)
    branches = ("branch1x1", "branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b", "branch_pool")
    for branch in branches:
        tensors[f"Mixed_7c.{branch}.bn.weight"][12 if branch == "branch1x1" else 0 :] = 0
    tensors["fc.weight"] *= 50  # classes that differ from image to image
    torch.save(tensors, file)
    return file


@pytest.fixture(scope="session")
def inception(weights: Path) -> Inception:
    return load_inception(weights, allow_other=True)


@pytest.fixture
def options(root: Path, inception: Inception) -> dict[str, Any]:
    """Return the arguments that let these samples pass."""
    return {
        "inception": inception,
        "allow_few": True,
        "num_bootstrap": 0,
        "batch_size": 16,
        "cache": root / "features",
    }


@pytest.fixture(scope="session")
def extracted(root: Path, inception: Inception) -> tuple[Tensor, Tensor, Reference]:
    """Return features and logits of seed0, and the reference."""
    cached: dict[str, Any] = {"batch_size": 16, "cache": root / "features"}
    features, logits = inception_features(open_images(root / "seed0"), inception, **cached)
    return features, logits, load_reference(root / "reference", inception, **cached)


@pytest.fixture
def own_root() -> None:
    """Ask for clean-fid's own distance."""


@pytest.fixture
def quick_root(request: pytest.FixtureRequest) -> Iterator[None]:
    """Replace clean-fid's distance, whose root of a 2048 x 2048 matrix takes 8 s, where it is not what is tested."""

    def distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
        used = np.flatnonzero(cov_a.diagonal() + cov_b.diagonal() + mean_a**2 + mean_b**2)  # the others are all 0
        pair = (Statistics(m[used], c[np.ix_(used, used)]) for m, c in ((mean_a, cov_a), (mean_b, cov_b)))
        return metrics.frechet_distance(*pair)

    if "own_root" in request.fixturenames:
        yield
    else:
        with patch.object(cleanfid.fid, "frechet_distance", distance):
            yield


@pytest.fixture(scope="session")
def batch(root: Path, inception: Inception) -> Path:
    """Return the reference as .npz in the format of ADM's reference batch."""
    file = root / "batch.npz"
    meta = make_reference(
        str(root / "reference"),
        file,
        inception=inception,
        image_size=SIZE,
        keep_images=NUM_REFERENCE,
        batch_size=16,
    )
    assert meta["num_images"] == NUM_REFERENCE
    return file


def statistics_file(file: Path, num_features: int = NUM_FEATURES, **changes: Any) -> Path:
    arrays = {"mu": np.zeros(num_features), "sigma": np.eye(num_features)}
    np.savez(file, **{**arrays, **changes})
    return file


def array_file(path: Path, array: np.ndarray) -> Path:
    np.savez(path.with_suffix(".npz"), array)
    return path.with_suffix(".npz")


class ImageDataset(Dataset[Tensor]):
    """Images of a tensor one by one; torch-fidelity takes neither a tensor nor TensorDataset's tuples."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
