"""Masked sampling, as TokenBridge and MAR share it: orders of positions, iterations, guidance."""

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

    ``"linear"``: 1 + (scale - 1) (L - masked) / L, with at least 1 counted as masked, since the official code's
    mask length never reaches 0; ``"constant"``: the scale itself.

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule == "constant":
        return guidance_scale
    if schedule == "linear":
        return 1 + (guidance_scale - 1) * (num_positions - max(1, num_masked)) / num_positions
    raise UserError(f"Unknown guidance schedule {schedule!r}; there are 'linear' and 'constant'.")


@dataclass(frozen=True)
class MaskedSampling:
    """What decides the image of a seed in every masked generator."""

    num_iterations: int = 256
    guidance_scale: float = 1.0  # 1 means no guidance
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


def iterations(config: MaskedSampling, num_positions: int) -> Iterator[Iteration]:
    """Yield the iterations of a generation.

    Raises:
        ValueError: more iterations than positions.
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
