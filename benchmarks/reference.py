"""The reference path: TokenBridge as its official code computes it, without what makes the package fast.

It follows YuqingWang1029/TokenBridge at 3ede281, models/tokenbridge.py, in words and structure of our own. It shares
no arithmetic with the package: it consists of plain functions of the weights by their official names. As in the
official code:

- the quantiser computes the distances to all levels and takes the smallest (`quantize`);
- guidance takes two forward passes of the whole batch, first with the class and then without it (`sample_tokens`), not
  one pass of a doubled batch;
- the encoder's input and the decoder's output cover all positions, which boolean masks select from;
- the head runs the whole prefix, with its modulation, again for every channel (`_sample_channel_ar`);
- the schedule lies on the device, so every iteration waits for it.

Shape letters: B batch, L positions, C channels, V levels, R buffer tokens, S sequence, H heads, D width,
N positions of any image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from tokenbridge.models.masked import MaskedBackbone
from tokenbridge.models.masked_sampling import random_orders, training_mask_count
from tokenbridge.models.tokenbridge.checkpoint import tokenbridge_layout
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.orders import OFFICIAL_CHANNEL_ORDER

Pick = Callable[[Tensor, int], Tensor]
"""Choose tokens [N] from logits [N, V] of the i-th generated channel."""


def quantize(latents: Tensor, codebook: Tensor, *, value_range: float) -> Tensor:
    """Return the tokens of latents by the smallest of all distances [..., V]."""
    return (latents.clamp(-value_range, value_range)[..., None] - codebook).abs().argmin(-1)


def reconstruction_values(num_levels: int, std_range: float) -> Tensor:
    """Return the means [V] of N(0, 1) in bins of equal probability, cut at ± `std_range`; float32 throughout."""
    cuts = torch.tensor(stats.norm.ppf(torch.linspace(0, 1, num_levels + 1).numpy()), dtype=torch.float32)
    cuts = cuts.clamp(-std_range, std_range)
    values = []
    for a, b in itertools.pairwise(cuts):
        density = [torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in (a, b)]
        below = [(1 + torch.erf(x / math.sqrt(2))) / 2 for x in (a, b)]
        values.append((density[0] - density[1]) / (below[1] - below[0]))
    return torch.stack(values)


def draw(uniforms: Tensor, temperature: float = 1.0) -> Pick:
    """Return a function that chooses the first level whose cumulative probability exceeds uniforms [N, C].

    The official code draws from torch's global stream (`multinomial`). With given numbers, two paths can be compared.
    """

    def pick(logits: Tensor, place: int) -> Tensor:
        cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1)
        return (cumulative <= uniforms[:, place, None] * cumulative[:, -1:]).sum(-1)

    return pick


def greedy(logits: Tensor, place: int) -> Tensor:
    """Choose the most likely level."""
    return logits.argmax(-1)


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


@dataclass(frozen=True)
class SampleArguments:
    """Arguments of the official `sample_tokens`, by their official names."""

    num_iter: int
    cfg: float = 1.0
    cfg_schedule: str = "linear"
    temperature: float = 0.0  # 0 takes the most likely level


@dataclass(frozen=True)
class Reference:
    """TokenBridge as plain functions of its weights.

    Args:
        weights: parameters by official name.
        config: all arguments of the official constructor (`conformance.tokenbridge.tokenbridge_config`).
        values: the quantiser's reconstruction values [V], in units of its Gaussian.
        causal: [C, C], -inf above the diagonal, added to the head's attention scores.
        channel_order: a constant of the official code.
    """

    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]
    values: Tensor
    causal: Tensor
    channel_order: tuple[int, ...] = OFFICIAL_CHANNEL_ORDER

    # -------------------------------------------------------------------------------------------- layers

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Apply the linear layer `name`."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, x: Tensor, name: str, *, eps: float | None = None) -> Tensor:
        """Apply the LayerNorm `name`."""
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config["norm_layer_eps"] if eps is None else eps)

    def attention(self, x: Tensor, name: str, num_heads: int, mask: Tensor | None = None) -> Tensor:
        """Attend within x [B, S, D]; with a mask [S, S], as in the head, queries and keys are normalised."""
        batch, length, width = x.shape
        qkv = self.linear(x, f"{name}.qkv").reshape(batch, length, 3, num_heads, width // num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, S, D / H]
        if mask is not None:
            q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.linear(attended.transpose(1, 2).reshape(batch, length, width), f"{name}.proj")

    def mlp(self, x: Tensor, name: str) -> Tensor:
        """Apply the MLP `name`."""
        return self.linear(F.gelu(self.linear(x, f"{name}.fc1")), f"{name}.fc2")

    def blocks(self, x: Tensor, part: str) -> Tensor:
        """Run x [B, S, D] through the blocks (timm's) of the part "encoder" or "decoder"."""
        for i in range(self.config[f"{part}_depth"]):
            block = f"{part}_blocks.{i}"
            normed = self.norm(x, f"{block}.norm1")
            x = x + self.attention(normed, f"{block}.attn", self.config[f"{part}_num_heads"])
            x = x + self.mlp(self.norm(x, f"{block}.norm2"), f"{block}.mlp")
        return x

    # ---------------------------------------------------------------------------------------- quantiser

    def encode(self, latents: Tensor) -> Tensor:
        """Return the tokens of latents."""
        c = self.config
        unit = (latents - c["quant_min"]) / (c["quant_max"] - c["quant_min"])
        return quantize(unit * (2 * c["std_range"]) - c["std_range"], self.values, value_range=c["std_range"])

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the latents that tokens stand for."""
        c = self.config
        unit = (self.values[tokens] + c["std_range"]) / (2 * c["std_range"])
        return unit * (c["quant_max"] - c["quant_min"]) + c["quant_min"]

    # ----------------------------------------------------------------------------------------- backbone

    def class_embedding(self, labels: Tensor | None, batch: int) -> Tensor:
        """Return the embedding [B, D] of labels [B], or of no class."""
        if labels is None:
            return self.weights["fake_latent"].repeat(batch, 1)
        return self.weights["class_emb.weight"][labels]

    def encoder(self, latents: Tensor, mask: Tensor, embedding: Tensor) -> Tensor:
        """Return [B, R + visible, D] of latents [B, L, C], mask [B, L] (1 is masked) and class embedding [B, D]."""
        batch, num_buffer = latents.shape[0], self.config["buffer_size"]
        x = self.linear(latents, "z_proj")
        x = torch.cat([embedding.to(x.dtype)[:, None].repeat(1, num_buffer, 1), x], dim=1)
        x = self.norm(x + self.weights["encoder_pos_embed_learned"], "z_proj_ln", eps=1e-6)
        x = x[self._kept(mask)].reshape(batch, -1, x.shape[-1])
        return self.norm(self.blocks(x, "encoder"), "encoder_norm")

    def decoder(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """Return the context [B, L, D] of all positions."""
        x = self.linear(encoded, "decoder_embed")
        full = self.weights["mask_token"].to(x.dtype).repeat(x.shape[0], self.config["buffer_size"] + mask.shape[1], 1)
        full[self._kept(mask)] = x.flatten(0, 1)
        x = full + self.weights["decoder_pos_embed_learned"]
        x = self.norm(self.blocks(x, "decoder"), "decoder_norm")
        return x[:, self.config["buffer_size"] :] + self.weights["output_pos_embed"]

    def context(self, latents: Tensor, mask: Tensor, embedding: Tensor) -> Tensor:
        """Return the context [B, L, D]; arguments as `encoder`."""
        return self.decoder(self.encoder(latents, mask, embedding), mask)

    def _kept(self, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the indices of the encoder's elements, buffer and visible positions; this waits for the device."""
        buffer = torch.zeros(mask.shape[0], self.config["buffer_size"], device=mask.device)
        return (1 - torch.cat([buffer, mask], dim=1)).nonzero(as_tuple=True)

    # --------------------------------------------------------------------------------------------- head

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the input [N, S, D] of the output layers for a prefix x [N, S, D] of channels and its condition."""
        length = x.shape[1]
        x = x + self.weights["channel_embed"][:, :length]
        for i in range(self.config["channel_depth"]):
            block = f"channel_blocks.{i}"
            modulation = self.linear(F.silu(condition), f"{block}.adaLN_modulation.1")
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
            y = self.norm(x, f"{block}.norm1") * (1 + scale1) + shift1
            x = x + gate1 * self.attention(
                y, f"{block}.attn", self.config["channel_heads"], self.causal[:length, :length]
            )
            y = self.norm(x, f"{block}.norm2") * (1 + scale2) + shift2
            x = x + gate2 * self.mlp(y, f"{block}.mlp")
        x = self.norm(x, "channel_norm")
        # Quirk kept: the order is scale, shift here, and shift, scale above.
        scale, shift = self.linear(F.silu(condition), "channel_final.adaLN_modulation.1").chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=self.config["norm_layer_eps"]) * (1 + scale) + shift

    def token_embedding(self, place: int, tokens: Tensor) -> Tensor:
        """Return the embedding of tokens [N] of the channel that is generated as number `place`, from 0."""
        return self.weights[f"token_embeddings.{place}.weight"][tokens]

    def sample_channels(self, features: Tensor, pick: Pick) -> Tensor:
        """Return tokens [N, C] for features [N, D]; for every channel the whole prefix runs through the head."""
        condition = self.linear(features, "condition_proj")[:, None] + self.weights["timesteps_embeddings"]
        # Quirk kept: the first element has a timestep embedding, which training leaves out.
        prefix = [condition[:, 0]]
        tokens: list[Tensor] = []
        for i in range(self.config["vae_embed_dim"]):
            if i > 0:
                prefix.append(self.token_embedding(i - 1, tokens[-1]).to(condition.dtype))
            x = self.head(torch.stack(prefix, dim=1), condition[:, : i + 1])
            tokens.append(pick(self.linear(x[:, -1], f"channel_heads.{i}"), i))
        return torch.stack(tokens, dim=1)

    def training_logits(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return logits [N, C, V] for features [N, D] and their true tokens [N, C] in generation order."""
        first = self.linear(features, "condition_proj")
        num_channels = self.config["vae_embed_dim"]
        prefix = [first, *(self.token_embedding(i, targets[:, i]) for i in range(num_channels - 1))]
        x = self.head(torch.stack(prefix, dim=1), first[:, None] + self.weights["timesteps_embeddings"])
        return torch.stack([self.linear(x[:, i], f"channel_heads.{i}") for i in range(num_channels)], dim=1)

    # ------------------------------------------------------------------------------------------ sampler

    def sampling_step(
        self,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor | None,
        orders: Tensor,
        step: int,
        arguments: SampleArguments,
        uniforms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one iteration.

        Args:
            tokens: [B, L, C] before the iteration.
            mask: [B, L] float, 1 at positions that are still masked.
            labels: [B]; None for no class.
            orders: [B, L]; an order is consumed from its end.
            step: number of the iteration, from 0.
            arguments: of the sampler.
            uniforms: [B, L, C] random numbers that decide the tokens, in generation order; None at temperature 0.

        Returns:
            Tokens and mask after the iteration.
        """
        batch, length = mask.shape
        latents = self.decode(tokens)
        nobody = self.class_embedding(None, batch)
        z = self.context(latents, mask, self.class_embedding(labels, batch))
        without = self.context(latents, mask, nobody) if arguments.cfg != 1.0 else z

        cosine = math.floor(length * math.cos(math.pi / 2 * (step + 1) / arguments.num_iter))
        mask_len = torch.tensor([float(cosine)], device=mask.device)
        mask_len = mask_len.minimum(mask[0].sum() - 1).clamp(min=1)
        still = torch.zeros_like(mask).scatter(1, orders[:, : int(mask_len)], 1.0)  # int() waits for the device
        predicted = mask.bool() if step == arguments.num_iter - 1 else mask.bool() ^ still.bool()
        where = predicted.nonzero(as_tuple=True)  # nonzero() waits for it too

        features = z[where]
        if arguments.cfg != 1.0:
            scale: Tensor | float = arguments.cfg
            if arguments.cfg_schedule == "linear":
                scale = 1 + (arguments.cfg - 1) * (length - mask_len) / length
            features = without[where] + scale * (features - without[where])
        chosen = self.sample_channels(features, self._picker(where, arguments, uniforms))
        tokens = tokens.clone()
        tokens[where] = chosen[:, torch.tensor(self.channel_order, device=chosen.device).argsort()]
        return tokens, still

    def _picker(self, where: tuple[Tensor, ...], arguments: SampleArguments, uniforms: Tensor | None) -> Pick:
        if arguments.temperature == 0:
            return greedy
        assert uniforms is not None, "a temperature needs random numbers"
        return draw(uniforms[where], arguments.temperature)

    def sample_tokens(
        self, labels: Tensor | None, orders: Tensor, arguments: SampleArguments, uniforms: Tensor | None = None
    ) -> Tensor:
        """Return tokens [B, L, C]; arguments as `sampling_step`."""
        tokens = torch.zeros(*orders.shape, self.config["vae_embed_dim"], dtype=torch.int64, device=orders.device)
        mask = torch.ones(orders.shape, device=orders.device)
        for step in range(arguments.num_iter):
            tokens, mask = self.sampling_step(tokens, mask, labels, orders, step, arguments, uniforms)
        return tokens


def reference_of(model: TokenBridge) -> Reference:
    """Return the reference path on the parameters of `model`, which it shares with the model."""
    c: Any = model.config
    parameters = dict(model.named_parameters())
    config = {
        "encoder_depth": c.encoder_depth,
        "decoder_depth": c.decoder_depth,
        "channel_depth": c.head_depth,
        "encoder_num_heads": c.num_heads,
        "decoder_num_heads": c.decoder_num_heads or c.num_heads,
        "channel_heads": c.head_num_heads,
        "norm_layer_eps": c.norm_eps,
        "buffer_size": c.num_buffer,
        "vae_embed_dim": c.num_channels,
        "quant_levels": c.num_levels,
        "quant_min": -c.value_range,
        "quant_max": c.value_range,
        "std_range": c.num_sigmas,
    }
    return make_reference(
        weights={name: parameters[mapping.name] for name, mapping in tokenbridge_layout(model).mappings.items()},
        config=config,
        channel_order=model.channel_order,
    )


def make_reference(
    weights: Mapping[str, Tensor],
    config: Mapping[str, Any],
    channel_order: tuple[int, ...] = OFFICIAL_CHANNEL_ORDER,
) -> Reference:
    """Return the reference path on `weights`, with the buffers that the official constructor makes."""
    device = next(iter(weights.values())).device
    causal = torch.full((config["vae_embed_dim"],) * 2, -math.inf, device=device).triu(1)
    values = reconstruction_values(config["quant_levels"], config["std_range"]).to(device)
    return Reference(weights, config, values, causal, channel_order)


def token_losses(
    model: TokenBridge, latents: Tensor, labels: Tensor, *, label_dropout: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses [N, C] of all masked positions' tokens, the mask [B, L], and the order [B, L] it comes from.

    This draws the same random numbers as `generator_loss`, in the same order.
    """
    reference = reference_of(model)
    batch, length = latents.shape[0], model.num_positions
    tokens = reference.encode(latents.flatten(2).transpose(1, 2))
    order = random_orders(batch, length)
    num_masked = training_mask_count(length)
    mask = torch.zeros(batch, length).scatter(1, order[:, :num_masked], 1.0)
    dropped = torch.rand(batch) < label_dropout
    embedding = torch.where(
        dropped[:, None], reference.class_embedding(None, batch), reference.class_embedding(labels, batch)
    )
    z = reference.context(reference.decode(tokens), mask, embedding)[mask.bool()]
    targets = tokens[mask.bool()][:, list(model.channel_order)]
    logits = reference.training_logits(z, targets)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), mask.bool(), order
