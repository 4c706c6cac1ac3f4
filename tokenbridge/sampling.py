"""Generation: from class labels to tokens, one group of positions after another.

The loop has static shapes and never waits for the device: how many positions each iteration predicts is host
arithmetic (`masked_counts`), which ones is a slice of each image's order. Conditional and unconditional halves
run as one batch; the last decoder block runs for predicted positions only; guidance mixes decoder features, so
the head runs once. Source: models/tokenbridge.py, `sample_tokens`.

Randomness: every image has a stream of its own, made from (seed, image index): its order and one uniform number
for every token. An image does not depend on the batch it was made in.

Shape letters: B batch, L positions, C channels, V levels, K positions of an iteration, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tokenbridge.data import images_to_pixels
from tokenbridge.generator import TokenBridge
from tokenbridge.heads import FirstElement, Pick
from tokenbridge.orders import guidance_at, masked_counts
from tokenbridge.tokenizers import LatentTokenizer
from tokenbridge.transformer import take


@dataclass(frozen=True)
class SamplingConfig:
    """Everything that decides which image a seed gives."""

    num_iterations: int = 256
    guidance_scale: float = 1.0  # 1 means no guidance
    guidance_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0  # divides the logits; 0 takes the most likely token
    position_order: Literal["random", "raster", "confidence"] = "random"
    first_element: FirstElement = "official"

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"The number of iterations must be at least 1, not {self.num_iterations}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"The guidance scale must be at least 0, not {self.guidance_scale}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"The temperature must be at least 0, not {self.temperature}.")
        if self.position_order not in ("random", "raster", "confidence"):
            raise ValueError(f"Unknown position order {self.position_order!r}.")


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END (as in the official code)
    uniforms: Tensor  # [B, L, C] in [0, 1): one for every token, by position and place in generation order


def image_noise(seed: int, image_indices: list[int], num_positions: int, num_channels: int) -> ImageNoise:
    """Draw each image's stream from (seed, image index), on the CPU so that every device sees the same."""
    if seed < 0:
        raise ValueError(f"A seed is at least 0, not {seed}.")
    orders, uniforms = [], []
    for index in image_indices:
        stream = np.random.default_rng((seed, index))
        orders.append(stream.permutation(num_positions))
        uniforms.append(stream.random((num_positions, num_channels), dtype=np.float32))
    return ImageNoise(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(uniforms)))


@torch.inference_mode()
def generate_tokens(
    model: TokenBridge,
    labels: Tensor | None,
    config: SamplingConfig,
    noise: ImageNoise,
    *,
    on_iteration: Callable[[], object] | None = None,
) -> Tensor:
    """Generate the tokens of a batch of images.

    Args:
        model: in evaluation mode.
        labels: [B] class labels; None generates without a class.
        config: how to sample.
        noise: orders and uniform numbers of these images.
        on_iteration: called after each iteration, for a progress bar; the device may still be at work then.

    Returns:
        tokens [B, L, C] int64, in the latents' channel order.

    Raises:
        ValueError: labels out of range, or more iterations than positions.
    """
    device = model.device
    orders, uniforms = noise.orders.to(device), noise.uniforms.to(device)
    batch, length = orders.shape
    if labels is not None:
        _check_labels(labels, batch, model.num_classes)
        labels = labels.to(device)
    if config.position_order == "raster":
        orders = torch.arange(length - 1, -1, -1, device=device).expand(batch, -1)
    # An index tensor once: indexing with the tuple would copy it to the device, and wait, in every iteration.
    to_latent_order = torch.tensor(model.inverse_channel_order, device=device)
    tokens = torch.zeros(batch, length, model.num_channels, dtype=torch.int64, device=device)
    num_masked = length
    for still_masked in masked_counts(length, config.num_iterations):
        guidance = guidance_at(config.guidance_scale, config.guidance_schedule, length, still_masked)
        visible = orders[:, num_masked:].sort(dim=1).values
        # Orders by confidence are decided as we go: try all masked positions, then keep the surest.
        first = 0 if config.position_order == "confidence" else still_masked
        positions = orders[:, first:num_masked]
        z = _guided_context(model, tokens, visible, positions, labels, guidance)
        pick = _picker(config.temperature, take(uniforms, positions).flatten(0, 1))
        chosen, log_probs = model.head.sample(z.flatten(0, 1), pick, first=config.first_element)
        chosen = chosen.unflatten(0, positions.shape)
        if config.position_order == "confidence":
            confidence = log_probs.sum(-1).unflatten(0, positions.shape)
            by_confidence = confidence.argsort(dim=1)  # the surest last, where orders are consumed
            orders = torch.cat([take(positions, by_confidence), orders[:, num_masked:]], dim=1)
            positions = orders[:, still_masked:num_masked]
            chosen = take(chosen, by_confidence[:, still_masked:num_masked])
        places = positions[..., None].expand(-1, -1, model.num_channels)
        tokens.scatter_(1, places, chosen[..., to_latent_order])
        num_masked = still_masked
        if on_iteration is not None:
            on_iteration()
    return tokens


