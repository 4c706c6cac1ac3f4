"""The plain way to do what the package does fast: no cache, no shared work, nothing skipped.

Written from the description of the method, structured as the official code is: distances to all levels, boolean
masks, decoder output at every position, one pass with the class and one without, the whole prefix for every
channel. Parameters are those of the package's models, so both give the same numbers.

Shape letters: B batch, L positions, C channels, V levels, R buffer tokens, D width, N masked positions of a batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenbridge.backbone import MaskedBackbone
from tokenbridge.generator import TokenBridge
from tokenbridge.heads import ARHead, Pick
from tokenbridge.orders import random_orders, training_mask_count
from tokenbridge.transformer import ModulatedBlock


def quantize(latents: Tensor, codebook: Tensor, *, value_range: float) -> Tensor:
    """Return the tokens of latents by the smallest of all distances [..., V]."""
    return (latents.clamp(-value_range, value_range)[..., None] - codebook).abs().argmin(-1)


def sample_channels(head: ARHead, context: Tensor, pick: Pick) -> Tensor:
    """Return tokens [N, C] of context [N, D]: every channel runs the whole prefix through the head."""
    prefix = [head.condition_proj(context) + head.timesteps_embeddings[:, 0]]
    tokens: list[Tensor] = []
    for i in range(head.num_channels):
        if i > 0:
            prefix.append(head.token_embeddings[i - 1](tokens[-1]))
        x = torch.stack(prefix, dim=1) + head.channel_embed[:, : i + 1]
        condition = head.condition_proj(context)[:, None] + head.timesteps_embeddings[:, : i + 1]
        for block in cast("list[ModulatedBlock]", list(head.channel_blocks)):
            x = block(x, block.adaLN_modulation(condition), is_causal=True)
        x = head.channel_final(head.channel_norm(x), condition)
        tokens.append(pick(head.channel_heads[i](x[:, -1]), i))
    return torch.stack(tokens, dim=1)


def draw(uniforms: Tensor) -> Pick:
    """Return the function that picks the first level whose cumulative probability exceeds uniforms [N, C]."""

    def pick(logits: Tensor, place: int) -> Tensor:
        cumulative = logits.softmax(-1).cumsum(-1)
        return (cumulative <= uniforms[:, place, None] * cumulative[:, -1:]).sum(-1)

    return pick


def context(model: TokenBridge, tokens: Tensor, masked: Tensor, embedding: Tensor) -> Tensor:
    """Return the context [B, L, D] of all positions; `masked` is [B, L] bool, `embedding` [B, D] the class."""
    return backbone_context(model.backbone, model.quantizer.codebook[tokens], masked, embedding)


def backbone_context(net: MaskedBackbone, latents: Tensor, masked: Tensor, embedding: Tensor) -> Tensor:
    """Return the context [B, L, D] of all positions for latents [B, L, C]."""
    batch = latents.shape[0]
    buffer = torch.zeros(batch, net.num_buffer, dtype=torch.bool)
    hidden = torch.cat([buffer, masked], dim=1)

    x = net.z_proj(latents)
    x = torch.cat([embedding[:, None].repeat(1, net.num_buffer, 1), x], dim=1)
    x = net.z_proj_ln(x + net.encoder_pos_embed_learned)
    x = x[~hidden].reshape(batch, -1, x.shape[-1])
    for block in net.encoder_blocks:
        x = block(x)
    x = net.decoder_embed(net.encoder_norm(x))

    full = net.mask_token.repeat(batch, hidden.shape[1], 1)
    full[~hidden] = x.flatten(0, 1)
    x = full + net.decoder_pos_embed_learned
    for block in net.decoder_blocks:
        x = block(x)
    return net.decoder_norm(x)[:, net.num_buffer :] + net.output_pos_embed


def sampling_step(
    model: TokenBridge,
    tokens: Tensor,
    masked: Tensor,
    predicted: Tensor,
    labels: Tensor,
    guidance: float,
    uniforms: Tensor,
) -> Tensor:
    """Return tokens [B, L, C] with those of the `predicted` positions filled in; masks are [B, L] bool."""
    conditional = context(model, tokens, masked, model.backbone.class_emb(labels))
    unconditional = context(model, tokens, masked, model.backbone.fake_latent.repeat(len(tokens), 1))
    assert isinstance(model.head, ARHead)
    z = (unconditional + guidance * (conditional - unconditional))[predicted]
    chosen = sample_channels(model.head, z, draw(uniforms[predicted]))
    result = tokens.clone()
    result[predicted] = chosen[:, list(model.inverse_channel_order)]
    return result


def token_losses(
    model: TokenBridge, latents: Tensor, labels: Tensor, *, label_dropout: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses [N, C] of all masked positions' tokens, the mask [B, L], and the order [B, L] behind it.

    Draws the same random numbers as `generator_loss`, in the same order.
    """
    batch, length = latents.shape[0], model.num_positions
    value_range = float(model.config["value_range"])
    values = latents.flatten(2).transpose(1, 2)
    tokens = quantize(values, model.quantizer.codebook, value_range=value_range)
    order = random_orders(batch, length)
    num_masked = training_mask_count(length)
    masked = torch.zeros(batch, length, dtype=torch.bool).scatter(1, order[:, :num_masked], True)
    dropped = torch.rand(batch) < label_dropout
    embedding = torch.where(dropped[:, None], model.backbone.fake_latent, model.backbone.class_emb(labels))
    z = context(model, tokens, masked, embedding)[masked]
    targets = tokens[masked][:, list(model.channel_order)]
    logits = model.head.logits(z, targets)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), masked, order
