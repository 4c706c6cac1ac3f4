"""Discrepancies in TokenBridge's head: first element, final layer, cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tokenbridge.models.layers import ModulatedBlock
from tokenbridge.models.tokenbridge.heads import ARHead
from tokenbridge.reproduction.discrepancies.study import BATCH_SIZE, Arm, Study, row_of, rows_of, share, speed_up
from tokenbridge.results.schema import Row
from tokenbridge.results.score import ScoreName

if TYPE_CHECKING:
    from tokenbridge.models.draw import ChooseTokens
    from tokenbridge.models.tokenbridge.model import TokenBridge


def first_element(study: Study) -> list[Row]:
    """Compare two first elements of the head's sequence: sampling adds timestep embedding 0, training does not.

    Source: models/tokenbridge.py, `_sample_channel_ar` against `forward_channel_ar`.
    """
    official = study.score_samples(replace(study.config, first_element="official"))
    consistent = study.score_samples(replace(study.config, first_element="training-consistent"))
    return rows_of(
        "first-element",
        Arm("official", "condition + timestep embedding 0 (official sampling)", official),
        Arm("training", "condition alone (as in training)", consistent),
    )


def final_layer(study: Study) -> list[Row]:
    """Compare the order of the final layer's modulation: (scale, shift) in the code, (shift, scale) in DiT.

    The published weights are trained with the code's order. In DiT's order, scale and shift change places.
    """
    return rows_of(
        "final-layer",
        Arm("official", "scale, shift (official code)", study.base_scores),
        Arm("swapped", "shift, scale (DiT's order)", study.score_samples(study.config, model=swapped(study.model))),
    )


def swapped(model: TokenBridge) -> TokenBridge:
    """Return a copy of the model whose final layer uses the shift as the scale, and the scale as the shift."""
    model = copy.deepcopy(model)
    linear = model.head.channel_final.adaLN_modulation[1]
    for parameter in linear.parameters():
        parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
    return model


def head_cache(study: Study, *, num_positions: int = BATCH_SIZE, runs: int = 9) -> list[Row]:
    """Compare the head with and without key/value cache: the paper says it can have one, the code has none.

    Only the head is timed, for `num_positions` positions at once, one for each image of a batch, and for one position.
    """
    head = study.model.head
    assert isinstance(head, ARHead)
    generator = torch.Generator().manual_seed(study.seed)
    context = torch.randn(num_positions, study.model.config.width, generator=generator).to(study.bench.device)
    likeliest: ChooseTokens = lambda logits, place: logits.argmax(-1)  # noqa: E731

    def recomputed(context: Tensor) -> Tensor:
        return sample_without_cache(head, context, likeliest)

    def cached(context: Tensor) -> Tensor:
        return head.sample(context, likeliest)[0]

    with torch.inference_mode():
        differ = share(recomputed(context) != cached(context))
        speed_up_of_many = speed_up(lambda: recomputed(context), lambda: cached(context), runs)
        speed_up_of_one = speed_up(lambda: recomputed(context[:1]), lambda: cached(context[:1]), runs)
    return [
        row_of(
            f"head-cache-{name}",
            label,
            {"tokens that differ": d, "speed-up": many, str(ScoreName("speed-up", remark="one position")): one},
        )
        for name, label, d, many, one in (
            ("recomputed", "whole prefix for each channel (official code)", 0.0, 1.0, 1.0),
            ("cached", "key/value cache", differ, speed_up_of_many, speed_up_of_one),
        )
    ]


def sample_without_cache(head: ARHead, context: Tensor, choose: ChooseTokens) -> Tensor:
    """Return the tokens [N, C] of `ARHead.sample`, but run the whole prefix again for each channel.

    Source: models/tokenbridge.py, `_sample_channel_ar`.
    """
    condition = head.condition(context)  # [N, C, W]
    blocks = cast("list[ModulatedBlock]", list(head.channel_blocks))
    prefix, tokens = [condition[:, 0]], []
    for i in range(head.num_channels):
        x = torch.stack(prefix, dim=1) + head.channel_embed[:, : i + 1]
        for block in blocks:
            x = block(x, block.adaLN_modulation(condition[:, : i + 1]), is_causal=True)
        x = head.channel_final(head.channel_norm(x), condition[:, : i + 1])
        tokens.append(choose(head.channel_heads[i](x[:, i]), i))
        if i < head.num_channels - 1:
            prefix.append(head.token_embeddings[i](tokens[-1]))
    return torch.stack(tokens, dim=1)
