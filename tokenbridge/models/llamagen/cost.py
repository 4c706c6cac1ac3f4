"""Operations of one image of LlamaGen."""

from __future__ import annotations

import torch

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.utils.flop import count, placeholder, quadratic


def count_flop(model: LlamaGen, settings: LlamaGenSampling) -> dict[str, float]:
    """Return the operations of one image, which are all of its transformer.

    Every token attends to those before it, so the operations of the first n tokens are quadratic in n. Guidance
    (above 1) runs the transformer twice for the tokens that it is mixed into.

    Args:
        model: on the meta device.
        settings: of the sampler.
    """
    label = placeholder(1, dtype=torch.int64)

    def first_tokens(num: int) -> int:
        return count(lambda: model.sample(label, lambda logits, _: logits.argmax(-1), num_tokens=num))

    length, num_guided = model.num_positions, 0
    if settings.guidance_scale > 1:
        num_guided = length if settings.num_guided is None else min(settings.num_guided, length)
    first = quadratic(first_tokens)
    return {"transformer": first(length) + first(num_guided)}
