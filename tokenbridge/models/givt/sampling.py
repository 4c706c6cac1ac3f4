"""Sampling GIVT: one position after another, with guidance by rejection sampling (DB-CFG).

Shape letters: B batch, C channels, M components of the mixture, K proposals, h height and width of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tokenbridge.models.draw import check_labels
from tokenbridge.models.givt.density import GuidedDensity, Mixture
from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.noise import Noise, PerImage
from tokenbridge.utils.errors import UserError


@dataclass(frozen=True)
class GivtSampling:
    """The sampling settings, which together with the seed and the label determine an image."""

    temperature: float = 1.0  # multiplies the standard deviations, both with the class and without it
    temp_probs: float = 1.0  # multiplies the mixture logits
    guidance_weight: float = 0.0  # w of DB-CFG; 0 turns guidance off
    num_proposals: int = 1000  # proposals that are tried for a channel before the conditional draw is taken

    def __post_init__(self) -> None:
        for name in ("temperature", "temp_probs"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise UserError(f"{name} must be above 0, not {value}.")
        if not (math.isfinite(self.guidance_weight) and self.guidance_weight >= 0):
            raise UserError(f"The guidance weight must be at least 0, not {self.guidance_weight}.")
        if self.num_proposals < 1:
            raise UserError(f"The number of proposals must be at least 1, not {self.num_proposals}.")


class TokenNoise(Protocol):
    """The random numbers of one position in a batch of images."""

    def gumbels(self) -> Tensor:
        """Return standard Gumbel numbers [B, M], with which the component is drawn."""
        ...

    def normals(self, component: Tensor) -> Tensor:
        """Return standard normal numbers [B, C] for the conditional draw from the components [B]."""
        ...

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the next standard normal and uniform numbers of the images `rows`, each [num, len(rows), C]."""
        ...


