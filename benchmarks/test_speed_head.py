"""The AR head with its key/value cache, against running the whole prefix for every channel."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import SideBySide
from benchmarks.models import make_model
from benchmarks.reference import draw, reference_of
from tokenbridge.models.tokenbridge.heads import ARHead


@pytest.mark.parametrize(("size", "num_positions"), [("tiny", 128), ("medium", 32)])
@torch.inference_mode()
def test_head(side_by_side: SideBySide, size: str, num_positions: int) -> None:
    model = make_model(size)
    head, reference = model.head, reference_of(model)
    assert isinstance(head, ARHead)
    context = torch.randn(num_positions, head.condition_proj.in_features)
    pick = draw(torch.rand(num_positions, head.num_channels))
    assert torch.equal(head.sample(context, pick)[0], reference.sample_channels(context, pick))
    side_by_side(
        f"head with cache, {size}, {num_positions} positions",
        lambda: head.sample(context, pick),
        lambda: reference.sample_channels(context, pick),
        rounds=7,
    )
