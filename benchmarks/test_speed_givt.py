"""GIVT's sampler with DB-CFG against a plain one.

For every token the plain sampler runs the whole prefix again, in one pass with the class and one without. It draws and
tries all proposals at once, and searches the whole grid for the bound.

Shape letters: B batch, L positions, C channels, M components of the mixture, K proposals.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SideBySide
from tokenbridge.models.givt.density import Gaussian, GuidedDensity, Mixture
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling, StreamNoise, draw_guided, generate_latents

TINY: dict[str, Any] = {
    "num_positions": 16,
    "num_channels": 6,
    "num_classes": 10,
    "num_components": 8,
    "width": 96,
    "depth": 4,
    "num_heads": 4,
    "mlp_width": 384,
}
CONFIG = GivtSampling(temperature=0.95, guidance_weight=0.4)


def make_model(**changes: Any) -> GIVT:
    """Return a model in which every parameter matters, since at initialisation the head is zero."""
    torch.manual_seed(0)
    model = GIVT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@dataclass
class AllNoise:
    """The random numbers of one position, made in advance so that their generator is not timed."""

    gumbel: Tensor  # [B, M]
    normal: Tensor  # [B, C]
    proposed: tuple[Tensor, Tensor]  # [K, B, C]
    tried: int = 0

    def gumbels(self) -> Tensor:
        return self.gumbel

    def normals(self, component: Tensor) -> Tensor:
        return self.normal

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        which = slice(self.tried, self.tried + num)
        self.tried += num
        return self.proposed[0][which, rows], self.proposed[1][which, rows]


def all_noise(model: GIVT, batch: int, position: int) -> AllNoise:
    """Return the random numbers of a position."""
    generator = torch.Generator().manual_seed(position)
    shape = (CONFIG.num_proposals, batch, model.num_channels)
    return AllNoise(
        -torch.empty(batch, model.num_components).exponential_(generator=generator).log(),
        torch.randn(shape[1:], generator=generator),
        (torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)),
    )


def guided_draw(conditional: Mixture, unconditional: Mixture, noise: AllNoise) -> Tensor:
    """Return tokens [B, C] by trying all proposals for all channels."""
    component = (conditional.log_weights + noise.gumbel).argmax(-1)
    c, u = conditional.component(component), unconditional.component(component)
    density = GuidedDensity(c, u, CONFIG.guidance_weight)
    normals, uniforms = noise.proposed
    x = density.proposal.at(normals)
    grid = torch.linspace(-10, 10, 1001).view(-1, 1, 1)
    bound = (density.log_prob(c.loc + grid).exp() / density.proposal.log_prob(c.loc).exp()).amax(0)
    accepted = uniforms * (bound * density.proposal.log_prob(x).exp()) < density.log_prob(x).exp()
    earlier = accepted.cumsum(0) - accepted.long()
    chosen = torch.where(accepted & (earlier == 0), x, 0).sum(0)
    return torch.where(accepted.any(0), chosen, c.at(noise.normal))


def generate_plainly(model: GIVT, labels: Tensor, noises: list[AllNoise]) -> Tensor:
    """Return latents [B, C, h, h], generated without a cache."""
    latents = torch.zeros(len(labels), model.num_positions, model.num_channels)
    dropped = torch.ones(len(labels), dtype=torch.bool)
    mixture = partial(model.mixture, temperature=CONFIG.temperature)
    for position, noise in enumerate(noises):
        prefix = latents[:, : position + 1]
        conditional = mixture(model(prefix, labels)[:, position])
        unconditional = mixture(model(prefix, labels, dropped=dropped)[:, position])
        latents[:, position] = guided_draw(conditional, unconditional, noise)
    return model.to_latents(latents)


@pytest.mark.parametrize(
    ("name", "changes", "batch"),
    [("tiny", {}, 16), ("256 positions", {"num_positions": 256, "depth": 2}, 1)],
)
@torch.inference_mode()
def test_generation(side_by_side: SideBySide, name: str, changes: dict[str, Any], batch: int) -> None:
    model = make_model(**changes)
    labels = torch.arange(batch) % model.num_classes
    noises = [all_noise(model, batch, position) for position in range(model.num_positions)]

    def fast() -> Tensor:
        for noise in noises:
            noise.tried = 0
        return generate_latents(model, labels, CONFIG, lambda position: noises[position])

    def reference() -> Tensor:
        return generate_plainly(model, labels, noises)

    # Sums are added in another order, and the errors of a token enter those after it.
    torch.testing.assert_close(fast(), reference(), rtol=1e-3, atol=1e-3)
    side_by_side(f"GIVT generation, {name}, {batch} image{'s'[: batch > 1]}", fast, reference, rounds=3)


@torch.inference_mode()
def test_proposals_are_drawn_as_needed(side_by_side: SideBySide) -> None:
    """One guided token of 16 images, with the random generator: proposals in rounds, against all at once."""
    model, batch = make_model(), 16
    shape = (batch, model.num_channels)
    density = GuidedDensity(
        Gaussian(torch.zeros(shape), torch.ones(shape)), Gaussian(torch.ones(shape), torch.ones(shape)), 0.4
    )

    def draw(num_in_first_round: int | None) -> Tensor:
        noise = StreamNoise(0, list(range(batch)), 0, model)
        if num_in_first_round is not None:
            normals, uniforms = noise.proposals(torch.arange(batch), num_in_first_round)
            given = AllNoise(torch.zeros(0), torch.zeros(0), (normals, uniforms))
            return draw_guided(density, torch.zeros(shape), given, CONFIG.num_proposals).values
        return draw_guided(density, torch.zeros(shape), noise, CONFIG.num_proposals).values

    assert np.isfinite(draw(None).numpy()).all()
    side_by_side("GIVT token, proposals drawn as needed", partial(draw, None), partial(draw, 1000), rounds=11)
