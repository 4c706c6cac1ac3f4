"""Floating-point operations that GIVT needs for one image."""

from __future__ import annotations

from functools import partial

from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling
from tokenbridge.utils.flop import count, placeholder, quadratic


def count_flop(model: GIVT, settings: GivtSampling) -> dict[str, float]:
    """Return the operations of one image, for a model on the meta device; the transformer is the only part.

    Every position attends to those before it, so the operations of the first n positions are quadratic in n. With
    guidance, the transformer runs twice. Each drawn vector is projected once, even that of the last position, whose
    projection is not used.
    """
    x, vector = placeholder(1, model.latent_proj.out_features), placeholder(1, model.num_channels)

    def first_positions(num: int) -> int:
        return sum(count(partial(model.next_logits, x, model.empty_cache(1), i)) for i in range(num))

    num_passes = 2 if settings.guidance_weight > 0 else 1
    length, project = model.num_positions, count(lambda: model.latent_proj(vector))
    return {"transformer": num_passes * quadratic(first_positions)(length) + length * project}
