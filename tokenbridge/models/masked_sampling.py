"""Masked sampling, which TokenBridge and MAR share: orders of positions, iterations and guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from scipy import stats
from torch import Tensor

from tokenbridge.utils.errors import UserError


def random_orders(batch_size: int, num_positions: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw independent random permutations [B, L] of the positions from torch's global generator."""
    return torch.rand(batch_size, num_positions, device=device).argsort(dim=1)


def training_mask_count(num_positions: int, *, ratio_min: float = 0.7, ratio_std: float = 0.25) -> int:
    """Draw the number of masked positions in [1, L], which is the same for all images of a training batch.

    The number is ceil(L * ratio). The ratio has a normal distribution with mean 1 and deviation `ratio_std`, truncated
    to [`ratio_min`, 1]; it is drawn from torch's global generator by inverting the CDF. The defaults are those of MAR
    and TokenBridge (`mask_ratio_generator`).
    """
    lower = float(stats.norm.cdf((ratio_min - 1.0) / ratio_std))
    uniform = torch.rand((), dtype=torch.float64).item()
    ratio = 1.0 + ratio_std * float(stats.norm.ppf(lower + uniform * (0.5 - lower)))
    return max(1, min(num_positions, math.ceil(num_positions * ratio)))


def masked_counts(num_positions: int, num_iterations: int) -> list[int]:
    """Return how many positions are still masked after each iteration; the last entry is 0.

    After iteration i, counted from 0, the number follows a cosine, floor(L cos(pi/2 (i + 1) / iterations)), but it is
    at least 1, and at least one fewer than before (models/tokenbridge.py, `sample_tokens`). With L iterations, one
    position is predicted at a time, because the cosine never falls below "one fewer".

    Raises:
        UserError: the number of iterations is not in [1, L].
    """
    if not 1 <= num_iterations <= num_positions:
        raise UserError(f"The number of iterations must be in [1, {num_positions}], not {num_iterations}.")
    counts: list[int] = []
    remaining = num_positions
    for i in range(num_iterations - 1):
        cosine = math.floor(num_positions * math.cos(math.pi / 2 * (i + 1) / num_iterations))
        remaining = max(1, min(remaining - 1, cosine))
        counts.append(remaining)
    return [*counts, 0]


def guidance_at(guidance_scale: float, schedule: str, num_positions: int, num_masked: int) -> float:
    """Return the guidance scale of an iteration that leaves `num_masked` positions masked.

    The schedule ``"linear"`` gives 1 + (scale - 1) (L - masked) / L, where at least one position counts as masked,
    because the mask length of the official code never reaches 0. The schedule ``"constant"`` gives the scale itself.
    """
    if schedule == "constant":
        return guidance_scale
    if schedule == "linear":
        return 1 + (guidance_scale - 1) * (num_positions - max(1, num_masked)) / num_positions
    raise UserError(f"Unknown guidance schedule {schedule!r}; there are 'linear' and 'constant'.")


@dataclass(frozen=True)
class MaskedSampling:
    """The sampling settings that all masked generators have."""

    num_iterations: int = 256
    guidance_scale: float = 1.0  # 1 turns guidance off
    guidance_schedule: Literal["linear", "constant"] = "linear"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise UserError(f"The number of iterations must be at least 1, not {self.num_iterations}.")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"The guidance scale must be at least 0, not {self.guidance_scale}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"The temperature must be at least 0, not {self.temperature}.")


class MaskedGenerator(Protocol):
    """What the sampling loop needs of a masked generator: TokenBridge, or MAR with latents in place of tokens."""

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
    """One iteration of masked sampling.

    Of each image's order, the first `num_masked` positions are masked before the iteration, and the first
    `still_masked` after it.
    """

    num_masked: int
    still_masked: int
    guidance: float

    def visible(self, orders: Tensor) -> Tensor:
        """Return the visible positions of orders [B, L], rising in each row."""
        return orders[:, self.num_masked :].sort(dim=1).values


def iterations(config: MaskedSampling, num_positions: int) -> Iterator[Iteration]:
    """Yield the iterations in which images are sampled.

    Raises:
        UserError: there are more iterations than positions.
    """
    num_masked = num_positions
    for still_masked in masked_counts(num_positions, config.num_iterations):
        guidance = guidance_at(config.guidance_scale, config.guidance_schedule, num_positions, still_masked)
        yield Iteration(num_masked, still_masked, guidance)
        num_masked = still_masked


def contexts(
    model: MaskedGenerator,
    tokens: Tensor,
    visible: Tensor,
    positions: Tensor,
    labels: Tensor | None,
    guidance: float,
) -> Tensor:
    """Return the context z of `positions`, computed in one batch.

    Without guidance, z is [B, K, D]. With guidance it is [2B, K, D]: the first half is computed with the class, the
    second half without it.
    """
    if labels is None or guidance == 1.0:
        return model.context(tokens, visible, labels, positions=positions)
    return model.context(
        tokens.repeat(2, 1, 1),
        visible.repeat(2, 1),
        labels.repeat(2),
        dropped=torch.arange(2, device=tokens.device).repeat_interleave(tokens.shape[0]).bool(),
        positions=positions.repeat(2, 1),
    )
