"""Orders in which the channels of a position are generated.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenbridge.utils.errors import UserError

OFFICIAL_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The order of KL-16's channels in the published models, a constant in the official models/tokenbridge.py."""


def natural_order(num_channels: int) -> tuple[int, ...]:
    """Return the order 0, 1, ..., C - 1, which the paper calls "normal" (table 2b)."""
    return tuple(range(num_channels))


def frequency_order(latents: Tensor, *, cutoff: float = 0.5) -> tuple[int, ...]:
    """Return the channels in order of falling share of low-frequency energy (paper section 3.2).

    The script behind the published constant was not released, so this function follows the text. It takes the 2-D
    FFT of every channel, divides the energy at low frequencies by the whole energy, and averages over the images.

    Args:
        latents: [B, C, H, W].
        cutoff: radius up to which a frequency counts as low, as a share of the Nyquist frequency, in (0, 1].
    """
    if latents.ndim != 4:
        raise UserError(f"Latents must be [B, C, H, W], not {list(latents.shape)}.")
    if not 0 < cutoff <= 1:
        raise UserError(f"The cutoff is a share of the Nyquist frequency in (0, 1], not {cutoff}.")
    energy = torch.fft.fft2(latents.float()).abs().square()  # [B, C, H, W]
    rows = torch.fft.fftfreq(latents.shape[2], device=latents.device)[:, None]
    columns = torch.fft.fftfreq(latents.shape[3], device=latents.device)[None, :]
    low = torch.hypot(rows, columns) <= cutoff * 0.5
    share = energy[..., low].sum(-1) / energy.sum((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    return tuple(share.mean(0).argsort(descending=True, stable=True).tolist())


def channel_order(name: str, num_channels: int, latents: Tensor | None = None) -> tuple[int, ...]:
    """Return the channel order called `name`.

    Args:
        name: ``"natural"``, ``"official"`` (for 16 channels) or ``"frequency"`` (measured on `latents`).
        latents: [B, C, H, W].

    Raises:
        UserError: the name is unknown, there are not 16 channels, or there are no latents.
    """
    if name == "natural":
        return natural_order(num_channels)
    if name == "official":
        if num_channels != len(OFFICIAL_CHANNEL_ORDER):
            raise UserError(f"The official channel order is for 16 channels, not {num_channels}.")
        return OFFICIAL_CHANNEL_ORDER
    if name == "frequency":
        if latents is None:
            raise UserError("The frequency order is measured on latents; none were given.")
        return frequency_order(latents)
    raise UserError(f"Unknown channel order {name!r}; there are 'natural', 'official' and 'frequency'.")


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inverse permutation, for which `inverse(order)[order[i]] == i`."""
    if sorted(order) != list(range(len(order))):
        raise UserError(f"{order} is not a permutation of 0 .. {len(order) - 1}.")
    places = [0] * len(order)
    for place, channel in enumerate(order):
        places[channel] = place
    return tuple(places)
