"""GIVT: an autoregressive transformer over continuous latents, with a Gaussian mixture as its output.

Source: google-research/big_vision at 0127fb6, models/proj/givt (givt.py, decode.py, parallel_decode.py), the causal
model; the paper is arXiv 2312.02116. A token is a position's vector of C channels; tokens come in raster order.
The sequence is [label embedding, projected x_0 .. x_(L-2)] plus learned positions; there is no other start token.

DB-CFG (density-based guidance): a token is drawn from p(x) ~ N(x; conditional)^(1 + w) / N(x; unconditional)^w by
rejection, channel by channel, within one component of the mixture.

Randomness: every token of every image has a stream of its own, made from (seed, image index, position); see
`StreamNoise`. An image does not depend on the batch it was made in.

Shape letters: B batch, L positions, C channels, M components of the mixture, D width, R rows (B, or 2 B with
guidance: with the class first, without it after), H heads, E head width, K proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.sampling import check_labels, decode_in_batches
from tokenbridge.tokenizers import LatentTokenizer
from tokenbridge.transformer import Attention

if TYPE_CHECKING:
    from tokenbridge.official import Place

NORM_EPS = 1e-6  # flax's default
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)

# ------------------------------------------------------------------------------------------------- densities


@dataclass(frozen=True)
class Gaussian:
    """Independent normal distributions."""

    loc: Tensor  # [..., C]
    scale: Tensor  # [..., C], standard deviations

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of x in every channel, in nats."""
        return -0.5 * ((x - self.loc) / self.scale).square() - (HALF_LOG_2PI + self.scale.log())

    def at(self, noise: Tensor) -> Tensor:
        """Turn standard normal noise into draws."""
        return self.loc + self.scale * noise

    def rows(self, index: Tensor) -> Gaussian:
        """Return some of the rows of distributions [N, C]."""
        return Gaussian(self.loc[index], self.scale[index])


@dataclass(frozen=True)
class Mixture:
    """Mixtures of M Gaussians with C independent channels each."""

    log_weights: Tensor  # [..., M], normalised
    locs: Tensor  # [..., M, C]
    scales: Tensor  # [..., M, C], standard deviations

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density [...] of x [..., C], in nats, channels summed within a component."""
        components = Gaussian(self.locs, self.scales).log_prob(x[..., None, :]).sum(-1)
        return (self.log_weights + components).logsumexp(-1)

    def component(self, index: Tensor) -> Gaussian:
        """Return one component of each mixture, by index [...]."""
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
        """What candidates are drawn from: twice the wider of the two, at the conditional's centre."""
        return Gaussian(self.conditional.loc, 2 * torch.maximum(self.conditional.scale, self.unconditional.scale))

    def bound(self) -> Tensor:
        """Return the constant [N, C] that the proposal's density is multiplied by.

        Quirk kept: it is no envelope (parallel_decode.py, CFGDensity). The density is searched on a grid of ± 10
        about the centre, and divided by the proposal's density AT the centre, the largest there is: further out
        the product may lie below the density, and samples are biased. Where the unconditional Gaussian is much
        the narrower one, the density grows without limit and float32 overflows: the constant is infinite, nothing
        is ever accepted, and the conditional draw is taken.
        """
        c, u, w = self.conditional, self.unconditional, self.weight
        # The logarithm is a parabola: of the grid's 1001 points the highest is an end, or beside the vertex.
        curvature = (1 + w) / c.scale.square() - w / u.scale.square()
        vertex = (w * (c.loc - u.loc) / u.scale.square() / curvature).nan_to_num()
        beside = ((vertex.clamp(-10, 10) + 10) * 50).long() + torch.arange(-1, 3, device=vertex.device).view(-1, 1, 1)
        ends = torch.arange(0, 1001, 1000, device=vertex.device).view(2, 1, 1).expand(2, *vertex.shape)
        grid = torch.linspace(-10, 10, 1001, device=vertex.device)
        points = c.loc + grid[torch.cat([beside.clamp(0, 1000), ends])]
        return self.log_prob(points).amax(0).exp() / self.proposal.log_prob(c.loc).exp()

    def rows(self, index: Tensor) -> GuidedDensity:
        """Return the density of some of the N rows."""
        return GuidedDensity(self.conditional.rows(index), self.unconditional.rows(index), self.weight)


