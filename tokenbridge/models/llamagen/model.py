"""LlamaGen: a Llama-style GPT over the tokens of a VQ tokenizer, one position after another in raster order.

Official code: FoundationVision/LlamaGen at ce98ec4, autoregressive/models/gpt.py (the model), generate.py (sampling)
and autoregressive/sample/sample_c2i_ddp.py (the published settings). `tokenizers/llamagen_vq.py` is its tokenizer.

The sequence consists of the class embedding and the tokens of all positions except the last; element i predicts token
i. Sampling writes keys and values by index into a cache of static shape, and never waits for the device.

Shape letters: B batch, L positions, T tokens given, S sequence elements (1 + T), D width, H heads, G key/value
heads, E head width, V codes of the tokenizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from tokenbridge.models.draw import ChooseTokens
from tokenbridge.utils.errors import UserError


class Attention(nn.Module):
    """Causal self-attention with rotary position embedding; several query heads may share a key/value head."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, *, dropout: float) -> None:
        super().__init__()
        self.split = [num_heads, num_kv_heads, num_kv_heads]
        self.head_width = width // num_heads
        self.dropout = dropout
        self.wqkv = nn.Linear(width, sum(self.split) * self.head_width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: Tensor | None, place: int) -> Tensor:
        """Apply causal attention to x [B, S, D]; with a cache, x is one element [B, 1, D] (see `Block.forward`)."""
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2).split(self.split, dim=1)
        q, k = rotate(q, rotary), rotate(k, rotary)
        if cache is not None:
            cache[0, :, :, place] = k[:, :, 0]
            cache[1, :, :, place] = v[:, :, 0]
            k, v = cache[:, :, :, : place + 1]
        shared = self.split[0] != self.split[1]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=shared)
        return F.dropout(self.wo(x.transpose(1, 2).flatten(2)), self.dropout, self.training)


class FeedForward(nn.Module):
    """An MLP with a SwiGLU activation."""

    def __init__(self, width: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., D]."""
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block. Module names follow the official checkpoints."""

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, hidden: int, *, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = Attention(width, num_heads, num_kv_heads, dropout=dropout)
        self.ffn_norm = nn.RMSNorm(width, eps=norm_eps)
        self.feed_forward = FeedForward(width, hidden, dropout=dropout)

    def forward(self, x: Tensor, rotary: Tensor, cache: Tensor | None = None, place: int = 0) -> Tensor:
        """Apply the block to the sequence x [B, S, D], or with a cache to one element [B, 1, D].

        Args:
            x: the whole sequence; with a cache, only its element `place`.
            rotary: [S, E / 2, 2], the rows of `rotary_table` for the elements of x.
            cache: keys and values [2, B, G, L, E]. Slot `place` is written, and x attends to the slots up to it.
            place: index of the element in the sequence.
        """
        x = x + self.attention(self.attention_norm(x), rotary, cache, place)
        return x + self.feed_forward(self.ffn_norm(x))


