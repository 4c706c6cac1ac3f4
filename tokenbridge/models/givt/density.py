"""The densities that GIVT draws from: Gaussian mixtures, and the guided density of DB-CFG.

Shape letters: N rows, C channels, M components of a mixture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions, one for each channel."""

    loc: Tensor  # [..., C]
    scale: Tensor  # [..., C], standard deviations

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of x in every channel, in nats."""
        return -0.5 * ((x - self.loc) / self.scale).square() - (HALF_LOG_2PI + self.scale.log())

    def at(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise into draws from these distributions."""
        return self.loc + self.scale * noise

    def rows(self, index: Tensor) -> Gaussian:
        """Return the rows `index` of distributions [N, C]."""
        return Gaussian(self.loc[index], self.scale[index])


@dataclass(frozen=True)
class Mixture:
    """Mixtures of M Gaussians, each of which has C independent channels."""

    log_weights: Tensor  # [..., M], normalised
    locs: Tensor  # [..., M, C]
    scales: Tensor  # [..., M, C], standard deviations

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density [...] of the vectors x [..., C], in nats."""
        components = Gaussian(self.locs, self.scales).log_prob(x[..., None, :]).sum(-1)
        return (self.log_weights + components).logsumexp(-1)

    def component(self, index: Tensor) -> Gaussian:
        """Return the component `index` [...] of each mixture."""
        places = index[..., None, None].expand(*index.shape, 1, self.locs.shape[-1])
        return Gaussian(*(values.gather(-2, places).squeeze(-2) for values in (self.locs, self.scales)))


@dataclass(frozen=True)
class GuidedDensity:
    """The unnormalised density N(x; conditional)^(1 + w) / N(x; unconditional)^w of DB-CFG, channel by channel."""

    conditional: Gaussian  # [N, C]
    unconditional: Gaussian  # [N, C]
    weight: float  # w

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log of the density at x [..., N, C]."""
        return (1 + self.weight) * self.conditional.log_prob(x) - self.weight * self.unconditional.log_prob(x)

    @property
    def proposal(self) -> Gaussian:
        """The distribution of the proposals: centred like the conditional Gaussian, twice as wide as the wider one."""
        return Gaussian(self.conditional.loc, 2 * torch.maximum(self.conditional.scale, self.unconditional.scale))

    def bound(self) -> Tensor:
        """Return the constant [N, C] by which rejection sampling multiplies the proposal's density.

        Quirk kept: the product is not an envelope of the density (parallel_decode.py, CFGDensity). The constant is the
        maximum of the density on a grid of ±10 about the centre, divided by the proposal's density AT the centre,
        where it is largest. Further out, the product may lie below the density, and then samples are biased. If the
        unconditional Gaussian is much narrower than the conditional one, the density grows without limit and float32
        overflows. The constant is then infinite, no proposal is ever accepted, and the conditional draw is taken.
        """
        c, u, w = self.conditional, self.unconditional, self.weight
        # The log density is a parabola, so its maximum over the 1001 grid points is at an end or beside the vertex.
        curvature = (1 + w) / c.scale.square() - w / u.scale.square()
        vertex = (w * (c.loc - u.loc) / u.scale.square() / curvature).nan_to_num()
        beside = ((vertex.clamp(-10, 10) + 10) * 50).long() + torch.arange(-1, 3, device=vertex.device).view(-1, 1, 1)
        ends = torch.arange(0, 1001, 1000, device=vertex.device).view(2, 1, 1).expand(2, *vertex.shape)
        grid = torch.linspace(-10, 10, 1001, device=vertex.device)
        points = c.loc + grid[torch.cat([beside.clamp(0, 1000), ends])]
        return self.log_prob(points).amax(0).exp() / self.proposal.log_prob(c.loc).exp()

    def rows(self, index: Tensor) -> GuidedDensity:
        """Return the rows `index` of the density."""
        return GuidedDensity(self.conditional.rows(index), self.unconditional.rows(index), self.weight)
