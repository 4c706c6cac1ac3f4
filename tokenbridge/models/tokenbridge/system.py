"""The entry of TokenBridge in the registry of systems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokenbridge.models.system import Evaluation, System
from tokenbridge.models.tokenbridge import orders
from tokenbridge.models.tokenbridge.checkpoint import load_tokenbridge, tokenbridge_layout
from tokenbridge.models.tokenbridge.cost import count_flop
from tokenbridge.models.tokenbridge.model import TokenBridge, generator_loss
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling, generate
from tokenbridge.tokenizers.published import KL16


def _measure(latents: Tensor, *, channel_order: str = "frequency") -> dict[str, Any]:
    return {"channel_order": orders.channel_order(channel_order, latents.shape[1], latents)}


def _describe_tokens(sizes: Mapping[str, Any]) -> tuple[int, str]:
    return sizes["latent_size"] ** 2 * sizes["num_channels"], f"one of {sizes['num_levels']} levels"


SYSTEM = System(
    name="tokenbridge",
    model=TokenBridge,
    settings=TokenBridgeSampling,
    generate=generate,
    to_latents=TokenBridge.to_latents,
    loss=generator_loss,
    measure=_measure,
    facts=lambda model: {"channel_order": list(model.channel_order)},
    presets=PRESETS,
    default_size="l",
    layout=tokenbridge_layout,
    load=load_tokenbridge,
    has_average=True,
    tokenizer=KL16,
    describe_tokens=_describe_tokens,
    count_flop=count_flop,
    has_official_noise=True,
    compiled_part="backbone",
    quick={"num_iterations": 2},
    evaluation=Evaluation(
        dtype="fp16",  # by autocast around generator and VAE (engine_tokenbridge.py)
        published="arXiv 2503.16430 v1, table 3",
    ),
)
