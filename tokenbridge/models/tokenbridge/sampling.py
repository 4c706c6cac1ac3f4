"""Sampling TokenBridge: from class labels to tokens, one group of positions after another.

The loop has static shapes and never waits for the device: the host computes how many positions each iteration
predicts (`masked_counts`), and the positions are a slice of each image's order. The conditional and unconditional
halves run as one batch. The last decoder block runs only for the predicted positions. Guidance mixes decoder features,
so the head runs once. Source: models/tokenbridge.py, `sample_tokens`. `masked_sampling.py` holds what MAR shares.

With per-image randomness, every image has a stream of its own, seeded with (seed, image index), which gives its order
and one uniform number for every token, so an image does not depend on its batch. With official randomness
(`global_noise`), the draws follow the official code and come from numpy's and torch's global streams.

Shape letters: B batch, L positions, C channels, V levels, K positions of an iteration, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tokenbridge.models.draw import check_labels, token_chooser
from tokenbridge.models.layers import take
from tokenbridge.models.masked_sampling import MaskedSampling, contexts, iterations
from tokenbridge.models.noise import GlobalNoise, ImageNoise, Noise, Official, global_noise, image_noise
from tokenbridge.models.tokenbridge.heads import FirstElement
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.utils.errors import UserError

PositionOrder = Literal["random", "raster", "confidence"]


@dataclass(frozen=True)
class TokenBridgeSampling(MaskedSampling):
    """The sampling settings, which together with the seed and the label determine an image.

    The temperature divides the logits; at 0 the most likely token is chosen.
    """

    position_order: PositionOrder = "random"
    first_element: FirstElement = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_order not in get_args(PositionOrder):
            known = ", ".join(get_args(PositionOrder))
            raise UserError(f"Unknown position order {self.position_order!r}; there are {known}.")
        if self.first_element not in get_args(FirstElement):
            known = ", ".join(get_args(FirstElement))
            raise UserError(f"Unknown first element {self.first_element!r}; there are {known}.")


@torch.inference_mode()
def generate_tokens(
    model: TokenBridge,
    labels: Tensor | None,
    config: TokenBridgeSampling,
    noise: ImageNoise | GlobalNoise,
    *,
    on_iteration: Callable[[], object] | None = None,
) -> Tensor:
    """Generate the tokens of a batch of images.

    Args:
        model: the model in evaluation mode.
        labels: [B]; None generates without a class.
        noise: orders and uniform numbers of these images, or only their orders (`GlobalNoise`).
        on_iteration: a function that is called after each iteration, for a progress bar. The device may still be
            computing the iteration then.

    Returns:
        Tokens [B, L, C] int64 in the latents' channel order; they are -1 where the logits were NaN.

    Raises:
        UserError: a label is out of range, or there are more iterations than positions.
    """
    device = model.device
    orders = noise.orders.to(device)
    uniforms = noise.uniforms.to(device) if isinstance(noise, ImageNoise) else None
    batch, length = orders.shape
    if labels is not None:
        check_labels(labels, batch, model.num_classes)
        labels = labels.to(device)
    if config.position_order == "raster":
        orders = torch.arange(length - 1, -1, -1, device=device).expand(batch, -1)
    # Indexing with the tuple would copy it to the device, and wait for the device, in every iteration.
    to_latent_order = torch.tensor(model.inverse_channel_order, device=device)
    tokens = torch.zeros(batch, length, model.num_channels, dtype=torch.int64, device=device)
    for iteration in iterations(config, length):
        num_masked, still_masked = iteration.num_masked, iteration.still_masked
        visible = iteration.visible(orders)
        # An order by confidence is decided during sampling: predict all masked positions, then keep the surest.
        first = 0 if config.position_order == "confidence" else still_masked
        positions = orders[:, first:num_masked]
        if uniforms is None:
            positions = positions.sort(dim=1).values  # the official code draws in the order of rising positions
        z = _guided_context(model, tokens, visible, positions, labels, iteration.guidance)
        choose = token_chooser(
            config.temperature, None if uniforms is None else take(uniforms, positions).flatten(0, 1)
        )
        chosen, log_probs = model.head.sample(z.flatten(0, 1), choose, first=config.first_element)
        # NaN logits would give a valid token, so it is replaced by -1, which one check at the end of a batch finds.
        chosen = chosen.masked_fill(log_probs.isnan(), -1).unflatten(0, positions.shape)
        if config.position_order == "confidence":
            confidence = log_probs.sum(-1).unflatten(0, positions.shape)
            by_confidence = confidence.argsort(dim=1)  # the surest come last, because orders are consumed from the end
            orders = torch.cat([take(positions, by_confidence), orders[:, num_masked:]], dim=1)
            positions = orders[:, still_masked:num_masked]
            chosen = take(chosen, by_confidence[:, still_masked:num_masked])
        places = positions[..., None].expand(-1, -1, model.num_channels)
        tokens.scatter_(1, places, chosen[..., to_latent_order])
        if on_iteration is not None:
            on_iteration()
    return tokens


def _guided_context(
    model: TokenBridge,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    guidance: float,
) -> Tensor:
    """Return the guided context z_u + guidance (z_c - z_u), [B, K, D], of the contexts with and without the class."""
    z = contexts(model, tokens, visible, positions, labels, guidance)
    if len(z) == len(tokens):
        return z
    conditional, unconditional = z.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def generate(model: TokenBridge, labels: Tensor, settings: TokenBridgeSampling, noise: Noise) -> Tensor:
    """Draw the random numbers of a batch of images as `noise` says, and return its tokens (see `generate_tokens`)."""
    if isinstance(noise, Official):
        return generate_tokens(model, labels, settings, global_noise(len(labels), model.num_positions))
    drawn = image_noise(noise.seed, noise.indices, model.num_positions, model.num_channels)
    return generate_tokens(model, labels, settings, drawn)
