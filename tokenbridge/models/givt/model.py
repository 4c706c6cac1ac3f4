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
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.models.givt.density import Mixture
from tokenbridge.models.layers import Attention
from tokenbridge.utils.errors import UserError

if TYPE_CHECKING:
    pass


NORM_EPS = 1e-6  # flax's default


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
            raise UserError("This model has no embedding for 'no class': no guidance and no label dropout.")
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
