"""GIVT: an autoregressive transformer over continuous latents, with a Gaussian mixture as its output.

Source: the causal model of google-research/big_vision at 0127fb6, models/proj/givt (givt.py, decode.py,
parallel_decode.py); the paper is arXiv 2312.02116. A token is the vector of a position's C channels, and tokens are
generated in raster order. The sequence is [label embedding, projected x_0 .. x_(L-2)] plus learned position embeddings;
the label embedding is the only start token.

With DB-CFG (density-based guidance), a token is drawn from p(x) ~ N(x; conditional)^(1 + w) / N(x; unconditional)^w by
rejection sampling, channel by channel, within one component of the mixture.

Every token of every image has a random stream of its own, seeded with (seed, image index, position), so an image does
not depend on its batch (see `sampling.StreamNoise`).

Shape letters: B batch, L positions, C channels, M components of the mixture, D width, R rows (B, or 2 B with
guidance: with the class first, without it after), H heads, E head width, K proposals.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.models.givt.density import Mixture
from tokenbridge.models.layers import Attention
from tokenbridge.utils.errors import UserError

NORM_EPS = 1e-6  # flax's default


# ----------------------------------------------------------------------------------------------------- model


class LayerNorm(nn.Module):
    """Layer normalisation with the arithmetic of flax.

    Quirk kept: the variance is E[x^2] - E[x]^2 (flax's use_fast_variance), which rounds differently from torch's.
    """

    def __init__(self, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., D]."""
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
        """Apply the block to x [B, L, D] with causal attention."""
        x = x + self.attn(self.norm1(x), is_causal=True)
        return x + self.mlp(self.norm2(x))

    def forward_cached(self, x: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """Apply the block to one sequence element x [R, 1, D], and write slot `place` of its caches [R, H, L, E].

        The element attends to the slots up to and including `place`. The result is that of `forward` on the whole
        prefix.
        """
        q, k, v = self.attn.heads(self.norm1(x))
        keys[:, :, place] = k[:, :, 0]
        values[:, :, place] = v[:, :, 0]
        x = x + self.attn.attend(q, keys[:, :, : place + 1], values[:, :, : place + 1])
        return x + self.mlp(self.norm2(x))

    def mlp(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., D]; its GELU is the tanh approximation, which is jax's default."""
        return self.fc2(self.dropout(F.gelu(self.fc1(x), approximate="tanh")))


class GIVT(ModelMixin, ConfigMixin):
    """Class-conditional generator of continuous latents.

    Args:
        num_positions: L, a square number.
        num_channels: C.
        num_components: M.
        width: D, a multiple of `num_heads`.
        null_class: add an embedding for "no class", which guidance and label dropout need.
        fix_square_plus: compute standard deviations as (x + sqrt(x^2 + 4)) / 2, which is positive. If false, as in the
            first models of the official code, they are x + sqrt(x^2 + 4) / 2, which may be negative.
        scale_floor: smallest standard deviation, before the temperature is applied.
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
        """Flatten latents [B, C, h, w] to [B, L, C], with the positions in raster order."""
        return latents.flatten(2).transpose(1, 2)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents, which are square."""
        side = math.isqrt(self.num_positions)
        assert side**2 == self.num_positions, "latents are square"
        return side

    def to_latents(self, sequence: Tensor) -> Tensor:
        """Return a sequence [B, L, C] as square latents [B, C, h, h]."""
        return sequence.transpose(1, 2).unflatten(2, (self.latent_size, self.latent_size))

    def without_class(self, labels: Tensor) -> Tensor:
        """Return labels [B] that all stand for "no class".

        Raises:
            UserError: the model has no embedding for "no class".
        """
        if self.class_emb.num_embeddings == self.num_classes:
            raise UserError("This model has no embedding for 'no class', which guidance and label dropout need.")
        return torch.full_like(labels, self.num_classes)

    def forward(self, latents: Tensor, labels: Tensor, *, dropped: Tensor | None = None) -> Tensor:
        """Return the parameters [B, L, M + 2 M C] of every position's mixture, given the positions before it.

        `mixture` turns them into a mixture.

        Args:
            latents: [B, L, C]; the last position has no effect.
            labels: [B].
            dropped: [B] bool, true for images whose label is ignored.
        """
        if dropped is not None:
            labels = torch.where(dropped, self.without_class(labels), labels)
        x = torch.cat([self.class_emb(labels)[:, None], self.latent_proj(latents[:, :-1])], dim=1)
        x = x + self.pos_emb[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def mixture(self, logits: Tensor, *, temperature: float = 1.0, temp_probs: float = 1.0) -> Mixture:
        """Return the mixtures that the model's output describes.

        Args:
            logits: [..., M + 2 M C]: M mixture logits, followed by centres and scales in the order (component, centre
                or scale, channel).
            temperature: multiplies the standard deviations.
            temp_probs: multiplies the mixture logits (and does not divide them, as a temperature would).
        """
        m = self.num_components
        locs, raw = logits[..., m:].float().unflatten(-1, (m, 2, self.num_channels)).unbind(-2)
        root = (raw.square() + 4).sqrt()
        scales = (raw + root) / 2 if self.fix_square_plus else raw + root / 2
        log_weights = (logits[..., :m].float() * temp_probs).log_softmax(-1)
        return Mixture(log_weights, locs, scales.clamp(min=self.scale_floor) * temperature)

    def empty_cache(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return uninitialised caches for the keys and values of all positions, each [depth, R, H, L, E]."""
        head_width = self.pos_emb.shape[-1] // self.num_heads
        shape = (len(self.blocks), num_rows, self.num_heads, self.num_positions, head_width)
        return self.pos_emb.new_empty(shape), self.pos_emb.new_empty(shape)

    def next_logits(self, x: Tensor, cache: tuple[Tensor, Tensor], position: int) -> Tensor:
        """Return the output [R, M + 2 M C] of `forward` at one position, and write its keys and values to the cache.

        Args:
            x: [R, D], the embedded label at position 0, and the projected latent of the previous position elsewhere.
            cache: keys and values from `empty_cache`, which are filled for all previous positions.
            position: in 0 .. L - 1.
        """
        x = x[:, None] + self.pos_emb[:, position, None]
        for block, keys, values in zip(self.blocks, *cache, strict=True):
            assert isinstance(block, GIVTBlock)
            x = block.forward_cached(x, keys, values, position)
        return self.head(self.norm(x[:, 0]))


def givt_loss(model: GIVT, latents: Tensor, labels: Tensor, *, label_dropout: float = 0.1) -> Tensor:
    """Return the mean negative log-likelihood of a position, a scalar in nats (summed over the channels).

    The dropped labels are drawn from torch's global generator. The published trainer has a setting for label dropout
    but never passes it on (trainers/proj/givt/generative.py), so its embedding for "no class" kept its random initial
    values. Here it is trained.

    Args:
        model: the model in training mode, in which it uses dropout.
        latents: [B, C, h, w], samples of the posterior.
        labels: [B].
        label_dropout: share of labels that are replaced by "no class", so that guidance works.
    """
    sequence = model.to_sequence(latents)
    dropped = torch.rand(len(labels), device=labels.device) < label_dropout if label_dropout > 0 else None
    return -model.mixture(model(sequence, labels, dropped=dropped)).log_prob(sequence).mean()
