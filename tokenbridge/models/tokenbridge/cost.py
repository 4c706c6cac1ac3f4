"""Floating-point operations that TokenBridge needs for one image."""

from __future__ import annotations

from tokenbridge.models.cost import backbone_flop
from tokenbridge.models.masked_sampling import iterations
from tokenbridge.models.tokenbridge.heads import ARHead, ParallelHead
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.utils.flop import count, placeholder


def count_flop(model: TokenBridge, settings: TokenBridgeSampling) -> dict[str, float]:
    """Return the operations of one image by part (encoder, decoder, head), for a model on the meta device.

    Guidance mixes the decoder's features, so the head runs once for each position even with guidance. With the order
    by confidence, every iteration predicts all masked positions.
    """
    by_confidence = settings.position_order == "confidence"
    steps = iterations(settings, model.num_positions)
    num_predicted = sum(step.num_masked for step in steps) if by_confidence else model.num_positions
    backbone = backbone_flop(model.backbone, settings, asks_all_masked=by_confidence)
    return {**backbone, "head": num_predicted * count_head(model.head)}


def count_head(head: ARHead | ParallelHead) -> int:
    """Return the operations of a head on the meta device for all channels of one position."""
    context = placeholder(1, head.condition_proj.in_features)
    return count(lambda: head.sample(context, lambda logits, _: logits.argmax(-1)))
