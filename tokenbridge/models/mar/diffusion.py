"""Gaussian diffusion of single vectors, which MAR's head uses (LTH14/mar, diffusion/; from improved-diffusion).

The process has a cosine schedule of 1,000 steps and a learned-range variance. Sampling may skip steps. The loss is the
squared error plus a variational bound.

diffusers' DDPMScheduler describes the same process, and a test compares the two, but it cannot replace this module. Its
tables are computed in float32, while 1 / sqrt(alpha_bar) is 2e4 at the last step. It also lacks a temperature, a
variational bound, and a finite log-variance at t = 0. The tables here are computed in float64 and rounded once, like
the official ones.

Equations: Ho et al. 2020 (arXiv 2006.11239) and Nichol & Dhariwal 2021 (arXiv 2102.09672).
Shape letters: N rows (positions of any image), C channels, S steps.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenbridge.utils.errors import UserError

NUM_TIMESTEPS = 1000
MAX_BETA = 0.999
PIXEL = 1 / 255  # half the width of an 8-bit level in [-1, 1]


def cosine_betas(num_timesteps: int = NUM_TIMESTEPS) -> NDArray[np.float64]:
    """Return beta [num_timesteps] of the cosine schedule (Nichol & Dhariwal, equation 17)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ends = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    return np.array([min(1 - ends[i + 1] / ends[i], MAX_BETA) for i in range(num_timesteps)])


def spaced_timesteps(spacing: int | str, num_timesteps: int = NUM_TIMESTEPS) -> list[int]:
    """Return the timesteps that sampling keeps, in rising order (diffusion/respace.py, `space_timesteps`).

    Args:
        spacing: the number of timesteps, which are spread evenly from the first to the last with improved-diffusion's
            rounding. It may also be the text of the official option. ``"100"`` means the same as 100. ``"10,15,20"``
            keeps these numbers of timesteps in three equal sections. ``"ddim25"`` goes from 0 with the integer stride
            that gives exactly 25. ``""`` keeps all timesteps.
        num_timesteps: the number of timesteps to choose from.

    Raises:
        UserError: the number of timesteps is out of range, or no integer stride gives it.
    """
    text = str(spacing)
    if not re.fullmatch(r"ddim\d+|(-?\d+(,-?\d+)*)?", text):
        raise UserError(f"The diffusion steps are a number, ddim and a number, or numbers in sections, not {text!r}.")
    if text.startswith("ddim"):
        for stride in range(1, num_timesteps):
            if len(strided := range(0, num_timesteps, stride)) == int(text[4:]):
                return list(strided)
        raise UserError(f"No integer stride through {num_timesteps} timesteps gives {text[4:]} steps.")
    counts = [int(count) for count in text.split(",")] if text else [num_timesteps]
    timesteps, start = [], 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise UserError(f"The number of diffusion steps must be in [1, {size}], not {count}.")
        stride_of_section = (size - 1) / (count - 1) if count > 1 else 1.0
        # The official code adds strides up. Where a timestep falls on a half, the rounding error of the sum decides.
        places = accumulate(repeat(stride_of_section, count - 1), initial=0.0)
        timesteps += [start + round(place) for place in places]
        start += size
    return timesteps


@dataclass(frozen=True)
class Reverse:
    """The distribution p(x_(t-1) | x_t), a diagonal Gaussian; all tensors are float32 [N, C]."""

    mean: Tensor
    log_variance: Tensor
    start: Tensor  # the predicted x_0, from which the mean was computed


