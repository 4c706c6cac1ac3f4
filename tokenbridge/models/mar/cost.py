"""Floating-point operations that MAR needs for one image."""

from __future__ import annotations

from tokenbridge.models.cost import backbone_flop
from tokenbridge.models.mar.diffusion import spaced_timesteps
from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.sampling import MarSampling
from tokenbridge.models.masked_sampling import iterations
from tokenbridge.utils.flop import count, placeholder


def count_flop(model: MAR, settings: MarSampling) -> dict[str, float]:
    """Return the operations of one image by part (encoder, decoder, head), for a model on the meta device.

    The head is counted as `DiffusionHead.sample` runs it. It embeds the timesteps once in each iteration for all
    positions (the official code embeds them for every position), embeds the context once for each position, and runs
    the residual blocks in every diffusion step. With guidance, it embeds the context and runs the blocks for both
    halves.
    """
    head, num_steps = model.head, len(spaced_timesteps(settings.num_diffusion_steps))
    context = placeholder(1, head.cond_embed.in_features)
    x, condition = placeholder(1, head.num_channels), placeholder(1, head.cond_embed.out_features)
    times = count(lambda: head.time_embed(placeholder(num_steps)))
    row = count(lambda: head.cond_embed(context)) + num_steps * count(lambda: head.denoise(x, condition))
    flop = 0.0
    for iteration in iterations(settings, model.num_positions):
        halves = 1 if iteration.guidance == 1 else 2
        flop += times + halves * (iteration.num_masked - iteration.still_masked) * row
    return {**backbone_flop(model.backbone, settings), "head": flop}
