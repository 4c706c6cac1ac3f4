"""The masked autoregressive backbone: MAR's encoder-decoder (LTH14/mar, models/mar.py), which TokenBridge shares.

The encoder sees only the class (in `num_buffer` leading tokens) and the visible positions. The decoder sees these and
a mask token at every masked position, and it returns a context vector z for each position.

All images of a batch have the same number of masked positions, so the index tensor `visible` [B, V] has a static
shape. Positions are gathered and scattered by index, which needs no boolean masks and never waits for the device.

Shape letters: B batch, L positions, V visible positions, C channels, D width (E of the encoder where they differ),
R buffer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenbridge.models.layers import Block, learned


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes of the backbone."""

    num_positions: int = 256  # L = height * width of the latents
    num_channels: int = 16  # C of the latents
    num_classes: int = 1000
    width: int = 1024  # D of the encoder
    encoder_depth: int = 16
    decoder_depth: int = 16
    num_heads: int = 16  # of the encoder
    num_buffer: int = 64  # number of leading tokens, each of which is the class embedding
    decoder_width: int | None = None  # D of the decoder; that of the encoder if None, as in all presets
    decoder_num_heads: int | None = None  # that of the encoder if None
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6  # as in the official presets; the official class itself has torch's default, 1e-5
    dropout: float = 0.1  # of attention weights, projections and MLPs, in training


class MaskedBackbone(nn.Module):
    """MAR's encoder-decoder. `forward` maps the visible latents to one context vector per position."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        c, e = config, config.width
        d = c.decoder_width or e
        shared = {"mlp_ratio": c.mlp_ratio, "norm_eps": c.norm_eps, "dropout": c.dropout}
        self.num_buffer = c.num_buffer
        self.num_positions = c.num_positions
        self.class_emb = nn.Embedding(c.num_classes, e)
        nn.init.normal_(self.class_emb.weight, std=0.02)
        self.fake_latent = learned(1, e)  # stands for "no class"
        self.z_proj = nn.Linear(c.num_channels, e)
        self.z_proj_ln = nn.LayerNorm(e, eps=1e-6)  # 1e-6 whatever `norm_eps` is, as in the official code
        self.encoder_pos_embed_learned = learned(1, c.num_buffer + c.num_positions, e)
        self.encoder_blocks = nn.ModuleList(Block(e, c.num_heads, **shared) for _ in range(c.encoder_depth))
        self.encoder_norm = nn.LayerNorm(e, eps=c.norm_eps)
        self.decoder_embed = nn.Linear(e, d)
        self.mask_token = learned(1, 1, d)
        self.decoder_pos_embed_learned = learned(1, c.num_buffer + c.num_positions, d)
        self.decoder_blocks = nn.ModuleList(
            Block(d, c.decoder_num_heads or c.num_heads, **shared) for _ in range(c.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(d, eps=c.norm_eps)
        self.output_pos_embed = learned(1, c.num_positions, d)

    def embed_class(self, labels: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Return class embeddings [B, E] of labels [B]; `fake_latent` where `dropped` [B] is true."""
        embedding = self.class_emb(labels)
        if dropped is None:
            return embedding
        return torch.where(dropped[:, None], self.fake_latent.to(embedding.dtype), embedding)

    def encode(self, latents: Tensor, visible: Tensor, class_embedding: Tensor) -> Tensor:
        """Encode the buffer tokens and the visible positions.

        Args:
            latents: [B, V, C], continuous latents of the visible positions.
            visible: [B, V], their positions, rising in each row.
            class_embedding: [B, E].

        Returns:
            Features [B, R + V, E]; those of the buffer tokens come first.
        """
        x = torch.cat([class_embedding[:, None].expand(-1, self.num_buffer, -1), self.z_proj(latents)], dim=1)
        x = x + self.encoder_pos_embed_learned[0, self._with_buffer(visible)]
        x = self.z_proj_ln(x)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, visible: Tensor, positions: Tensor | None = None) -> Tensor:
        """Fill the masked positions with the mask token and decode.

        Args:
            encoded: [B, R + V, E], the output of `encode`.
            visible: [B, V], the positions that were encoded.
            positions: [B, K]; only their context is computed (the last block skips the others). None means all
                positions.

        Returns:
            The context z, [B, K, D] or [B, L, D].
        """
        x = self.decoder_embed(encoded)
        places = self._with_buffer(visible)[..., None].expand(-1, -1, x.shape[-1])
        full = self.mask_token.to(x.dtype).expand(x.shape[0], self.num_buffer + self.num_positions, -1)
        x = full.scatter(1, places, x) + self.decoder_pos_embed_learned
        if positions is None:
            positions = torch.arange(self.num_positions, device=x.device).expand(x.shape[0], -1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        x = self.decoder_blocks[-1](x, positions + self.num_buffer)
        return self.decoder_norm(x) + self.output_pos_embed[0, positions]

    def context(
        self,
        latents: Tensor,
        visible: Tensor,
        labels: Tensor | None,
        *,
        dropped: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the context z, [B, K, D] or [B, L, D], given visible latents [B, V, C] and class labels [B].

        Images have no class if `labels` is None, or where `dropped` [B] is true.
        """
        if labels is None:
            embedding = self.fake_latent.expand(latents.shape[0], -1)
        else:
            embedding = self.embed_class(labels, dropped)
        return self(latents.to(embedding.dtype), visible, embedding, positions)

    def forward(
        self, latents: Tensor, visible: Tensor, class_embedding: Tensor, positions: Tensor | None = None
    ) -> Tensor:
        """Return the context z, [B, K, D] or [B, L, D]; `encode` and `decode` describe the arguments."""
        return self.decode(self.encode(latents, visible, class_embedding), visible, positions)

    def _with_buffer(self, visible: Tensor) -> Tensor:
        """Return the indices [B, R + V] of buffer tokens and visible positions [B, V] in the whole sequence."""
        buffer = torch.arange(self.num_buffer, device=visible.device).expand(visible.shape[0], -1)
        return torch.cat([buffer, visible + self.num_buffer], dim=1)
