"""Building blocks that the backbone and the heads share.

Module names follow the official checkpoints (timm's Block), so that parameter names map one to one.
Shape letters: B batch, S sequence, D width, H heads, E head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenbridge.utils.errors import UserError


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values.

    With `qk_norm`, queries and keys are layer-normalised.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"Width {width} is not divisible by {num_heads} heads.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads, eps=norm_eps) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x [B, S, D] to queries, keys and values, each [B, H, S, E]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, S, 3, H, E]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        """Let queries q [B, H, S, E] attend to k, v [B, H, T, E], and project the result to [B, S, D]."""
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        return F.dropout(self.proj(x.transpose(1, 2).flatten(2)), dropout)

    def forward(self, x: Tensor, *, queries: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Apply self-attention to x [B, S, D]; if `queries` [B, K, D] are given, only they attend to x."""
        if queries is None:
            return self.attend(*self.heads(x), is_causal=is_causal)
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias  # rows: queries, keys, values
        q = F.linear(queries, weight[:width], bias[:width]).unflatten(-1, (self.num_heads, -1))
        kv = F.linear(x, weight[width:], bias[width:]).unflatten(-1, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(self.q_norm(q.transpose(1, 2)), self.k_norm(k), v)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to x [..., D]."""
        dropout = self.dropout if self.training else 0.0
        x = F.dropout(F.gelu(self.fc1(x)), dropout)
        return F.dropout(self.fc2(x), dropout)


class Block(nn.Module):
    """Pre-norm transformer block (timm's vision_transformer.Block)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout=dropout)

    def forward(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """Apply the block to x [B, S, D]; with `places` [B, K], compute only these elements, [B, K, D]."""
        normed = self.norm1(x)
        if places is None:
            x = x + self.attn(normed)
        else:
            x = take(x, places) + self.attn(normed, queries=take(normed, places))
        return x + self.mlp(self.norm2(x))


def take(x: Tensor, places: Tensor) -> Tensor:
    """Return the elements [B, K, ...] of x [B, S, ...] at the indices `places` [B, K] of the sequence."""
    index = places.view(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift normalised features (DiT's adaLN)."""
    return x * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """Transformer block whose norms and branches are modulated by a condition (adaLN-zero)."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qk_norm=True, norm_eps=norm_eps, dropout=dropout)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), dropout=dropout)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, modulation: Tensor, *, is_causal: bool) -> Tensor:
        """Apply the block to x [B, S, D] with modulation [B, S, 6D] = `adaLN_modulation(condition)`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), is_causal=is_causal)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def forward_cached(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor, place: int) -> Tensor:
        """Apply the block to one sequence element x [B, 1, D], and write slot `place` of its caches [B, H, S, E].

        The element attends to the slots up to and including `place`. The result is that of `forward` on the whole
        prefix.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        q, k, v = self.attn.heads(modulate(self.norm1(x), shift1, scale1))
        keys[:, :, place] = k[:, :, 0]
        values[:, :, place] = v[:, :, 0]
        x = x + gate1 * self.attn.attend(q, keys[:, :, : place + 1], values[:, :, : place + 1])
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


def initialise(module: nn.Module) -> None:
    """Initialise linear layers as the official code does: Xavier-uniform, and adaLN projections at zero.

    Embedding tables keep torch's N(0, 1), and learned vectors come from `learned`.
    """
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    for name, m in module.named_modules():
        if name.endswith("adaLN_modulation.1"):
            assert isinstance(m, nn.Linear)
            nn.init.zeros_(m.weight)


def learned(*shape: int) -> nn.Parameter:
    """Return a parameter that is drawn from a normal distribution with deviation 0.02."""
    return nn.Parameter(torch.randn(*shape) * 0.02)
