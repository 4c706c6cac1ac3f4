"""Generation: from class labels to tokens, one group of positions after another.

The loop has static shapes and never waits for the device: how many positions each iteration predicts is host
arithmetic (`masked_counts`), which ones is a slice of each image's order. Conditional and unconditional halves
run as one batch; the last decoder block runs for predicted positions only; guidance mixes decoder features, so
the head runs once. Source: models/tokenbridge.py, `sample_tokens`.

What other masked generators share with it (`mar.py`): the iterations, the doubled batch, the streams, the batches.

Randomness: every image has a stream of its own, made from (seed, image index): its order and one uniform number
for every token. An image does not depend on the batch it was made in. Or, to follow the official code's draws,
numpy's and torch's global streams (`global_noise`).

Shape letters: B batch, L positions, C channels, V levels, K positions of an iteration, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

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
class MaskedSamplingConfig:
    """What decides the image of a seed in every masked generator."""

    num_iterations: int = 256
    guidance_scale: float = 1.0  # 1 means no guidance
    guidance_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"The number of iterations must be at least 1, not {self.num_iterations}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ValueError(f"The guidance scale must be at least 0, not {self.guidance_scale}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"The temperature must be at least 0, not {self.temperature}.")


@dataclass(frozen=True)
class SamplingConfig(MaskedSamplingConfig):
    """Everything that decides which image a seed gives; the temperature divides the logits, 0 takes the likeliest."""

    position_order: Literal["random", "raster", "confidence"] = "random"
    first_element: FirstElement = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_order not in ("random", "raster", "confidence"):
            raise ValueError(f"Unknown position order {self.position_order!r}.")
        if self.first_element not in get_args(FirstElement):
            raise ValueError(f"Unknown first element {self.first_element!r}; there are {get_args(FirstElement)}.")


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of a batch of images."""

    orders: Tensor  # [B, L] int64; an order is consumed from its END (as in the official code)
    # [B, L, C] in [0, 1): one for every token, by position and place in generation order. None: tokens are drawn
    # from torch's global stream as they come.
    uniforms: Tensor | None


