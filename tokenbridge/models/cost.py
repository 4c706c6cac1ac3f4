"""Floating-point operations of the masked backbone, which TokenBridge and MAR share (see `utils/flop.py`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenbridge.models.masked import MaskedBackbone
from tokenbridge.models.masked_sampling import MaskedSampling, iterations
from tokenbridge.utils.flop import count, placeholder, quadratic


def count_pass(backbone: MaskedBackbone) -> Callable[[int, int], dict[str, float]]:
    """Return a function from (num_visible, num_asked) to the operations of one pass for one image, by part.

    The operations of the encoder are quadratic in the number of visible positions. Those of the decoder are linear
    in that number, and linear in the number of positions whose context is asked for. A few counts therefore determine
    the operations of every pass.

    Args:
        backbone: a model on the meta device.
    """
    width, num_channels = backbone.z_proj.out_features, backbone.z_proj.in_features

    def encode(num_visible: int) -> int:
        latents, visible = placeholder(1, num_visible, num_channels), placeholder(1, num_visible, dtype=torch.int64)
        return count(lambda: backbone.encode(latents, visible, placeholder(1, width)))

    def decode(num_visible: int, num_asked: int) -> int:
        encoded = placeholder(1, backbone.num_buffer + num_visible, width)
        visible, asked = (placeholder(1, n, dtype=torch.int64) for n in (num_visible, num_asked))
        return count(lambda: backbone.decode(encoded, visible, asked))

    encoder, nothing = quadratic(encode), decode(0, 0)
    per_visible, per_asked = decode(1, 0) - nothing, decode(0, 1) - nothing
    return lambda num_visible, num_asked: {
        "encoder": encoder(num_visible),
        "decoder": nothing + per_visible * num_visible + per_asked * num_asked,
    }


def backbone_flop(
    backbone: MaskedBackbone, settings: MaskedSampling, *, asks_all_masked: bool = False
) -> dict[str, float]:
    """Return the operations of the encoder and of the decoder for one image, summed over all iterations.

    In an iteration with guidance, encoder and decoder run twice: with the class and without it.

    Args:
        backbone: a model on the meta device.
        asks_all_masked: every iteration computes the context of all masked positions, and not only of those that it
            predicts.
    """
    one_pass, total = count_pass(backbone), {"encoder": 0.0, "decoder": 0.0}
    for iteration in iterations(settings, backbone.num_positions):
        kept = 0 if asks_all_masked else iteration.still_masked
        flop = one_pass(backbone.num_positions - iteration.num_masked, iteration.num_masked - kept)
        num_passes = 1 if iteration.guidance == 1 else 2
        total = {part: total[part] + num_passes * flop[part] for part in total}
    return total
