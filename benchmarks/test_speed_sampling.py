"""One sampling step with guidance, with half of the positions known, against two passes that skip nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.conftest import SideBySide
from benchmarks.models import make_model
from benchmarks.reference import reference_of
from benchmarks.steps import Step, official_arguments
from tokenbridge.models.noise import image_noise
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate_tokens

GUIDANCE = 3.0


@pytest.mark.parametrize(
    ("size", "batch", "num_iterations"),
    [("tiny", 64, 16), ("medium", 1, 256), ("medium", 1, 16)],  # the tiny recipe predicts one position at a time
)
@torch.inference_mode()
def test_sampling_step(side_by_side: SideBySide, size: str, batch: int, num_iterations: int) -> None:
    model = make_model(size)
    length, channels = model.num_positions, model.num_channels
    step = Step(
        model=model,
        reference=reference_of(model),
        config=TokenBridgeSampling(num_iterations=num_iterations, guidance_scale=GUIDANCE),
        number=num_iterations // 2,
        labels=torch.arange(batch) % model.num_classes,
        noise=image_noise(0, list(range(batch)), length, channels),
        tokens=torch.randint(model.quantizer.num_levels, (batch, length, channels)),
    )
    assert torch.equal(step.fast(), step.plain())
    num_predicted = step.num_masked - step.num_masked_after
    name = f"sampling step, {size}, {batch} image{'s'[: batch > 1]}, {num_predicted} of {length} positions"
    side_by_side(name, step.fast, step.plain, rounds=7)


@torch.inference_mode()
def test_whole_generation_equals_the_reference() -> None:
    """The step above is a copy of the loop's body, so the loop itself is compared with the reference too."""
    model = make_model("tiny")
    config = TokenBridgeSampling(num_iterations=5, guidance_scale=GUIDANCE, temperature=0.9)
    labels = torch.arange(8)
    noise = image_noise(0, list(range(8)), model.num_positions, model.num_channels)
    theirs = reference_of(model).sample_tokens(labels, noise.orders, official_arguments(config), noise.uniforms)
    assert torch.equal(generate_tokens(model, labels, config, noise), theirs)
