"""One iteration of sampling, by the package and by the reference path.

Shape letters: B batch, L positions, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.reference import Reference, SampleArguments
from tokenbridge.models.draw import token_chooser
from tokenbridge.models.layers import take
from tokenbridge.models.masked_sampling import guidance_at, masked_counts
from tokenbridge.models.noise import ImageNoise
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, _guided_context


@dataclass(frozen=True)
class Step:
    """An iteration of `generate_tokens`, in the middle of a run."""

    model: TokenBridge
    reference: Reference
    config: TokenBridgeSampling
    number: int  # of the iteration, from 0
    labels: Tensor  # [B]
    noise: ImageNoise
    tokens: Tensor  # [B, L, C] before the iteration; those of masked positions have no effect

    @property
    def num_masked(self) -> int:
        """Number of positions that are masked before the iteration."""
        length = self.model.num_positions
        return [length, *masked_counts(length, self.config.num_iterations)][self.number]

    @property
    def num_masked_after(self) -> int:
        """Number of positions that are masked after the iteration."""
        return masked_counts(self.model.num_positions, self.config.num_iterations)[self.number]

    def fast(self) -> Tensor:
        """Run the body of the loop of `generate_tokens`; return tokens [B, L, C]."""
        orders = self.noise.orders
        c = self.config
        guidance = guidance_at(c.guidance_scale, c.guidance_schedule, self.model.num_positions, self.num_masked_after)
        visible = orders[:, self.num_masked :].sort(dim=1).values
        positions = orders[:, self.num_masked_after : self.num_masked]
        z = _guided_context(self.model, self.tokens, visible, positions, self.labels, guidance)
        pick = token_chooser(c.temperature, take(self.noise.uniforms, positions).flatten(0, 1))
        chosen, _ = self.model.head.sample(z.flatten(0, 1), pick, first=c.first_element)
        chosen = chosen.unflatten(0, positions.shape)[..., self.model.inverse_channel_order]
        return self.tokens.scatter(1, positions[..., None].expand_as(chosen), chosen)

    def plain(self) -> Tensor:
        """Run the same iteration by the reference path."""
        masked = self.noise.orders[:, : self.num_masked]
        mask = torch.zeros_like(self.noise.orders, dtype=torch.float32).scatter(1, masked, 1.0)
        arguments = official_arguments(self.config)
        tokens, _ = self.reference.sampling_step(
            self.tokens, mask, self.labels, self.noise.orders, self.number, arguments, self.noise.uniforms
        )
        return tokens


def official_arguments(config: TokenBridgeSampling) -> SampleArguments:
    """Return the official sampler's arguments for `config`."""
    assert config.position_order == "random", "the official sampler has no other order"
    assert config.first_element == "official"
    return SampleArguments(
        num_iter=config.num_iterations,
        cfg=config.guidance_scale,
        cfg_schedule=config.guidance_schedule,
        temperature=config.temperature,
    )


def to_device(noise: ImageNoise, device: torch.device) -> ImageNoise:
    """Move the random numbers to the device, so that this is not part of a step's time."""
    return replace(noise, orders=noise.orders.to(device), uniforms=noise.uniforms.to(device))
