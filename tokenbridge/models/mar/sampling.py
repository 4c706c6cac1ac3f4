"""Sampling MAR: masked iterations, in which diffusion draws the latent of every predicted position.

Shape letters: B batch, L positions, K positions of an iteration, C channels of a position, S diffusion steps,
D backbone width.
"""

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
    """The sampling settings, which together with the seed and the label determine an image.

    The temperature multiplies the noise of the diffusion steps.
    """

    num_diffusion_steps: int | str = 100  # a number, or another spacing of the 1,000 steps (see `spaced_timesteps`)

    def __post_init__(self) -> None:
        super().__post_init__()
        spaced_timesteps(self.num_diffusion_steps)


@dataclass(frozen=True)
class LatentNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END, as in the official code
    # (K, S) -> standard normal [1 + S, B, K, C]: initial noise and noise of the steps for the next K positions.
    draw: Callable[[int, int], Tensor]


def latent_noise(seed: int, image_indices: Sequence[int], num_positions: int, num_channels: int) -> LatentNoise:
    """Open the stream of each image, on the CPU, so that the numbers are the same for every device.

    Noise is drawn when an iteration needs it, because all noise of one MAR-L image takes 26 MB.
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
    """Draw from the global streams in the order of the official code and on the same devices.

    Orders come from numpy's stream (`noise.global_noise`). The initial noise comes from torch's stream on the CPU
    (diffloss.py, `sample`, moves it to the GPU). The noise of every step comes from torch's stream on the device
    (gaussian_diffusion.py, `p_sample`); with guidance it is drawn for both halves, and the first half is used.
    """

    def draw(num_drawn: int, num_steps: int) -> Tensor:
        rows = num_images * num_drawn
        initial = torch.randn(rows, num_channels).to(device)
        steps = [torch.randn(rows * (1 + guided), num_channels, device=device)[:rows] for _ in range(num_steps)]
        return torch.stack([initial, *steps]).unflatten(1, (num_images, num_drawn))

    return LatentNoise(global_orders(num_images, num_positions).orders, draw)


@dataclass(frozen=True)
class GenerationStep:
    """The state after an iteration, and what the iteration computed."""

    iteration: Iteration
    positions: Tensor  # [B, K], the predicted positions, rising in each row
    context: Tensor  # [B, K, D], their context; with guidance [2B, K, D], first with the class and then without it
    predicted: Tensor  # [B, K, C], their latents
    sequence: Tensor  # [B, L, C], the latents of all positions so far, 0 at masked positions


@torch.inference_mode()
def generation(model: MAR, labels: Tensor | None, config: MarSampling, noise: LatentNoise) -> Iterator[GenerationStep]:
    """Generate the latents of a batch of images and yield every iteration; see `generate_latents` for the arguments."""
    device = model.device
    process = diffusion_process(config.num_diffusion_steps, device)
    orders = noise.orders.to(device)
    batch, length = orders.shape
    if labels is not None:
        check_labels(labels, batch, model.num_classes)
        labels = labels.to(device)
    sequence = torch.zeros(batch, length, model.num_channels, device=device)
    for iteration in iterations(config, length):
        # The official code draws noise in the order of rising positions, and golden cases hold its noise.
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
    """Generate the latents of a batch of images, float32 [B, c, H, W].

    Args:
        model: the model in evaluation mode.
        labels: [B]; None generates without a class.
        noise: orders and random streams of these images.

    Raises:
        UserError: a label is out of range, or there are more iterations than positions.
    """
    sequence = torch.empty(0)
    for step in generation(model, labels, config, noise):
        sequence = step.sequence
    return model.to_latents(sequence)


def generate(model: MAR, labels: Tensor, settings: MarSampling, noise: Noise) -> Tensor:
    """Draw the random numbers of a batch of images as `noise` says, and return its latents [B, c, H, W]."""
    length, channels = model.num_positions, model.num_channels
    if isinstance(noise, Official):
        guided = settings.guidance_scale != 1
        drawn = global_noise(len(labels), length, channels, guided=guided, device=model.device)
    else:
        drawn = latent_noise(noise.seed, noise.indices, length, channels)
    return generate_latents(model, labels, settings, drawn)