# ----------------------------------------------------------------------------------------------------- model


class LayerNorm(nn.Module):
    """Layer normalisation as flax computes it.

    Quirk kept: the variance is E[x^2] - E[x]^2 (flax's use_fast_variance), which rounds otherwise than torch's.
    """

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., D]."""
        mean = x.mean(-1, keepdim=True)
        variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
        x = (x - mean) * ((variance + NORM_EPS).rsqrt() * self.weight)
        return x if self.bias is None else x + self.bias


class GIVTBlock(nn.Module):
    """Pre-norm transformer block (givt.py, EncoderDecoderBlock without an encoder)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads, bias=False, dropout=dropout)
        self.norm2 = LayerNorm(width)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)
        self.dropout = nn.Dropout(dropout)  # in the middle of the MLP only

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [B, L, D], causally."""
        x = x + self.attn(self.norm1(x), is_causal=True)
        return x + self.mlp(self.norm2(x))

    def forward_cached(self, x: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """Apply to one element x [R, 1, D], writing slot `place` of its caches [R, H, L, E].

        Slots up to and including `place` are attended to. Equals `forward` on the whole prefix.
        """
        q, k, v = self.attn.heads(self.norm1(x))
        keys[:, :, place] = k[:, :, 0]
        values[:, :, place] = v[:, :, 0]
        x = x + self.attn.attend(q, keys[:, :, : place + 1], values[:, :, : place + 1])
        return x + self.mlp(self.norm2(x))

    def mlp(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., D]; the GELU is tanh's, jax's default."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))


class GIVT(ModelMixin, ConfigMixin):
    """Class-conditional generator of continuous latents.

    Args:
        num_positions: L.
        num_channels: C of the latents.
        num_classes: number of class labels.
        num_components: M Gaussians of a mixture.
        width: of the transformer.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_width: hidden width of the MLPs.
        dropout: in training.
        null_class: have an embedding for "no class", which guidance and label dropout need.
        fix_square_plus: standard deviations are (x + sqrt(x^2 + 4)) / 2, which is above 0. Without, as in the
            official code's first models, x + sqrt(x^2 + 4) / 2, which is not.
        scale_floor: least standard deviation, before temperature.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    @register_to_config
    def __init__(
        self,
        num_positions: int = 256,
        num_channels: int = 16,
        num_classes: int = 1000,
        num_components: int = 16,
        width: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_width: int = 4096,
        dropout: float = 0.2,
        null_class: bool = True,
        fix_square_plus: bool = True,
        scale_floor: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.num_channels = num_channels
        self.num_classes = num_classes
        self.num_components = num_components
        self.num_heads = num_heads
        self.fix_square_plus = fix_square_plus
        self.scale_floor = scale_floor
        self.class_emb = nn.Embedding(num_classes + null_class, width)  # the last row stands for "no class"
        self.latent_proj = nn.Linear(num_channels, width)
        self.pos_emb = nn.Parameter(torch.randn(1, num_positions, width) / math.sqrt(width))
        self.blocks = nn.ModuleList(GIVTBlock(width, num_heads, mlp_width, dropout) for _ in range(depth))
        self.norm = LayerNorm(width, bias=True)
        self.head = nn.Linear(width, num_components * (1 + 2 * num_channels))
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as the official code: the head at zero, so that every mixture starts as N(0, 1)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith(("fc1", "fc2")):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(self.head.weight)

    def to_sequence(self, latents: Tensor) -> Tensor:
        """Flatten latents [B, C, h, w] to [B, L, C], positions in raster order."""
        return latents.flatten(2).transpose(1, 2)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents, which are square."""
        side = math.isqrt(self.num_positions)
        assert side**2 == self.num_positions, "latents are square"
        return side

    def to_latents(self, sequence: Tensor) -> Tensor:
        """Return the square latents [B, C, h, h] of a sequence [B, L, C]."""
        return sequence.transpose(1, 2).unflatten(2, (self.latent_size, self.latent_size))

    def without_class(self, labels: Tensor) -> Tensor:
        """Return the label of "no class", once for each of labels [B].

        Raises:
            ValueError: a model without one.
        """
        if self.class_emb.num_embeddings == self.num_classes:
            raise ValueError("This model has no embedding for 'no class': no guidance and no label dropout.")
        return torch.full_like(labels, self.num_classes)

    def forward(self, latents: Tensor, labels: Tensor, *, dropped: Tensor | None = None) -> Tensor:
        """Return what parameterises every position's mixture, given the positions before it.

        Args:
            latents: [B, L, C]; the last position has no effect.
            labels: class labels [B].
            dropped: [B] bool, where to use no class instead of the label.

        Returns:
            [B, L, M + 2 M C], for `mixture`.
        """
        if dropped is not None:
            labels = torch.where(dropped, self.without_class(labels), labels)
        x = torch.cat([self.class_emb(labels)[:, None], self.latent_proj(latents[:, :-1])], dim=1)
        x = x + self.pos_emb[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def mixture(self, logits: Tensor, *, temperature: float = 1.0, temp_probs: float = 1.0) -> Mixture:
        """Return the mixtures that the model's output stands for.

        Args:
            logits: [..., M + 2 M C]: mixture logits, then (component, centre or scale, channel).
            temperature: multiplies the standard deviations.
            temp_probs: multiplies the mixture logits (and does not divide them).
        """
        m = self.num_components
        locs, raw = logits[..., m:].float().unflatten(-1, (m, 2, self.num_channels)).unbind(-2)
        root = (raw.square() + 4).sqrt()
        scales = (raw + root) / 2 if self.fix_square_plus else raw + root / 2
        log_weights = (logits[..., :m].float() * temp_probs).log_softmax(-1)
        return Mixture(log_weights, locs, scales.clamp(min=self.scale_floor) * temperature)

    def empty_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return room for the keys and values of all positions, each [depth, R, H, L, E]."""
        head_width = self.pos_emb.shape[-1] // self.num_heads
        shape = (len(self.blocks), num_rows, self.num_heads, self.num_positions, head_width)
        return self.pos_emb.new_empty(shape), self.pos_emb.new_empty(shape)

    def next_logits(self, x: Tensor, cache: tuple[Tensor, Tensor], position: int) -> Tensor:
        """Return the output at one position, whose keys and values go into the cache.

        Args:
            x: [R, D], the embedded label at position 0, the projected latent of the position before elsewhere.
            cache: of `empty_cache`, filled for all positions before.
            position: from 0.

        Returns:
            [R, M + 2 M C], as `forward` gives it there.
        """
        x = x[:, None] + self.pos_emb[:, position, None]
        for block, keys, values in zip(self.blocks, *cache, strict=True):
            assert isinstance(block, GIVTBlock)
            x = block.forward_cached(x, keys, values, position)
        return self.head(self.norm(x[:, 0]))

    def official_layout(self) -> dict[str, Place]:
        """Return the places of the published parameters, blocks unrolled."""
        from tokenbridge.givt_official import givt_layout  # not above: it imports the presets, and they this file

        return givt_layout(self)


def givt_loss(model: GIVT, latents: Tensor, labels: Tensor, *, label_dropout: float = 0.1) -> Tensor:
    """Negative log likelihood of a position, channels summed, mean over positions and images, in nats.

    Which labels are dropped comes from torch's global generator. The published trainer asks for label dropout and
    never passes it on (trainers/proj/givt/generative.py), so that its row for "no class" kept its random start;
    here it is trained.

    Args:
        model: in training mode, for dropout.
        latents: [B, C, h, w], draws of the posterior.
        labels: [B].
        label_dropout: share of labels replaced by "no class", for guidance.

    Returns:
        Scalar.
    """
    sequence = model.to_sequence(latents)
    dropped = torch.rand(len(labels), device=labels.device) < label_dropout if label_dropout > 0 else None
    return -model.mixture(model(sequence, labels, dropped=dropped)).log_prob(sequence).mean()


# -------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class GivtSamplingConfig:
    """Everything that decides which image a seed gives."""

    temperature: float = 1.0  # multiplies the standard deviations, with and without the class
    temp_probs: float = 1.0  # multiplies the mixture logits
    guidance_weight: float = 0.0  # w of DB-CFG; 0 means no guidance
    num_proposals: int = 1000  # per channel, before the conditional draw is taken

    def __post_init__(self) -> None:
        for name in ("temperature", "temp_probs"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ValueError(f"{name} must be above 0, not {value}.")
        if not (math.isfinite(self.guidance_weight) and self.guidance_weight >= 0):
            raise ValueError(f"The guidance weight must be at least 0, not {self.guidance_weight}.")
        if self.num_proposals < 1:
            raise ValueError(f"The number of proposals must be at least 1, not {self.num_proposals}.")


class TokenNoise(Protocol):
    """The random numbers of one position in a batch of images."""

    def gumbels(self) -> Tensor:
        """Return standard Gumbel numbers [B, M], which choose the component."""
        ...

    def normals(self, component: Tensor) -> Tensor:
        """Return standard normal numbers [B, C], for the conditional draw from components [B]."""
        ...

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the next standard normal and uniform numbers, each [num, len(rows), C], of some of the images."""
        ...


class StreamNoise:
    """Numbers from a stream for each (seed, image index, position), drawn as they are needed, on the CPU.

    A stream gives M Gumbel numbers, C normal ones (the conditional draw), and then, with guidance, the proposals
    in rounds of 32, 32, 64, 128, ...: in each the normal, then the uniform numbers [round, C]. Rounds that no channel
    of the image needs are never drawn; 1,000 proposals for every token would cost more than the transformer.
    """

    def __init__(self, seed: int, image_indices: list[int], position: int, model: GIVT) -> None:
        self.sizes = model.num_components, model.num_channels
        self.device = model.device
        self.streams = [np.random.default_rng((seed, index, position)) for index in image_indices]

    def gumbels(self) -> Tensor:
        """Return [B, M]."""
        return self._tensor([stream.gumbel(size=self.sizes[0]) for stream in self.streams])

    def normals(self, component: Tensor) -> Tensor:
        """Return [B, C]; the official code draws them for every component and keeps one component's."""
        return self._tensor([stream.standard_normal(self.sizes[1]) for stream in self.streams])

    def proposals(self, rows: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """Return the next [num, len(rows), C] of these images, twice."""
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
    """One token of each image, and how it came about."""

    values: Tensor  # [B, C]
    bound: Tensor | None = None  # [B, C] of the rejection sampling; None without guidance
    first_accepted: Tensor | None = None  # [B, C] int64, which proposal it was; -1 where none, and the draw conditional


FIRST_ROUND = 32  # proposals: nearly all tokens need fewer


def draw_token(
    conditional: Mixture, unconditional: Mixture | None, config: GivtSamplingConfig, noise: TokenNoise
) -> Draw:
    """Draw a token of each image from its mixture, [B]; guided if there is an unconditional one.

    The component is drawn from the conditional mixture; the unconditional one's of the same index stands against
    it, whatever its weight.
    """
    component = (conditional.log_weights + noise.gumbels()).argmax(-1)
    plain = conditional.component(component)
    values = plain.at(noise.normals(component))
    if unconditional is None:
        return Draw(values)
    density = GuidedDensity(plain, unconditional.component(component), config.guidance_weight)
    return draw_guided(density, values, noise, config.num_proposals)


def draw_guided(density: GuidedDensity, fallback: Tensor, noise: TokenNoise, num_proposals: int) -> Draw:
    """Draw from a guided density [B, C] by rejection; every channel takes the first proposal it accepts.

    Proposals are tried in rounds, each as long as all before, and only for images with an undecided channel: one
    look at the device a round. Which images are in a round has no effect on the others.

    Args:
        density: of the chosen components.
        fallback: [B, C], taken where no proposal is accepted: the conditional draw. (The official code makes
            it from the same random key as the proposals; here it has numbers of its own.)
        noise: gives the proposals.
        num_proposals: to try before giving up.
    """
    bound = density.bound()
    values, first = fallback.clone(), torch.full_like(fallback, -1, dtype=torch.int64)
    hopeless = ~bound.isfinite()  # nothing is below an infinite or undefined height
    rows = (~hopeless).any(-1).nonzero().flatten()
    tried = 0
    while tried < num_proposals and len(rows):
        num = min(max(tried, FIRST_ROUND), num_proposals - tried)
        normals, uniforms = noise.proposals(rows, num)
        part = density.rows(rows)
        x = part.proposal.at(normals)
        heights = uniforms * (bound[rows] * part.proposal.log_prob(x).exp())
        accepted = heights < part.log_prob(x).exp()  # [K, rows, C]
        place = accepted.to(torch.int8).argmax(0, keepdim=True)  # the first of them
        new = accepted.any(0) & (first[rows] < 0)
        values[rows] = torch.where(new, x.gather(0, place)[0], values[rows])
        first[rows] = torch.where(new, place[0] + tried, first[rows])
        rows = rows[((first[rows] < 0) & ~hopeless[rows]).any(-1)]
        tried += num
    return Draw(values, bound, first)


@torch.inference_mode()
def generate_draws(
    model: GIVT, labels: Tensor, config: GivtSamplingConfig, noise: Callable[[int], TokenNoise]
) -> Iterator[Draw]:
    """Generate the tokens of a batch of images, one position after another; see `generate_latents`."""
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


def generate_latents(
    model: GIVT, labels: Tensor, config: GivtSamplingConfig, noise: Callable[[int], TokenNoise]
) -> Tensor:
    """Generate the latents of a batch of images.

    Args:
        model: in evaluation mode.
        labels: [B] class labels.
        config: how to sample.
        noise: gives the random numbers of a position, from 0.

    Returns:
        [B, C, h, h] float32.

    Raises:
        ValueError: labels out of range; guidance of a model that has no embedding for "no class".
    """
    check_labels(labels, len(labels), model.num_classes)
    return model.to_latents(torch.stack([d.values for d in generate_draws(model, labels, config, noise)], dim=1))


def sample_images(
    model: GIVT,
    tokenizer: LatentTokenizer,
    config: GivtSamplingConfig,
    labels: Tensor,
    seed: int,
    *,
    batch_size: int = 250,
    show_progress: bool = True,
) -> Tensor:
    """Generate one image for each label; image i is a function of the seed, its label and i alone.

    Args:
        model: in evaluation mode.
        tokenizer: decodes the model's latents.
        config: how to sample.
        labels: [N] class labels, N >= 1.
        seed: at least 0.
        batch_size: images at a time.
        show_progress: draw a progress bar on stderr.

    Returns:
        uint8 pixels [N, C, H, W] on the CPU.

    Raises:
        ValueError: no labels, labels out of range, a negative seed.
    """
    if seed < 0:
        raise ValueError(f"A seed is at least 0, not {seed}.")

    def latents(indices: list[int]) -> Tensor:
        return generate_latents(model, labels[indices], config, lambda i: StreamNoise(seed, indices, i, model))

    return decode_in_batches(latents, tokenizer, len(labels), batch_size=batch_size, show_progress=show_progress)
