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


@dataclass(frozen=True)
class TokenBridgeSampling(MaskedSampling):
    """Everything that decides which image a seed gives; the temperature divides the logits, 0 takes the likeliest."""

    position_order: Literal["random", "raster", "confidence"] = "random"
    first_element: FirstElement = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_order not in ("random", "raster", "confidence"):
            raise UserError(f"Unknown position order {self.position_order!r}.")
        if self.first_element not in get_args(FirstElement):
            raise UserError(f"Unknown first element {self.first_element!r}; there are {get_args(FirstElement)}.")


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
        model: in evaluation mode.
        labels: [B] class labels; None generates without a class.
        config: how to sample.
        noise: orders and uniform numbers of these images; or their orders alone.
        on_iteration: called after each iteration, for a progress bar; the device may still be at work then.

    Returns:
        tokens [B, L, C] int64, in the latents' channel order; -1 where the logits were NaN.

    Raises:
        ValueError: labels out of range, or more iterations than positions.
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
        choose = token_chooser(
            config.temperature, None if uniforms is None else take(uniforms, positions).flatten(0, 1)
        )
        chosen, log_probs = model.head.sample(z.flatten(0, 1), choose, first=config.first_element)
        # Whatever is chosen by NaN logits is a valid token: mark it, so that one look at the end finds it.
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


def generate(model: TokenBridge, labels: Tensor, settings: TokenBridgeSampling, noise: Noise) -> Tensor:
    """Generate tokens [B, L, C] of a batch of images from `noise`; otherwise as `generate_tokens`."""
    if isinstance(noise, Official):
        return generate_tokens(model, labels, settings, global_noise(len(labels), model.num_positions))
    drawn = image_noise(noise.seed, noise.indices, model.num_positions, model.num_channels)
    return generate_tokens(model, labels, settings, drawn)
