"""Tables of encoded images; tests/training/test_training.py has those of latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Sequence, Value
from PIL import Image
from torch import Tensor

from tokenbridge.data.latents import encode_images

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 4), dtype=np.uint8)


def first_row(images: Tensor) -> Tensor:
    """Encode an image as its first row of pixels, in whole numbers: it tells images and their mirror images apart."""
    return (images[:, 0, 0] * 127.5 + 127.5).round().long()


def encoded(images: dict[str, Any], *, with_mirrored: bool, batch_size: int = 3) -> dict[str, list[Any]]:
    table = encode_images(
        Dataset.from_dict(images),
        first_row,
        "tokens",
        Sequence(Value("int64")),
        image_size=None,
        channels=1,
        with_mirrored=with_mirrored,
        batch_size=batch_size,
    )
    rows = table.with_format("torch")[:]
    assert all(value.dtype == torch.int64 for value in rows.values())
    return {name: value.tolist() for name, value in rows.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rows_are_in_the_order_of_the_images(batch_size: int) -> None:
    images = {"image": [Image.fromarray(x) for x in PIXELS], "label": [i % 3 for i in range(7)]}
    expected = {
        "tokens": PIXELS[:, 0].tolist(),
        "tokens_mirrored": PIXELS[:, 0, ::-1].tolist(),
        "label": images["label"],
    }
    assert encoded(images, with_mirrored=True, batch_size=batch_size) == expected
    assert encoded({"image": images["image"]}, with_mirrored=False) == {"tokens": expected["tokens"]}
