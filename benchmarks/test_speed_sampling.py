"""One sampling step with guidance, half of the positions known, against two passes with nothing skipped."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.conftest import SideBySide
from benchmarks.models import make_model
from tokenbridge.generator import TokenBridge
from tokenbridge.orders import guidance_at, masked_counts
from tokenbridge.sampling import ImageNoise, SamplingConfig, _guided_context, _picker, generate_tokens, image_noise
from tokenbridge.transformer import take

GUIDANCE = 3.0


@dataclass(frozen=True)
class Step:
    """One iteration of `generate_tokens`, halfway."""

    model: TokenBridge
    tokens: Tensor  # [B, L, C]
    labels: Tensor  # [B]
    noise: ImageNoise
    num_masked: int  # before the step
    still_masked: int  # after it

    def fast(self) -> Tensor:
        """Do what the body of `generate_tokens`' loop does."""
        orders = self.noise.orders
        visible = orders[:, self.num_masked :].sort(dim=1).values
        positions = orders[:, self.still_masked : self.num_masked]
        z = _guided_context(self.model, self.tokens, visible, positions, self.labels, GUIDANCE)
        pick = _picker(1.0, take(self.noise.uniforms, positions).flatten(0, 1))
        chosen, _ = self.model.head.sample(z.flatten(0, 1), pick)
        chosen = chosen.unflatten(0, positions.shape)[..., self.model.inverse_channel_order]
        return self.tokens.scatter(1, positions[..., None].expand_as(chosen), chosen)

    def reference(self) -> Tensor:
        """Do the same from boolean masks."""
        masked, remaining = (before(self.noise.orders, n) for n in (self.num_masked, self.still_masked))
        predicted = masked & ~remaining
        return reference.sampling_step(
            self.model, self.tokens, masked, predicted, self.labels, GUIDANCE, self.noise.uniforms
        )


def before(orders: Tensor, count: int) -> Tensor:
    """Return where the first `count` positions of orders [B, L] are, [B, L] bool."""
    return torch.zeros_like(orders, dtype=torch.bool).scatter(1, orders[:, :count], True)


@pytest.mark.parametrize(
    ("size", "batch", "num_predicted"),
    [("tiny", 64, 1), ("medium", 1, 1), ("medium", 1, 16)],  # the tiny recipe predicts one position at a time
)
@torch.inference_mode()
def test_sampling_step(side_by_side: SideBySide, size: str, batch: int, num_predicted: int) -> None:
    model = make_model(size)
    length, channels = model.num_positions, model.num_channels
    step = Step(
        model=model,
        tokens=torch.randint(model.quantizer.num_levels, (batch, length, channels)),
        labels=torch.arange(batch) % model.num_classes,
        noise=image_noise(0, list(range(batch)), length, channels),
        num_masked=length // 2,
        still_masked=length // 2 - num_predicted,
    )
    assert torch.equal(step.fast(), step.reference())
    name = f"sampling step, {size}, {batch} image{'s'[: batch > 1]}, {num_predicted} of {length} positions"
    side_by_side(name, step.fast, step.reference, rounds=7)


@torch.inference_mode()
def test_whole_generation_equals_the_reference() -> None:
    """The step above is a copy of the loop's body; this holds the loop itself to the reference."""
    model = make_model("tiny")
    config = SamplingConfig(num_iterations=5, guidance_scale=GUIDANCE)
    labels = torch.arange(8)
    length = model.num_positions
    noise = image_noise(0, list(range(8)), length, model.num_channels)
    tokens = torch.zeros(8, length, model.num_channels, dtype=torch.int64)
    masked = torch.ones(8, length, dtype=torch.bool)
    for still_masked in masked_counts(length, config.num_iterations):
        remaining = before(noise.orders, still_masked)
        guidance = guidance_at(GUIDANCE, "linear", length, still_masked)
        tokens = reference.sampling_step(model, tokens, masked, masked & ~remaining, labels, guidance, noise.uniforms)
        masked = remaining
    assert torch.equal(generate_tokens(model, labels, config, noise), tokens)
