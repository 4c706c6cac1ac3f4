"""Heads, which predict the tokens of a position's channels from the position's context vector.

- `ARHead` predicts one channel after another, each conditioned on the ones before (paper section 3.2;
  models/tokenbridge.py, `forward_channel_ar` and `_sample_channel_ar`).
- `ParallelHead` predicts all channels at once, each independently given the context (the paper's ablation, table 2a).

Both have the same transformer and differ in what it attends to. Tokens and logits are in generation order here;
`TokenBridge` permutes the channels.

Shape letters: N positions (of any image), C channels, V levels, D backbone width, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tokenbridge.models.draw import ChooseTokens
from tokenbridge.models.layers import ModulatedBlock, modulate
from tokenbridge.utils.errors import UserError

FirstElement = Literal["official", "training-consistent"]


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head."""

    num_channels: int = 16  # C
    num_levels: int = 64  # V
    context_width: int = 1024  # D
    width: int = 1024  # W
    depth: int = 4
    num_heads: int = 8
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    dropout: float = 0.1


class _ChannelTransformer(nn.Module):
    """The transformer that both heads share: condition, modulated blocks, and one output layer per channel."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        c, w = config, config.width
        self.num_channels = c.num_channels
        self.num_heads = c.num_heads
        self.condition_proj = nn.Linear(c.context_width, w)
        self.channel_embed = nn.Parameter(torch.randn(1, c.num_channels, w) * 0.02)
        self.timesteps_embeddings = nn.Parameter(torch.randn(1, c.num_channels, w) * 0.02)
        self.channel_blocks = nn.ModuleList(
            ModulatedBlock(w, c.num_heads, mlp_ratio=c.mlp_ratio, norm_eps=c.norm_eps, dropout=c.dropout)
            for _ in range(c.depth)
        )
        self.channel_norm = nn.LayerNorm(w, eps=c.norm_eps)
        self.channel_final = FinalLayer(w, norm_eps=c.norm_eps)
        self.channel_heads = nn.ModuleList(nn.Linear(w, c.num_levels) for _ in range(c.num_channels))

    def condition(self, context: Tensor) -> Tensor:
        """Return the condition [N, C, W] that modulates every channel, given the context [N, D]."""
        return self.condition_proj(context)[:, None] + self.timesteps_embeddings

    def run(self, x: Tensor, condition: Tensor, *, is_causal: bool) -> Tensor:
        """Return the logits [N, S, V] of the sequence x [N, S, W] under its condition [N, S, W]."""
        x = x + self.channel_embed[:, : x.shape[1]]
        for block in cast("list[ModulatedBlock]", list(self.channel_blocks)):
            x = block(x, block.adaLN_modulation(condition), is_causal=is_causal)
        x = self.channel_final(self.channel_norm(x), condition)
        elements = x.unbind(1)  # one backward for all; indexing would fill a gradient of x for each channel
        return torch.stack([out(e) for out, e in zip(self.channel_heads, elements, strict=True)], dim=1)


class FinalLayer(nn.Module):
    """A LayerNorm without weights, which the condition modulates."""

    def __init__(self, width: int, *, norm_eps: float) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=norm_eps, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Normalise and modulate x [N, S, W] under the condition [N, S, W]."""
        # Quirk kept: the official FinalLayer unpacks (scale, shift), where DiT has (shift, scale).
        scale, shift = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class ARHead(_ChannelTransformer):
    """The dimension-wise autoregressive head."""

    def __init__(self, config: HeadConfig) -> None:
        super().__init__(config)
        self.token_embeddings = nn.ModuleList(
            nn.Embedding(config.num_levels, config.width) for _ in range(config.num_channels - 1)
        )

    def logits(self, context: Tensor, tokens: Tensor, *, first: FirstElement = "training-consistent") -> Tensor:
        """Return the logits [N, C, V] of every channel, given the true tokens before it.

        Args:
            context: [N, D].
            tokens: [N, C] in generation order; the token of the last channel is not used.
            first: the first element of the sequence. Quirk kept: official training starts with the projected context
                (``"training-consistent"``), while official sampling adds timestep embedding 0 to it (``"official"``).
        """
        condition = self.condition(context)
        elements = [self._first(context, condition, first)]
        elements += [embed(tokens[:, i]) for i, embed in enumerate(self.token_embeddings)]
        return self.run(torch.stack(elements, dim=1), condition, is_causal=True)

    def sample(
        self, context: Tensor, choose: ChooseTokens, *, first: FirstElement = "official"
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens of one channel after another, with a key/value cache of static shape.

        One matrix product per block computes the modulation of all channels. After that, each channel costs one
        element of the sequence.

        Args:
            context: [N, D].
            choose: chooses tokens [N] from logits [N, V] and the channel's index in generation order.
            first: the first element of the sequence, see `logits`; the published weights were evaluated with
                ``"official"``.

        Returns:
            Tokens [N, C] int64 in generation order, and their log-probabilities [N, C] under the logits.
        """
        n, c = context.shape[0], self.num_channels
        condition = self.condition(context)
        blocks = cast("list[ModulatedBlock]", list(self.channel_blocks))
        modulations = [block.adaLN_modulation(condition) for block in blocks]
        scale, shift = self.channel_final.adaLN_modulation(condition).chunk(2, dim=-1)  # as in FinalLayer
        head_width = condition.shape[-1] // self.num_heads
        caches = condition.new_empty(len(blocks), 2, n, self.num_heads, c, head_width)
        tokens = torch.empty(n, c, dtype=torch.int64, device=context.device)
        log_probs = torch.empty(n, c, dtype=torch.float32, device=context.device)
        x = self._first(context, condition, first)
        for i in range(c):
            x = (x + self.channel_embed[0, i])[:, None]
            for block, modulation, (keys, values) in zip(blocks, modulations, caches, strict=True):
                x = block.forward_cached(x, modulation[:, i : i + 1], keys, values, i)
            x = modulate(self.channel_final.norm_final(self.channel_norm(x[:, 0])), shift[:, i], scale[:, i])
            logits = self.channel_heads[i](x)
            tokens[:, i] = choose(logits, i)
            log_probs[:, i] = _log_prob(logits, tokens[:, i])
            if i < c - 1:
                x = self.token_embeddings[i](tokens[:, i])
        return tokens, log_probs

    def _first(self, context: Tensor, condition: Tensor, first: FirstElement) -> Tensor:
        if first == "official":
            return condition[:, 0]
        if first == "training-consistent":
            return self.condition_proj(context)
        raise UserError(f"The head's first element is 'official' or 'training-consistent', not {first!r}.")


class ParallelHead(_ChannelTransformer):
    """A head that predicts all channels at once, independently given the context.

    Its sequence contains no tokens, and every element attends to all others.
    """

    def logits(self, context: Tensor, tokens: Tensor | None = None, *, first: FirstElement = "official") -> Tensor:
        """Return logits [N, C, V] for context [N, D]; `tokens` and `first` are ignored."""
        condition = self.condition(context)
        return self.run(condition, condition, is_causal=False)

    def sample(
        self, context: Tensor, choose: ChooseTokens, *, first: FirstElement = "official"
    ) -> tuple[Tensor, Tensor]:
        """Choose the tokens [N, C] of all channels independently; return them and their log-probabilities [N, C]."""
        logits = self.logits(context)
        tokens = torch.stack([choose(logits[:, i], i) for i in range(self.num_channels)], dim=1)
        return tokens, _log_prob(logits, tokens)


def _log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