class StreamNoise:
    """Random numbers from one stream for each (seed, image index, position), drawn on the CPU when they are needed.

    A stream gives M Gumbel numbers, then C normal numbers for the conditional draw, and then, with guidance, the
    proposals in rounds of 32, 32, 64, 128, ... Each round draws its normal numbers [round, C] and then its uniform
    numbers [round, C]. A round is drawn only if some channel of the image needs it, because 1,000 proposals for every
    token would cost more than the transformer.
    """

    def __init__(self, seed: int, image_indices: Sequence[int], position: int, model: GIVT) -> None:
        self.sizes = model.num_components, model.num_channels
        self.device = model.device
        self.streams = [np.random.default_rng((seed, index, position)) for index in image_indices]

    def gumbels(self) -> Tensor:
        """Return Gumbel numbers [B, M]."""
        return self._tensor([stream.gumbel(size=self.sizes[0]) for stream in self.streams])

    def normals(self, component: Tensor) -> Tensor:
        """Return normal numbers [B, C]; the official code draws them for every component and uses those of one."""
        return self._tensor([stream.standard_normal(self.sizes[1]) for stream in self.streams])

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the next normal and uniform numbers of the images `rows`, each [num, len(rows), C]."""
        shape = (num, self.sizes[1])
        normals, uniforms = [], []
        for stream in (self.streams[row] for row in rows.tolist()):
            normals.append(stream.standard_normal(shape, dtype=np.float32))
            uniforms.append(stream.random(shape, dtype=np.float32))
        return self._tensor(normals).transpose(0, 1), self._tensor(uniforms).transpose(0, 1)

    def _tensor(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays).astype(np.float32, copy=False)).to(self.device)


@dataclass(frozen=True)
class Draw:
    """One token of each image, and how it was drawn."""

    values: Tensor  # [B, C]
    bound: Tensor | None = None  # [B, C], the constant of the rejection sampling; None without guidance
    # [B, C] int64, the index of the accepted proposal; -1 where none was accepted and the conditional draw was taken.
    first_accepted: Tensor | None = None


FIRST_ROUND = 32  # number of proposals in the first round; nearly all tokens need fewer


def draw_token(conditional: Mixture, unconditional: Mixture | None, config: GivtSampling, noise: TokenNoise) -> Draw:
    """Draw a token of each image from its mixture [B], with guidance if there is an unconditional mixture.

    The component is drawn from the conditional mixture. Guidance pairs it with the component of the same index in the
    unconditional mixture, whatever the weight of that component is.
    """
    component = (conditional.log_weights + noise.gumbels()).argmax(-1)
    plain = conditional.component(component)
    values = plain.at(noise.normals(component))
    if unconditional is None:
        return Draw(values)
    density = GuidedDensity(plain, unconditional.component(component), config.guidance_weight)
    return draw_guided(density, values, noise, config.num_proposals)


def draw_guided(density: GuidedDensity, fallback: Tensor, noise: TokenNoise, num_proposals: int) -> Draw:
    """Draw from a guided density [B, C] by rejection sampling; every channel takes the first proposal it accepts.

    Proposals are tried in rounds, and only for images with an undecided channel. Each round after the first is as long
    as all rounds before it, and waits for the device once. Which images take part in a round does not affect the
    others.

    Args:
        density: the guided density of the chosen components.
        fallback: [B, C], the conditional draw, which is taken where no proposal is accepted. The official code draws it
            with the same random key as the proposals; here it has random numbers of its own.
        noise: the source of the proposals.
        num_proposals: number of proposals that are tried before the fallback is taken.
    """
    bound = density.bound()
    values, first = fallback.clone(), torch.full_like(fallback, -1, dtype=torch.int64)
    hopeless = ~bound.isfinite()  # no density lies above an infinite or undefined height, so nothing is accepted
    rows = (~hopeless).any(-1).nonzero().flatten()
    tried = 0
    while tried < num_proposals and len(rows):
        num = min(max(tried, FIRST_ROUND), num_proposals - tried)
        normals, uniforms = noise.proposals(rows, num)
        part = density.rows(rows)
        x = part.proposal.at(normals)
        heights = uniforms * (bound[rows] * part.proposal.log_prob(x).exp())
        accepted = heights < part.log_prob(x).exp()  # [K, rows, C]
        place = accepted.to(torch.int8).argmax(0, keepdim=True)  # index of the first accepted proposal
        new = accepted.any(0) & (first[rows] < 0)
        values[rows] = torch.where(new, x.gather(0, place)[0], values[rows])
        first[rows] = torch.where(new, place[0] + tried, first[rows])
        rows = rows[((first[rows] < 0) & ~hopeless[rows]).any(-1)]
        tried += num
    return Draw(values, bound, first)


@torch.inference_mode()
def generate_draws(
    model: GIVT, labels: Tensor, config: GivtSampling, noise: Callable[[int], TokenNoise]
) -> Iterator[Draw]:
    """Generate the tokens of a batch of images and yield those of every position; see `generate_latents`."""
    labels = labels.to(model.device)
    guided = config.guidance_weight > 0
    if guided:
        labels = torch.cat([labels, model.without_class(labels)])
    cache = model.empty_cache(len(labels))
    x = model.class_emb(labels)
    for position in range(model.num_positions):
        logits = model.next_logits(x, cache, position)
        mixtures = [
            model.mixture(part, temperature=config.temperature, temp_probs=config.temp_probs)
            for part in logits.chunk(2 if guided else 1)
        ]
        draw = draw_token(mixtures[0], mixtures[1] if guided else None, config, noise(position))
        yield draw
        x = model.latent_proj(draw.values.to(logits.dtype)).repeat(len(mixtures), 1)


def generate_latents(model: GIVT, labels: Tensor, config: GivtSampling, noise: Callable[[int], TokenNoise]) -> Tensor:
    """Generate the latents of a batch of images, float32 [B, C, h, h].

    Args:
        model: the model in evaluation mode.
        labels: [B].
        noise: a function from a position, in 0 .. L - 1, to its random numbers.

    Raises:
        UserError: a label is out of range, or guidance is used with a model that has no embedding for "no class".
    """
    check_labels(labels, len(labels), model.num_classes)
    return model.to_latents(torch.stack([d.values for d in generate_draws(model, labels, config, noise)], dim=1))


def generate(model: GIVT, labels: Tensor, settings: GivtSampling, noise: Noise) -> Tensor:
    """Draw the random numbers of a batch of images as `noise` says, and return its latents [B, C, h, h].

    `noise` must be `PerImage`, because the official code draws with JAX, whose random numbers torch cannot reproduce.
    """
    assert isinstance(noise, PerImage), "GIVT has no official noise here"
    return generate_latents(
        model, labels, settings, lambda position: StreamNoise(noise.seed, noise.indices, position, model)
    )
