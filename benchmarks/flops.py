"""How many floating-point operations an image costs: the package's sampler, and the official one.

Matrix products only, two operations for each multiply-add, as torch.utils.flop_counter counts (it does so in the
tests, beside these formulas). Normalisations, activations and random numbers are left out: below one per cent.

Shape letters: L positions, C channels, V levels, R buffer tokens, K positions predicted, D and E decoder and encoder
width, W head width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from tokenbridge.generator import TokenBridge
from tokenbridge.orders import masked_counts


@dataclass(frozen=True)
class Cost:
    """FLOP by part of the model."""

    encoder: float = 0.0
    decoder: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """FLOP of all parts."""
        return self.encoder + self.decoder + self.head

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.encoder + other.encoder, self.decoder + other.decoder, self.head + other.head)


def _linear(num_tokens: int, inputs: int, outputs: int) -> float:
    return 2.0 * num_tokens * inputs * outputs


def _attention(num_queries: int, num_keys: int, width: int) -> float:
    return 4.0 * num_queries * num_keys * width


def _block(num_tokens: int, width: int, mlp_ratio: float) -> float:
    """Return the cost of a whole transformer block, each token attending to all."""
    hidden = int(width * mlp_ratio)
    linear = _linear(num_tokens, width, 4 * width) + 2 * _linear(num_tokens, width, hidden)
    return linear + _attention(num_tokens, num_tokens, width)


def fast_head(model: TokenBridge, num_positions: int) -> float:
    """Return the cost of the head with its cache, for the tokens of `num_positions`."""
    c: Any = model.config
    channels, w = c.num_channels, c.head_width
    hidden = int(w * c.mlp_ratio)
    modulation = _linear(channels, w, (6 * c.head_depth + 2) * w)
    elements = c.head_depth * (_linear(channels, w, 4 * w) + 2 * _linear(channels, w, hidden))
    attention = c.head_depth * sum(_attention(1, i + 1, w) for i in range(channels))
    out = _linear(channels, w, c.num_levels)
    condition = _linear(1, c.decoder_width or c.width, w)
    return num_positions * (condition + modulation + elements + attention + out)


def reference_head(model: TokenBridge, num_positions: int) -> float:
    """Return the cost of the head that runs the whole prefix, and its modulation, for every channel."""
    c: Any = model.config
    w = c.head_width
    total = _linear(1, c.decoder_width or c.width, w)
    for length in range(1, c.num_channels + 1):
        total += c.head_depth * (_block(length, w, c.mlp_ratio) + _linear(length, w, 6 * w))
        total += _linear(length, w, 2 * w) + _linear(1, w, c.num_levels)
    return num_positions * total


def fast_step(model: TokenBridge, num_masked: int, num_masked_after: int, *, guided: bool) -> Cost:
    """Return the cost of an iteration of `generate_tokens`, for an image."""
    c: Any = model.config
    e, d = c.width, c.decoder_width or c.width
    length = c.num_buffer + model.num_positions
    num_predicted = num_masked - num_masked_after
    hidden = int(d * c.mlp_ratio)
    last = _linear(length, d, 2 * d) + _linear(num_predicted, d, 2 * d) + 2 * _linear(num_predicted, d, hidden)
    last += _attention(num_predicted, length, d)
    num_encoded = c.num_buffer + model.num_positions - num_masked
    encoder = _linear(model.num_positions - num_masked, c.num_channels, e)
    encoder += c.encoder_depth * _block(num_encoded, e, c.mlp_ratio) + _linear(num_encoded, e, d)
    decoder = (c.decoder_depth - 1) * _block(length, d, c.mlp_ratio) + last
    passes = 2 if guided else 1
    return Cost(passes * encoder, passes * decoder, fast_head(model, num_predicted))


def reference_step(model: TokenBridge, num_masked: int, num_masked_after: int, *, guided: bool) -> Cost:
    """Return the cost of an iteration of the official sampler, for an image."""
    c: Any = model.config
    e, d = c.width, c.decoder_width or c.width
    num_encoded = c.num_buffer + model.num_positions - num_masked
    encoder = _linear(model.num_positions, c.num_channels, e)
    encoder += c.encoder_depth * _block(num_encoded, e, c.mlp_ratio) + _linear(num_encoded, e, d)
    decoder = c.decoder_depth * _block(c.num_buffer + model.num_positions, d, c.mlp_ratio)
    passes = 2 if guided else 1
    return Cost(passes * encoder, passes * decoder, reference_head(model, num_masked - num_masked_after))


def image_cost(model: TokenBridge, num_iterations: int, *, guided: bool, fast: bool) -> Cost:
    """Return the cost of a whole image, decoding of its latents not counted."""
    counts = [model.num_positions, *masked_counts(model.num_positions, num_iterations)]
    step = fast_step if fast else reference_step
    costs = (step(model, a, b, guided=guided) for a, b in itertools.pairwise(counts))
    return sum(costs, Cost())
