"""Models for the benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from tokenbridge.configs.tiny import TINY
from tokenbridge.models.tokenbridge.model import TokenBridge

TINY_MODEL: dict[str, Any] = TINY.recipe("tokenbridge-64").model
MEDIUM_MODEL: dict[str, Any] = {
    **TINY_MODEL,
    "latent_size": 16,
    "width": 256,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "num_heads": 8,
    "num_buffer": 16,
    "head_width": 256,
    "head_depth": 2,
    "head_num_heads": 4,
}
MODELS = {"tiny": TINY_MODEL, "medium": MEDIUM_MODEL}


def make_model(size: str) -> TokenBridge:
    """Return a model in which every parameter matters.

    At initialisation the adaLN projections are zero, so the head's blocks have no effect, and any two ways to compute
    them would seem equal.
    """
    torch.manual_seed(0)
    model = TokenBridge(**MODELS[size])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()
