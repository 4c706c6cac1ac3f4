"""Floating-point operations that LlamaGen needs for one image."""

from __future__ import annotations

import torch

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.utils.flop import count, placeholder, quadratic


def count_flop(model: LlamaGen, settings: LlamaGenSampling) -> dict[str, float]:
    """Return the operations of one image, for a model on the meta device; the transformer is the only part.

    Every token attends to those before it, so the operations of the first n tokens are quadratic in n. For tokens with
    guidance (a scale above 1), the transformer runs twice.
    """
    label = placeholder(1, dtype=torch.int64)

    def first_tokens(num: int) -> int:
        return count(lambda: model.sample(label, lambda logits, _: logits.argmax(-1), num_tokens=num))

    length, num_guided = model.num_positions, 0
    if settings.guidance_scale > 1:
        num_guided = length if settings.num_guided is None else min(settings.num_guided, length)
    first = quadratic(first_tokens)
    return {"transformer": first(length) + first(num_guided)}