def sample_images(
    model: TokenBridge,
    tokenizer: LatentTokenizer,
    config: SamplingConfig,
    labels: Tensor,
    seed: int,
    *,
    batch_size: int = 250,
    show_progress: bool = True,
) -> Tensor:
    """Generate one image for each label; image i is a function of the seed, its label and i alone.

    Args:
        model: in evaluation mode.
        tokenizer: decodes the model's latents.
        config: how to sample.
        labels: [N] class labels, N >= 1.
        seed: at least 0.
        batch_size: images at a time.
        show_progress: draw a progress bar on stderr.

    Returns:
        uint8 pixels [N, C, H, W] on the CPU.

    Raises:
        ValueError: no labels, labels out of range, a negative seed, more iterations than positions.
    """
    pixels = []
    for indices in image_batches(len(labels), batch_size, show_progress=show_progress):
        noise = image_noise(seed, indices, model.num_positions, model.num_channels)
        tokens = generate_tokens(model, labels[indices], config, noise)
        pixels.append(images_to_pixels(tokenizer.images(model.to_latents(tokens))).cpu())
    return torch.cat(pixels)


def image_batches(num_images: int, batch_size: int, *, show_progress: bool) -> Iterator[list[int]]:
    """Yield the indices of each batch of images, with a progress bar on stderr.

    Raises:
        ValueError: there are no images.
    """
    if num_images < 1:
        raise ValueError("The number of images must be at least 1.")
    starts = range(0, num_images, batch_size)
    console = Console(stderr=True)
    for start in track(starts, "sample", console=console, transient=True, disable=not show_progress):
        yield list(range(start, min(start + batch_size, num_images)))


def _guided_context(
    model: TokenBridge,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    guidance: float,
) -> Tensor:
    """Return z [B, K, D], conditional and unconditional mixed: z_u + guidance (z_c - z_u)."""
    if labels is None or guidance == 1.0:
        return model.context(tokens, visible, labels, positions=positions)
    dropped = torch.arange(2, device=tokens.device).repeat_interleave(tokens.shape[0]).bool()
    z = model.context(
        tokens.repeat(2, 1, 1),
        visible.repeat(2, 1),
        labels.repeat(2),
        dropped=dropped,
        positions=positions.repeat(2, 1),
    )
    conditional, unconditional = z.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _picker(temperature: float, uniforms: Tensor, keep: Callable[[Tensor], Tensor] | None = None) -> Pick:
    """Return the function that chooses tokens: the inverse of the cumulative distribution at uniforms [N, C].

    `keep`, if given, sets logits [N, V] to -inf after they were divided by the temperature, for top-k and the like.
    """
    if temperature == 0:
        return lambda logits, place: logits.argmax(-1)

    def pick(logits: Tensor, place: int) -> Tensor:
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
        if keep is not None:
            scaled = keep(scaled)
        cumulative = scaled.softmax(-1).cumsum(-1)
        threshold = uniforms[:, place, None] * cumulative[:, -1:]  # rounding: the sum is not exactly 1
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return pick


def _check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    if list(labels.shape) != [batch]:
        raise ValueError(f"There must be one label for each of {batch} images, not labels {list(labels.shape)}.")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(
            f"Class labels span [{int(labels.min())}, {int(labels.max())}], "
            f"but the model has the classes 0 to {num_classes - 1}."
        )
