"""Sampling MAR: masked iterations, with diffusion at every predicted position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenbridge.models.draw import check_labels
from tokenbridge.models.mar.diffusion import diffusion_process, spaced_timesteps
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.masked_sampling import Iteration, MaskedSampling, contexts, iterations
from tokenbridge.models.noise import Noise, Official, image_streams
from tokenbridge.models.noise import global_noise as global_orders


@dataclass(frozen=True)
class MarSampling(MaskedSampling):
    """Everything that decides which image a seed gives; the temperature multiplies the noise of diffusion steps."""

    num_diffusion_steps: int | str = 100  # or another spacing of the 1,000, see `spaced_timesteps`

    def __post_init__(self) -> None:
        super().__post_init__()
        spaced_timesteps(self.num_diffusion_steps)


@dataclass(frozen=True)
class LatentNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END (as in the official code)
    # Of the next K positions of every image: (K, S) to standard normal [1 + S, B, K, C], initial noise and steps.
    draw: Callable[[int, int], Tensor]


def latent_noise(seed: int, image_indices: Sequence[int], num_positions: int, num_channels: int) -> LatentNoise:
    """Open each image's stream, on the CPU so that every device sees the same.

    Noise is drawn when an iteration needs it: all of MAR-L's would be 26 MB an image.
    """
    streams = image_streams(seed, image_indices)
    orders = np.stack([stream.permutation(num_positions) for stream in streams])

    def draw(num_drawn: int, num_steps: int) -> Tensor:
        shape = 1 + num_steps, num_drawn, num_channels
        noise = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams], axis=1)
        return torch.from_numpy(noise)

    return LatentNoise(torch.from_numpy(orders), draw)


def global_noise(
    num_images: int, num_positions: int, num_channels: int, *, guided: bool, device: torch.device
) -> LatentNoise:
    """Draw from the global streams in the order of the official code, on the devices where it draws.

    Orders come from numpy's (`sampling.global_noise`); the initial noise from torch's on the CPU (diffloss.py,
    `sample`, moves it to the GPU); the noise of every step from torch's on the device (gaussian_diffusion.py,
    `p_sample`): with guidance for both halves, of which the first one counts.
    """

    def draw(num_drawn: int, num_steps: int) -> Tensor:
        rows = num_images * num_drawn
        initial = torch.randn(rows, num_channels).to(device)
        steps = [torch.randn(rows * (1 + guided), num_channels, device=device)[:rows] for _ in range(num_steps)]
        return torch.stack([initial, *steps]).unflatten(1, (num_images, num_drawn))

    return LatentNoise(global_orders(num_images, num_positions).orders, draw)


@dataclass(frozen=True)
class GenerationStep:
    """What an iteration did."""

    iteration: Iteration
    positions: Tensor  # predicted in it, [B, K], rising
    context: Tensor  # of them, [B, K, D]; with guidance [2B, K, D], with the class and then without
    predicted: Tensor  # [B, K, C]
    sequence: Tensor  # [B, L, C], with 0 at masked positions


@torch.inference_mode()
def generation(model: MAR, labels: Tensor | None, config: MarSampling, noise: LatentNoise) -> Iterator[GenerationStep]:
    """Generate the latents of a batch of images, one iteration after another; arguments as `generate_latents`."""
    device = model.device
    process = diffusion_process(config.num_diffusion_steps, device)
    orders = noise.orders.to(device)
    batch, length = orders.shape
    if labels is not None:
        check_labels(labels, batch, model.num_classes)
        labels = labels.to(device)
    sequence = torch.zeros(batch, length, model.num_channels, device=device)
    for iteration in iterations(config, length):
        # Rising, so that rows run as the official code's, whose noise goldens hold.
        positions = orders[:, iteration.still_masked : iteration.num_masked].sort(dim=1).values
        z = contexts(model, sequence, iteration.visible(orders), positions, labels, iteration.guidance)
        step_noise = noise.draw(positions.shape[1], process.num_steps).to(device).flatten(1, 2)
        predicted = step_noise[0]
        for x in model.head.sample(
            process, z.flatten(0, 1), step_noise, guidance=iteration.guidance, temperature=config.temperature
        ):
            predicted = x
        predicted = predicted.unflatten(0, positions.shape)
        sequence = sequence.scatter(1, positions[..., None].expand_as(predicted), predicted)
        yield GenerationStep(iteration, positions, z, predicted, sequence)


def generate_latents(model: MAR, labels: Tensor | None, config: MarSampling, noise: LatentNoise) -> Tensor:
    """Generate the latents of a batch of images.

    Args:
        model: in evaluation mode.
        labels: [B] class labels; None generates without a class.
        config: how to sample.
        noise: orders and random streams of these images.

    Returns:
        latents [B, c, H, W], float32.

    Raises:
        ValueError: labels out of range, or more iterations than positions.
    """
    sequence = torch.empty(0)
    for step in generation(model, labels, config, noise):
        sequence = step.sequence
    return model.to_latents(sequence)


def generate(model: MAR, labels: Tensor, settings: MarSampling, noise: Noise) -> Tensor:
    """Generate latents [B, c, H, W] of a batch of images from `noise`; otherwise as `generate_latents`."""
    length, channels = model.num_positions, model.num_channels
    if isinstance(noise, Official):
        guided = settings.guidance_scale != 1
        drawn = global_noise(len(labels), length, channels, guided=guided, device=model.device)
    else:
        drawn = latent_noise(noise.seed, noise.indices, length, channels)
    return generate_latents(model, labels, settings, drawn)