class MaskedGenerator(Protocol):
    """A model of masked positions: TokenBridge, or MAR with latents for tokens."""

    def context(
        self,
        tokens: Tensor,
        visible: Tensor,
        labels: Tensor | None,
        /,
        *,
        dropped: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the context z of positions; see `TokenBridge.context`."""
        ...


@dataclass(frozen=True)
class Iteration:
    """One iteration: an order's first `num_masked` positions are masked before it, `still_masked` after it."""

    num_masked: int
    still_masked: int
    guidance: float

    def visible(self, orders: Tensor) -> Tensor:
        """Return the visible positions of orders [B, L], rising in each row."""
        return orders[:, self.num_masked :].sort(dim=1).values


def iterations(config: MaskedSamplingConfig, num_positions: int) -> Iterator[Iteration]:
    """Yield the iterations of a generation.

    Raises:
        ValueError: more iterations than positions.
    """
    num_masked = num_positions
    for still_masked in masked_counts(num_positions, config.num_iterations):
        guidance = guidance_at(config.guidance_scale, config.guidance_schedule, num_positions, still_masked)
        yield Iteration(num_masked, still_masked, guidance)
        num_masked = still_masked


def image_streams(seed: int, image_indices: list[int]) -> list[np.random.Generator]:
    """Return each image's own random stream, made from (seed, image index)."""
    if seed < 0:
        raise ValueError(f"A seed is at least 0, not {seed}.")
    return [np.random.default_rng((seed, index)) for index in image_indices]


def image_noise(seed: int, image_indices: list[int], num_positions: int, num_channels: int) -> ImageNoise:
    """Draw each image's stream from (seed, image index), on the CPU so that every device sees the same."""
    orders, uniforms = [], []
    for stream in image_streams(seed, image_indices):
        orders.append(stream.permutation(num_positions))
        uniforms.append(stream.random((num_positions, num_channels), dtype=np.float32))
    return ImageNoise(torch.from_numpy(np.stack(orders)), torch.from_numpy(np.stack(uniforms)))


def global_noise(num_images: int, num_positions: int) -> ImageNoise:
    """Draw orders from numpy's global stream, and leave the tokens to torch's, as the official code does.

    Source: models/tokenbridge.py, `sample_orders`: one shuffle of the positions for each image in turn.
    """
    orders = [np.random.permutation(num_positions) for _ in range(num_images)]  # noqa: NPY002  the official generator
    return ImageNoise(torch.from_numpy(np.stack(orders)), None)


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
        tokens [B, L, C] int64, in the latents' channel order; -1 where the logits were NaN.

    Raises:
        ValueError: labels out of range, or more iterations than positions.
    """
    device = model.device
    orders = noise.orders.to(device)
    uniforms = None if noise.uniforms is None else noise.uniforms.to(device)
    batch, length = orders.shape
    if labels is not None:
        check_labels(labels, batch, model.num_classes)
        labels = labels.to(device)
    if config.position_order == "raster":
        orders = torch.arange(length - 1, -1, -1, device=device).expand(batch, -1)
    # An index tensor once: indexing with the tuple would copy it to the device, and wait, in every iteration.
    to_latent_order = torch.tensor(model.inverse_channel_order, device=device)
    tokens = torch.zeros(batch, length, model.num_channels, dtype=torch.int64, device=device)
    for iteration in iterations(config, length):
        num_masked, still_masked = iteration.num_masked, iteration.still_masked
        visible = iteration.visible(orders)
        # Orders by confidence are decided as we go: try all masked positions, then keep the surest.
        first = 0 if config.position_order == "confidence" else still_masked
        positions = orders[:, first:num_masked]
        if uniforms is None:
            positions = positions.sort(dim=1).values  # the official code draws for rising positions
        z = _guided_context(model, tokens, visible, positions, labels, iteration.guidance)
        pick = _picker(config.temperature, None if uniforms is None else take(uniforms, positions).flatten(0, 1))
        chosen, log_probs = model.head.sample(z.flatten(0, 1), pick, first=config.first_element)
        # Whatever is picked by NaN logits is a valid token: mark it, so that one look at the end finds it.
        chosen = chosen.masked_fill(log_probs.isnan(), -1).unflatten(0, positions.shape)
        if config.position_order == "confidence":
            confidence = log_probs.sum(-1).unflatten(0, positions.shape)
            by_confidence = confidence.argsort(dim=1)  # the surest last, where orders are consumed
            orders = torch.cat([take(positions, by_confidence), orders[:, num_masked:]], dim=1)
            positions = orders[:, still_masked:num_masked]
            chosen = take(chosen, by_confidence[:, still_masked:num_masked])
        places = positions[..., None].expand(-1, -1, model.num_channels)
        tokens.scatter_(1, places, chosen[..., to_latent_order])
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

    def latents(indices: list[int]) -> Tensor:
        noise = image_noise(seed, indices, model.num_positions, model.num_channels)
        return model.to_latents(generate_tokens(model, labels[indices], config, noise))

    return decode_in_batches(latents, tokenizer, len(labels), batch_size=batch_size, show_progress=show_progress)


def decode_in_batches(
    latents: Callable[[list[int]], Tensor],
    tokenizer: LatentTokenizer,
    num_images: int,
    *,
    batch_size: int,
    show_progress: bool,
) -> Tensor:
    """Return the pixels of all images, uint8 [N, C, H, W] on the CPU, one batch after another.

    Args:
        latents: makes the latents [B, C, H, W] of the images with the given indices.
        tokenizer: decodes them.
        num_images: N, at least 1.
        batch_size: images at a time.
        show_progress: draw a progress bar on stderr.

    Raises:
        ValueError: no images.
    """
    batches = image_batches(num_images, batch_size, show_progress=show_progress)
    return torch.cat([images_to_pixels(tokenizer.images(latents(indices))).cpu() for indices in batches])


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


def contexts(
    model: MaskedGenerator,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    guidance: float,
) -> Tensor:
    """Return z of `positions`: with the class, [B, K, D], or with it and then without, [2B, K, D], in one batch."""
    if labels is None or guidance == 1.0:
        return model.context(tokens, visible, labels, positions=positions)
    return model.context(
        tokens.repeat(2, 1, 1),
        visible.repeat(2, 1),
        labels.repeat(2),
        dropped=torch.arange(2, device=tokens.device).repeat_interleave(tokens.shape[0]).bool(),
        positions=positions.repeat(2, 1),
    )


def _guided_context(
    model: TokenBridge,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    guidance: float,
) -> Tensor:
    """Return z [B, K, D], conditional and unconditional mixed: z_u + guidance (z_c - z_u)."""
    z = contexts(model, tokens, visible, positions, labels, guidance)
    if len(z) == len(tokens):
        return z
    conditional, unconditional = z.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _picker(temperature: float, uniforms: Tensor | None, keep: Callable[[Tensor], Tensor] | None = None) -> Pick:
    """Return the function that chooses tokens: the inverse of the cumulative distribution at uniforms [N, C].

    Without uniforms: what torch.multinomial draws from the global stream, without its wait for the device.
    `keep`, if given, sets logits [N, V] to -inf after they were divided by the temperature, for top-k and the like.
    """
    if temperature == 0:
        return lambda logits, place: logits.argmax(-1)

    def probabilities(logits: Tensor) -> Tensor:
        logits = logits.float()
        scaled = (logits - logits.amax(-1, keepdim=True)) / temperature  # the largest is 0 at any temperature
        return (scaled if keep is None else keep(scaled)).softmax(-1)

    def race(logits: Tensor, place: int) -> Tensor:
        p = probabilities(logits)
        return (p / torch.empty_like(p).exponential_()).argmax(-1)

    if uniforms is None:
        return race

    def pick(logits: Tensor, place: int) -> Tensor:
        cumulative = probabilities(logits).cumsum(-1)
        threshold = uniforms[:, place, None] * cumulative[:, -1:]  # rounding: the sum is not exactly 1
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return pick


def check_labels(labels: Tensor, batch: int, num_classes: int) -> None:
    """Refuse labels of other classes, or not one for each image.

    Raises:
        ValueError: so.
    """
    if list(labels.shape) != [batch]:
        raise ValueError(f"There must be one label for each of {batch} images, not labels {list(labels.shape)}.")
    if labels.numel() and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(
            f"Class labels span [{int(labels.min())}, {int(labels.max())}], "
            f"but the model has the classes 0 to {num_classes - 1}."
        )