class Diffusion:
    """The diffusion process, or the shorter process through some of its timesteps.

    Steps t count the kept timesteps, from 0 to S - 1; the input of the network is `timesteps[t]`. An argument `t` is
    one step for all rows (int), or one step for each row (int64 [N]).

    Args:
        spacing: the timesteps that are kept (see `spaced_timesteps`). There must be at least two, because a single
            step has no finite log-variance.
        device: the device that holds the tables.
    """

    def __init__(self, spacing: int | str = NUM_TIMESTEPS, device: torch.device | str = "cpu") -> None:
        timesteps = spaced_timesteps(spacing)
        if len(timesteps) < 2:
            raise UserError("There must be at least 2 diffusion steps.")
        kept = np.cumprod(1 - cosine_betas())[timesteps]
        betas = 1 - kept / np.append(1.0, kept[:-1])
        alpha_bars = np.cumprod(1 - betas)
        before = np.append(1.0, alpha_bars[:-1])
        posterior = betas * (1 - before) / (1 - alpha_bars)  # Ho et al., equation 7

        def table(values: NDArray[Any]) -> Tensor:
            return torch.from_numpy(values).to(device, torch.float32)

        self.timesteps = torch.tensor(timesteps, device=device)  # [S], rising
        self.signal = table(np.sqrt(alpha_bars))
        self.noise = table(np.sqrt(1 - alpha_bars))
        self.start_of_x = table(np.sqrt(1 / alpha_bars))
        self.start_of_noise = table(np.sqrt(1 / alpha_bars - 1))
        self.mean_of_start = table(betas * np.sqrt(before) / (1 - alpha_bars))
        self.mean_of_x = table((1 - before) * np.sqrt(1 - betas) / (1 - alpha_bars))
        # The posterior variance is 0 at t = 0, so the variance at t = 1 is used there.
        self.min_log_variance = table(np.log(np.append(posterior[1], posterior[1:])))
        self.max_log_variance = table(np.log(betas))

    @property
    def num_steps(self) -> int:
        """S, the number of steps in which a sample is drawn."""
        return len(self.timesteps)

    def add_noise(self, start: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return x_t [N, C], given x_0 = `start` and standard normal `noise`, both [N, C] (Ho et al., equation 4)."""
        return _at(self.signal, t) * start + _at(self.noise, t) * noise

    def posterior_mean(self, start: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """Return the mean of q(x_(t-1) | x_t, x_0), [N, C] (Ho et al., equation 7)."""
        return _at(self.mean_of_start, t) * start + _at(self.mean_of_x, t) * x

    def reverse(self, x: Tensor, t: Tensor | int, output: Tensor) -> Reverse:
        """Return p(x_(t-1) | x_t), given x_t = `x` [N, C] and the network's output.

        Args:
            output: [N, 2C]: first the predicted noise, then numbers that interpolate the log-variance between that of
                the posterior (at -1) and log beta (at 1).
        """
        noise, place = output.float().chunk(2, dim=-1)
        share = (place + 1) / 2
        log_variance = share * _at(self.max_log_variance, t) + (1 - share) * _at(self.min_log_variance, t)
        start = _at(self.start_of_x, t) * x - _at(self.start_of_noise, t) * noise
        return Reverse(self.posterior_mean(start, x, t), log_variance, start)

    def step(self, x: Tensor, t: int, output: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw x_(t-1) [N, C], given x_t [N, C], the network's output [N, 2C] and standard normal noise [N, C].

        The temperature multiplies the noise. The last step (t = 0) uses no noise.
        """
        reverse = self.reverse(x, t, output)
        if t == 0:
            return reverse.mean
        return reverse.mean + torch.exp(0.5 * reverse.log_variance) * noise * temperature

    def losses(self, start: Tensor, x: Tensor, noise: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two terms of the loss, each [N] and averaged over the channels. The loss is their sum.

        Args:
            start: x_0 [N, C].
            x: x_t [N, C], computed from x_0 and `noise`.
            noise: [N, C], which the network should predict.
            t: [N].
            output: [N, 2C], the network's output.

        Returns:
            The squared error of the noise, and the variational bound in bits, which trains only the variance. Quirk
            kept: the bound is not divided by 1000, although improved-diffusion does so (create_diffusion chooses
            LossType.MSE).
        """
        noise_hat, place = output.float().chunk(2, dim=-1)
        squared = (noise - noise_hat).square().mean(-1)
        reverse = self.reverse(x, t, torch.cat([noise_hat.detach(), place], dim=-1))
        true_log_variance = _at(self.min_log_variance, t)
        divergence = 0.5 * (
            reverse.log_variance
            - true_log_variance
            - 1
            + torch.exp(true_log_variance - reverse.log_variance)
            + (self.posterior_mean(start, x, t) - reverse.mean).square() * torch.exp(-reverse.log_variance)
        )
        likelihood = _log_probability(start, reverse.mean, 0.5 * reverse.log_variance)
        bound = torch.where(t == 0, -likelihood.mean(-1), divergence.mean(-1)) / math.log(2)
        return squared, bound


@functools.cache
@torch.inference_mode(mode=False)  # training may later use a process that was built during sampling
def diffusion_process(spacing: int | str = NUM_TIMESTEPS, device: torch.device | str = "cpu") -> Diffusion:
    """Return the process of this spacing; it is built once for each device and then kept."""
    return Diffusion(spacing, device)


def _at(table: Tensor, t: Tensor | int) -> Tensor:
    """Return the table's values at step t, as a scalar or as a column [N, 1]."""
    return table[t] if isinstance(t, int) else table[t][:, None]


def _log_probability(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Return the log-probability of the 8-bit level of x under a Gaussian; the levels beyond ±0.999 are open.

    Quirks kept (diffusion/diffusion_utils.py): x is binned like a pixel although it is a latent, and the normal
    distribution function is approximated with tanh.
    """

    def below(value: Tensor) -> Tensor:
        z = torch.exp(-log_deviation) * (value - mean)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    lower, upper = below(x - PIXEL), below(x + PIXEL)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