class LlamaGen(ModelMixin, ConfigMixin):
    """Class-conditional generator of VQ tokens.

    Args:
        latent_size: height and width of the token grid; L = latent_size ** 2.
        num_codes: V.
        num_classes: number of class labels; the embedding table has one more row, which stands for "no class".
        width: D, a multiple of 4 * `num_heads`.
        num_heads: H.
        num_kv_heads: G, a divisor of H; None means H, as in all presets.
        hidden_factor: factor of the hidden width; see `hidden_width`.
        hidden_multiple: the hidden width is rounded up to a multiple of this.
        rotary_base: the slowest pair rotates by about 1 / rotary_base for each position.
        dropout: dropout of the embeddings and of both branches of a block, in training.
        num_zero_rows: number of zero rows at the start of the rotary table (official `cls_token_num`). The class is
            one element in any case, so a number above 1 shifts the grid; no published model has that.
    """

    @register_to_config
    def __init__(
        self,
        latent_size: int = 16,
        num_codes: int = 16384,
        num_classes: int = 1000,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | None = None,
        hidden_factor: float | None = None,
        hidden_multiple: int = 256,
        rotary_base: float = 10000.0,
        norm_eps: float = 1e-5,
        dropout: float = 0.1,
        num_zero_rows: int = 1,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if width % num_heads or num_heads % num_kv_heads:
            raise UserError(
                f"The width {width}, the number of heads {num_heads} and the number of key/value heads {num_kv_heads} "
                "must each be a multiple of the next."
            )
        if width // num_heads % 4:
            raise UserError(f"The head width {width // num_heads} is not a multiple of 4: rotary pairs need that.")
        self.num_classes = num_classes
        self.latent_size = latent_size
        self.cache_shape = (depth, 2, num_kv_heads, width // num_heads)
        self.rotary = (width // num_heads, float(rotary_base), num_zero_rows)
        self.dropout = dropout
        self.class_embedding = nn.Embedding(num_classes + 1, width)
        self.tok_embeddings = nn.Embedding(num_codes, width)
        hidden = hidden_width(width, hidden_factor, hidden_multiple)
        self.layers = nn.ModuleList(
            Block(width, num_heads, num_kv_heads, hidden, norm_eps=norm_eps, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.output = nn.Linear(width, num_codes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    @property
    def num_positions(self) -> int:
        """L, the number of positions of an image, each of which has one token."""
        return self.latent_size**2

    def rotary_rows(self) -> Tensor:
        """Return the rotary table [1 + L, E / 2, 2] in float32, even if the model has another type."""
        head_width, base, num_zero_rows = self.rotary
        return rotary_table(self.latent_size, head_width, base, num_zero_rows, device=self.device)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of the tokens 0 to T, teacher-forced.

        Args:
            tokens: [B, T], the first T tokens of each image, with T in 0 .. L - 1.
            labels: [B]; `num_classes` stands for "no class".

        Returns:
            Logits, float32 [B, 1 + T, V]; those at index i predict token i, given the tokens before it.
        """
        x = torch.cat([self.class_embedding(labels)[:, None], self.tok_embeddings(tokens)], dim=1)
        x = F.dropout(x, self.dropout, self.training)
        rotary = self.rotary_rows()[: x.shape[1]]
        for block in self.layers:
            x = block(x, rotary)
        return self.output(self.norm(x)).float()

    def sample(
        self,
        labels: Tensor,
        choose: ChooseTokens,
        *,
        guidance_scale: float = 1.0,
        num_guided: int | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Generate tokens [B, num_tokens] int64 one after another, with a key/value cache of static shape.

        Args:
            labels: [B].
            choose: chooses tokens [B] from guided logits [B, V] and the position.
            guidance_scale: see `LlamaGenSampling`.
            num_guided: see `LlamaGenSampling`.
            num_tokens: number of tokens to generate; all L if None.
        """
        batch, length = len(labels), self.num_positions if num_tokens is None else num_tokens
        # Quirk kept: a scale below 1 turns guidance off too (generate.py tests for > 1).
        num_guided = 0 if guidance_scale <= 1 else length if num_guided is None else num_guided
        if num_guided > 0:
            labels = torch.cat([labels, torch.full_like(labels, self.num_classes)])  # conditional half first
        depth, pair, heads, head_width = self.cache_shape
        x, rotary = self.class_embedding(labels), self.rotary_rows()
        caches = x.new_empty(depth, pair, len(labels), heads, length, head_width)
        tokens = torch.empty(batch, length, dtype=torch.int64, device=x.device)
        for place in range(length):
            if place == num_guided:  # the unconditional half is not used from here on
                x, caches = x[:batch], caches[:, :, :batch]
            x = x[:, None]
            for block, cache in zip(self.layers, caches, strict=True):
                x = block(x, rotary[place : place + 1], cache, place)
            logits = self.output(self.norm(x[:, 0])).float()
            if place < num_guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + (conditional - unconditional) * guidance_scale
            tokens[:, place] = choose(logits, place)
            x = self.tok_embeddings(tokens[:, place])
            if place < num_guided:
                x = x.repeat(2, 1)
        return tokens


def hidden_width(width: int, factor: float | None = None, multiple: int = 256) -> int:
    """Return the hidden width of the SwiGLU: 8 D / 3 as an integer, times `factor`, rounded up to `multiple`."""
    hidden = int(8 * width / 3)
    if factor is not None:
        hidden = int(factor * hidden)
    return math.ceil(hidden / multiple) * multiple


def rotary_table(
    side: int, head_width: int, base: float = 10000.0, num_zero_rows: int = 1, *, device: Any = None
) -> Tensor:
    """Return cosines and sines of the 2-D rotary embedding, float32 [num_zero_rows + side ** 2, E / 2, 2].

    The first half of a head's pairs rotates with the row, and the second half with the column. The i-th pair of each
    half rotates by base ** (-4 i / E) for each position.

    Quirk kept: the class token's row is all zeros (gpt.py, `precompute_freqs_cis_2d`), although a rotation by 0 has
    cosine 1 and sine 0. The query and the key of the class token are therefore zero: it attends to itself with score
    0, and every later element gives it score 0, whatever the class is.
    """
    half = head_width // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2, device=device).float() / half)
    angles = torch.outer(torch.arange(side, device=device), frequencies)  # [side, E / 4]
    rows, columns = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return F.pad(torch.stack([grid.cos(), grid.sin()], dim=-1), (0, 0, 0, 0, num_zero_rows, 0))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of x [B, H, S, E] by the angles of `rotary` [S, E / 2, 2], in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotary.unbind(-1)
    return torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2).type_as(x)


def llamagen_loss(model: LlamaGen, tokens: Tensor, labels: Tensor, *, label_dropout: float = 0.1) -> Tensor:
    """Return the mean cross-entropy of all tokens, a scalar in nats per token.

    The dropped labels and the dropout masks are drawn from torch's global generator.

    Args:
        model: the model in training mode, in which it uses dropout.
        tokens: [B, L] in raster order.
        labels: [B].
        label_dropout: share of labels that are replaced by "no class", so that guidance works.
    """
    dropped = torch.rand(len(labels), device=labels.device) < label_dropout
    logits = model(tokens[:, :-1], torch.where(dropped, model.num_classes, labels))
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
