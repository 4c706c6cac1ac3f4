"""Operations of one image of GIVT."""

from __future__ import annotations

from functools import partial

from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling
from tokenbridge.utils.flop import count, placeholder, quadratic


def count_flop(model: GIVT, settings: GivtSampling) -> dict[str, float]:
    """Return the operations of one image, which are all of its transformer.

    Every position attends to those before it, so the operations of the first n positions are quadratic in n. Guidance
    runs the transformer twice. The drawn vectors are projected once, that of the last position too, which nothing
    follows.

    Args:
        model: on the meta device.
        settings: of the sampler.
    """
    x, vector = placeholder(1, model.latent_proj.out_features), placeholder(1, model.num_channels)

    def first_positions(num: int) -> int:
        return sum(count(partial(model.next_logits, x, model.empty_cache(1), i)) for i in range(num))

    num_passes = 2 if settings.guidance_weight > 0 else 1
    length, project = model.num_positions, count(lambda: model.latent_proj(vector))
    return {"transformer": num_passes * quadratic(first_positions)(length) + length * project}
