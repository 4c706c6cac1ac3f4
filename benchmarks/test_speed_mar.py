"""One sampling iteration of MAR with guidance, with half of the positions known, against a plain one.

The plain iteration has the structure of the official code. It takes two passes through the backbone and decodes every
position. Its head embeds timestep and context again for every row in each diffusion step, and runs both halves to the
end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.conftest import SideBySide
from tokenbridge.models.mar.diffusion import Diffusion, diffusion_process
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.sampling import MarSampling, generate_latents, latent_noise
from tokenbridge.models.masked_sampling import contexts, guidance_at, masked_counts

GUIDANCE = 3.0
TINY: dict[str, Any] = {
    "latent_size": 4,
    "num_channels": 16,
    "num_classes": 10,
    "width": 112,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "num_heads": 4,
    "num_buffer": 4,
    "head_width": 128,
    "head_depth": 3,
}
MEDIUM: dict[str, Any] = {
    **TINY,
    "latent_size": 16,
    "width": 256,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "num_heads": 8,
    "num_buffer": 16,
    "head_width": 256,
}


def make_model(sizes: dict[str, Any]) -> MAR:
    """Return a model in which every parameter matters, since at initialisation the head predicts 0."""
    torch.manual_seed(0)
    model = MAR(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@dataclass(frozen=True)
class Step:
    """One iteration of `generation`."""

    model: MAR
    process: Diffusion
    sequence: Tensor  # [B, L, C]
    labels: Tensor  # [B]
    orders: Tensor  # [B, L]
    noise: Tensor  # [1 + S, B, K, C]
    num_masked: int  # before the step
    still_masked: int  # after it
    guidance: float

    def fast(self) -> Tensor:
        """Run the body of the loop of `generation`."""
        visible = self.orders[:, self.num_masked :].sort(dim=1).values
        positions = self.orders[:, self.still_masked : self.num_masked].sort(dim=1).values
        z = contexts(self.model, self.sequence, visible, positions, self.labels, self.guidance)
        *_, x = self.model.head.sample(self.process, z.flatten(0, 1), self.noise.flatten(1, 2), guidance=self.guidance)
        predicted = x.unflatten(0, positions.shape)
        return self.sequence.scatter(1, positions[..., None].expand_as(predicted), predicted)

    def reference(self) -> Tensor:
        """Run the same iteration from boolean masks, with nothing shared and nothing skipped."""
        masked, remaining = (before(self.orders, n) for n in (self.num_masked, self.still_masked))
        predicted = masked & ~remaining
        net, head = self.model.backbone, self.model.head
        embeddings = (net.class_emb(self.labels), net.fake_latent.repeat(len(self.sequence), 1))
        z = torch.cat([reference.backbone_context(net, self.sequence, masked, e)[predicted] for e in embeddings])
        noise = self.noise.flatten(1, 2).repeat(1, 2, 1)
        num_rows, num_channels = len(z) // 2, self.model.num_channels
        x = noise[0]
        for t, step_noise in zip(reversed(range(self.process.num_steps)), noise[1:], strict=True):
            x = torch.cat([x[:num_rows], x[:num_rows]])
            output = head(x, self.process.timesteps[t].expand(len(x)), z)
            hat, variance = output.split(num_channels, dim=1)
            conditional, unconditional = hat.chunk(2)
            hat = (unconditional + self.guidance * (conditional - unconditional)).repeat(2, 1)
            x = self.process.step(x, t, torch.cat([hat, variance], dim=1), step_noise)
        result = self.sequence.clone()
        result[predicted] = x[:num_rows]
        return result


def before(orders: Tensor, count: int) -> Tensor:
    """Return a mask [B, L] that is true at the first `count` positions of orders [B, L]."""
    return torch.zeros_like(orders, dtype=torch.bool).scatter(1, orders[:, :count], True)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether the two agree to four digits of the largest value.

    Rounding errors of the first diffusion step are multiplied by 1 / signal, which is 2e4.
    """
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.mark.parametrize(
    ("size", "batch", "num_predicted", "num_steps"), [("tiny", 64, 1, 100), ("medium", 4, 1, 25), ("medium", 4, 16, 25)]
)
@torch.inference_mode()
def test_sampling_iteration(
    side_by_side: SideBySide, size: str, batch: int, num_predicted: int, num_steps: int
) -> None:
    model = make_model({"tiny": TINY, "medium": MEDIUM}[size])
    length, channels = model.num_positions, model.num_channels
    noise = latent_noise(0, list(range(batch)), length, channels)
    step = Step(
        model=model,
        process=diffusion_process(num_steps),
        sequence=torch.randn(batch, length, channels),
        labels=torch.arange(batch) % model.num_classes,
        orders=noise.orders,
        noise=noise.draw(num_predicted, num_steps),
        num_masked=length // 2,
        still_masked=length // 2 - num_predicted,
        guidance=GUIDANCE,
    )
    assert close(step.fast(), step.reference())
    name = f"MAR iteration, {size}, {batch} images, {num_predicted} of {length} positions, {num_steps} steps"
    side_by_side(name, step.fast, step.reference, rounds=7)


@torch.inference_mode()
def test_whole_generation_equals_the_reference() -> None:
    """The iteration above is a copy of the loop's body, so the loop itself is compared with the reference too."""
    model = make_model(TINY)
    config = MarSampling(num_iterations=5, guidance_scale=GUIDANCE, num_diffusion_steps=10)
    labels, length = torch.arange(8), model.num_positions
    ours, theirs = (latent_noise(0, list(range(8)), length, model.num_channels) for _ in range(2))
    sequence = torch.zeros(8, length, model.num_channels)
    num_masked = length
    for still_masked in masked_counts(length, config.num_iterations):
        noise = theirs.draw(num_masked - still_masked, 10)
        guidance = guidance_at(GUIDANCE, "linear", length, still_masked)
        process = diffusion_process(10)
        step = Step(model, process, sequence, labels, theirs.orders, noise, num_masked, still_masked, guidance)
        sequence, num_masked = step.reference(), still_masked
    assert close(generate_latents(model, labels, config, ours), model.to_latents(sequence))
