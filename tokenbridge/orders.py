"""Orders and schedules: which position, which channel, how many at a time. Host arithmetic, no device work.

Shape letters: B batch, L positions, C channels, H height, W width, N masked positions.
"""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

OFFICIAL_CHANNEL_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The order of KL-16's channels in the published models (models/tokenbridge.py, a constant of the code)."""


def natural_order(num_channels: int) -> tuple[int, ...]:
    """Return 0, 1, ..., C - 1: the paper's "normal" order (table 2b)."""
    return tuple(range(num_channels))


def frequency_order(latents: Tensor, *, cutoff: float = 0.5) -> tuple[int, ...]:
    """Return the channels by falling share of low-frequency energy (paper section 3.2).

    The script behind the published constant was not released; this follows the text: 2-D FFT of every channel,
    energy within `cutoff` of the half sampling rate over the whole energy, averaged over images.

    Args:
        latents: [B, C, H, W], float.
        cutoff: radius of "low", as a share of the Nyquist frequency, in (0, 1].

    Raises:
        ValueError: latents of another shape, or a cutoff outside (0, 1].
    """
    if latents.ndim != 4:
        raise ValueError(f"Latents must be [B, C, H, W], not {list(latents.shape)}.")
    if not 0 < cutoff <= 1:
        raise ValueError(f"The cutoff is a share of the Nyquist frequency in (0, 1], not {cutoff}.")
    energy = torch.fft.fft2(latents.float()).abs().square()  # [B, C, H, W]
    rows = torch.fft.fftfreq(latents.shape[2], device=latents.device)[:, None]
    columns = torch.fft.fftfreq(latents.shape[3], device=latents.device)[None, :]
    low = torch.hypot(rows, columns) <= cutoff * 0.5
    share = energy[..., low].sum(-1) / energy.sum((-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    return tuple(share.mean(0).argsort(descending=True, stable=True).tolist())


def channel_order(name: str, num_channels: int, latents: Tensor | None = None) -> tuple[int, ...]:
    """Return the channel order called `name`: ``"natural"``, ``"official"`` or ``"frequency"``.

    Raises:
        ValueError: an unknown name, the official order for other than 16 channels, or no latents to measure.
    """
    if name == "natural":
        return natural_order(num_channels)
    if name == "official":
        if num_channels != len(OFFICIAL_CHANNEL_ORDER):
            raise ValueError(f"The official channel order is for 16 channels, not {num_channels}.")
        return OFFICIAL_CHANNEL_ORDER
    if name == "frequency":
        if latents is None:
            raise ValueError("The frequency order is measured on latents; none were given.")
        return frequency_order(latents)
    raise ValueError(f"Unknown channel order {name!r}; there are 'natural', 'official' and 'frequency'.")


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the inverse permutation: `inverse(order)[order[i]] == i`.

    Raises:
        ValueError: `order` is no permutation of 0 .. C - 1.
    """
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"{order} is no permutation of 0 .. {len(order) - 1}.")
    places = [0] * len(order)
    for place, channel in enumerate(order):
        places[channel] = place
    return tuple(places)


def random_orders(batch_size: int, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """Return independent random permutations of the positions, [B, L], from torch's global generator."""
    return torch.rand(batch_size, num_positions, device=device).argsort(dim=1)


def training_mask_count(num_positions: int, *, ratio_min: float = 0.7, ratio_std: float = 0.25) -> int:
    """Draw how many positions of a training batch are masked, in [1, L]: one number for the whole batch.

    ceil(L * ratio), the ratio from a normal of mean 1 and deviation `ratio_std` cut to [`ratio_min`, 1]; the
    defaults are those of MAR and TokenBridge (`mask_ratio_generator`). By inverse CDF from torch's global generator.
    """
    lower = float(stats.norm.cdf((ratio_min - 1.0) / ratio_std))
    uniform = torch.rand((), dtype=torch.float64).item()
    ratio = 1.0 + ratio_std * float(stats.norm.ppf(lower + uniform * (0.5 - lower)))
    return max(1, min(num_positions, math.ceil(num_positions * ratio)))


def masked_counts(num_positions: int, num_iterations: int) -> list[int]:
    """Return how many positions are still masked after each iteration; the last entry is 0.

    The cosine floor(L cos(pi/2 (i + 1) / iterations)), but at least 1 and at least one fewer than before
    (models/tokenbridge.py, `sample_tokens`). With L iterations that is one position at a time: the "one fewer"
    always wins over the cosine.

    Raises:
        ValueError: fewer than one iteration, or more iterations than positions.
    """
    if not 1 <= num_iterations <= num_positions:
        raise ValueError(f"The number of iterations must be in [1, {num_positions}], not {num_iterations}.")
    counts: list[int] = []
    remaining = num_positions
    for i in range(num_iterations - 1):
        cosine = math.floor(num_positions * math.cos(math.pi / 2 * (i + 1) / num_iterations))
        remaining = max(1, min(remaining - 1, cosine))
        counts.append(remaining)
    return [*counts, 0]


def guidance_at(guidance_scale: float, schedule: str, num_positions: int, num_masked: int) -> float:
    """Return the guidance scale of an iteration that leaves `num_masked` positions masked.

    ``"linear"``: 1 + (scale - 1) (L - masked) / L, with at least 1 counted as masked, since the official code's
    mask length never reaches 0; ``"constant"``: the scale itself.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "constant":
        return guidance_scale
    if schedule == "linear":
        return 1 + (guidance_scale - 1) * (num_positions - max(1, num_masked)) / num_positions
    raise ValueError(f"Unknown guidance schedule {schedule!r}; there are 'linear' and 'constant'.")
