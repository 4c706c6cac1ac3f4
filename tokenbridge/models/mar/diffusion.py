"""Gaussian diffusion of single vectors, as MAR's head uses it (LTH14/mar, diffusion/; from improved-diffusion).

Cosine schedule of 1,000 steps, learned-range variance, steps left out in sampling, loss mse + variational bound.

diffusers' DDPMScheduler describes the same process, and a test holds the two together, but it cannot carry it: its
tables are made in float32, while 1 / sqrt(alpha_bar) is 2e4 at the last step; it has no temperature, no variational
bound and no finite log-variance at t = 0. Tables here are made in float64 and rounded once, as the official ones.

Equations: Ho et al. 2020 (arXiv 2006.11239) and Nichol & Dhariwal 2021 (arXiv 2102.09672).
Shape letters: N rows (positions of any image), C channels, S steps.
"""

from __future__ import annotations

import functools
import math
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
    """Return beta of every timestep, [num_timesteps]: the cosine schedule (Nichol & Dhariwal, equation 17)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    ends = [alpha_bar(i / num_timesteps) for i in range(num_timesteps + 1)]
    return np.array([min(1 - ends[i + 1] / ends[i], MAX_BETA) for i in range(num_timesteps)])


def spaced_timesteps(spacing: int | str, num_timesteps: int = NUM_TIMESTEPS) -> list[int]:
    """Return the timesteps that are kept, rising (diffusion/respace.py, `space_timesteps`).

    Args:
        spacing: how many, evenly from the first timestep to the last, by improved-diffusion's rounding. Or the
            official option's text: ``"100"``; ``"10,15,20"`` for as many in each of three equal sections;
            ``"ddim25"`` for a whole stride from 0 that gives exactly 25; ``""`` for all.
        num_timesteps: to choose from.

    Raises:
        ValueError: more steps than there are, no steps, or no stride that gives their number.
    """
    text = str(spacing)
    if text.startswith("ddim"):
        for stride in range(1, num_timesteps):
            if len(strided := range(0, num_timesteps, stride)) == int(text[4:]):
                return list(strided)
        raise UserError(f"No whole stride through {num_timesteps} timesteps gives {text[4:]} steps.")
    counts = [int(count) for count in text.split(",")] if text else [num_timesteps]
    timesteps, start = [], 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if not 1 <= count <= size:
            raise UserError(f"The number of diffusion steps must be in [1, {size}], not {count}.")
        stride_of_section = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: where a place falls on a half, the sum's rounding error decides.
        places = accumulate(repeat(stride_of_section, count - 1), initial=0.0)
        timesteps += [start + round(place) for place in places]
        start += size
    return timesteps


@dataclass(frozen=True)
class Reverse:
    """The distribution p(x_(t-1) | x_t), a diagonal Gaussian; each [N, C], float32."""

    mean: Tensor
    log_variance: Tensor
    start: Tensor  # the prediction of x_0 behind it


class Diffusion:
    """The process, or the shorter process through some of its timesteps.

    Steps t are counted in 0 .. S - 1 among the kept timesteps; the network is to be given `timesteps[t]`. An
    argument `t` is one step for all rows (int) or a step for each row (int64 [N]).

    Args:
        spacing: which timesteps are kept (see `spaced_timesteps`).
        device: where the tables are.

    Raises:
        ValueError: as `spaced_timesteps`, or a single step, for which there is no log-variance.
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
        # The posterior variance is 0 at t = 0; the next one stands for it.
        self.min_log_variance = table(np.log(np.append(posterior[1], posterior[1:])))
        self.max_log_variance = table(np.log(betas))

    @property
    def num_steps(self) -> int:
        """S: steps of a sample."""
        return len(self.timesteps)

    def add_noise(self, start: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return x_t [N, C] of x_0 `start` and standard normal `noise`, both [N, C] (Ho et al., equation 4)."""
        return _at(self.signal, t) * start + _at(self.noise, t) * noise

    def posterior_mean(self, start: Tensor, x: Tensor, t: Tensor | int) -> Tensor:
        """Return the mean of q(x_(t-1) | x_t, x_0), [N, C] (Ho et al., equation 7)."""
        return _at(self.mean_of_start, t) * start + _at(self.mean_of_x, t) * x

    def reverse(self, x: Tensor, t: Tensor | int, output: Tensor) -> Reverse:
        """Return p(x_(t-1) | x_t) of the network's output.

        Args:
            x: x_t [N, C].
            t: the step.
            output: [N, 2C]: predicted noise, then where the log-variance lies between that of the posterior (-1)
                and log beta (1).
        """
        noise, place = output.float().chunk(2, dim=-1)
        share = (place + 1) / 2
        log_variance = share * _at(self.max_log_variance, t) + (1 - share) * _at(self.min_log_variance, t)
        start = _at(self.start_of_x, t) * x - _at(self.start_of_noise, t) * noise
        return Reverse(self.posterior_mean(start, x, t), log_variance, start)

    def step(self, x: Tensor, t: int, output: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        """Return x_(t-1) [N, C] of x_t, the network's output [N, 2C] and standard normal noise [N, C].

        The temperature multiplies the noise, which the last step (t = 0) does not use.
        """
        reverse = self.reverse(x, t, output)
        if t == 0:
            return reverse.mean
        return reverse.mean + torch.exp(0.5 * reverse.log_variance) * noise * temperature

    def losses(self, start: Tensor, x: Tensor, noise: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two terms of the loss, each [N]: mean over the channels. The loss is their plain sum.

        Args:
            start: x_0 [N, C].
            x: x_t [N, C], made of x_0 and `noise`.
            noise: what the network is to predict, [N, C].
            t: [N].
            output: the network's, [N, 2C].

        Returns:
            The squared error of the noise, and the variational bound in bits, which trains the variance alone.
            Quirk kept: the bound is not divided by 1000, as improved-diffusion does (create_diffusion: LossType.MSE).
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
@torch.inference_mode(mode=False)  # a process that is made in sampling may be trained with later
def diffusion_process(spacing: int | str = NUM_TIMESTEPS, device: torch.device | str = "cpu") -> Diffusion:
    """Return the process, made once for each spacing and device."""
    return Diffusion(spacing, device)


def _at(table: Tensor, t: Tensor | int) -> Tensor:
    """Return a table's value at step t, for rows of channels."""
    return table[t] if isinstance(t, int) else table[t][:, None]


def _log_probability(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Return the log-probability of x's 8-bit level under a Gaussian, with open ends beyond ±0.999.

    Quirk kept (diffusion/diffusion_utils.py): levels of pixels, although x is a latent; and tanh's approximation of
    the normal distribution function.
    """

    def below(value: Tensor) -> Tensor:
        z = torch.exp(-log_deviation) * (value - mean)
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    lower, upper = below(x - PIXEL), below(x + PIXEL)
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
