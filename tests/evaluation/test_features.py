"""Features of images: cached, and the same from a folder and an array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scored_images import folder_of, random_images
from torch import Tensor

from tokenbridge.data.image_sets import ImageFiles, open_images
from tokenbridge.evaluation.features import forward, inception_features
from tokenbridge.evaluation.inception import Inception
from tokenbridge.evaluation.reference import Reference
from tokenbridge.utils.errors import UserError

pytest_plugins = ("scored_images",)
pytestmark = pytest.mark.usefixtures("quick_root")


def test_features_are_extracted_once(root: Path, inception: Inception, tmp_path: Path) -> None:
    images = open_images(folder_of(tmp_path / "images", random_images(5, 2)))
    calls = []

    def network(pixels: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(pixels))
        return inception.network(pixels)

    counted = Inception(network, inception.sha256, published=False)
    first = inception_features(images, counted, batch_size=1, cache=tmp_path)
    again = inception_features(images, counted, cache=tmp_path)
    assert calls == [1, 1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (file,) = tmp_path.glob("*.safetensors")
    assert images.sha256 in file.name
    assert inception.sha256[:16] in file.name
    inception_features(images, Inception(network, "0" * 64, published=False), cache=tmp_path)  # other weights
    assert len(calls) == 3
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        inception_features(images, counted, cache=tmp_path)
    broken = Inception(lambda x: (torch.full((len(x), 4), torch.nan), torch.zeros(len(x), 4)), "1" * 64, False)
    with pytest.raises(ValueError, match="not finite"):
        inception_features(images, broken, cache=tmp_path)


def test_a_folder_and_its_array_have_the_same_features(
    root: Path, inception: Inception, extracted: tuple[Tensor, Tensor, Reference], tmp_path: Path
) -> None:
    files = ImageFiles(root / "seed0")
    np.savez(tmp_path / "samples.npz", torch.stack([files[i] for i in range(8)]).permute(0, 2, 3, 1).numpy())
    features, logits = inception_features(open_images(tmp_path / "samples.npz"), inception, cache=tmp_path)
    # Another batch size: convolutions may add up float32 in another order.
    torch.testing.assert_close(features, extracted[0][:8], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits, extracted[1][:8], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda features, logits: {"features": features[:1], "logits": logits},
        lambda features, logits: {"features": features[:, :7].contiguous(), "logits": logits},
        lambda features, logits: {"features": features, "logits": logits.double()},
        lambda features, logits: {"features": features * torch.nan, "logits": logits},
        lambda features, logits: {"features": features},
    ],
)
def test_cached_features_of_other_images_are_refused(
    change: Callable[[Tensor, Tensor], dict[str, Tensor]], inception: Inception, tmp_path: Path
) -> None:
    images = open_images(folder_of(tmp_path / "images", random_images(5, 2)))
    stand_in = Inception(lambda x: (torch.ones(len(x), 2048), torch.ones(len(x), 1008)), inception.sha256, False)
    stored = inception_features(images, stand_in, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(change(*stored), file)
    with pytest.raises(UserError, match="damaged"):
        inception_features(images, stand_in, cache=tmp_path)


def test_a_damaged_image_is_one_line_from_a_worker_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ImageFiles(folder_of(tmp_path, random_images(5, 3)))
    files.files[1].write_bytes(files.files[1].read_bytes()[:300])
    monkeypatch.setattr("tokenbridge.evaluation.features.best_device", lambda: torch.device("cuda"))  # so that it asks
    with pytest.raises(UserError) as caught:
        list(forward(files, lambda x: (x,), 2, "test"))
    assert "000001.png has changed since its hash was taken" in str(caught.value)
    assert "\n" not in str(caught.value)
