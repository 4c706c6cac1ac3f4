"""LlamaGen's sampler against a plain one.

The plain sampler has no cache: for every token it runs the whole prefix, in two passes for guidance. The ratios are
those of small models on one core, and say nothing of published sizes on a GPU. The longer the sequence, the more a
cache saves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import SideBySide
from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling, filter_logits, generate_tokens
from tokenbridge.models.noise import image_noise

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"latent_size": 4, "num_codes": 512, "num_classes": 10, "width": 112, "depth": 5, "num_heads": 4},
    "medium": {"latent_size": 12, "num_codes": 2048, "num_classes": 10, "width": 256, "depth": 4, "num_heads": 8},
}
CONFIG = LlamaGenSampling(guidance_scale=2.0, temperature=0.9, top_k=100, top_p=0.95)


def make_model(size: str) -> LlamaGen:
    """Return a model whose output layer, which is zero at initialisation, is drawn at random."""
    torch.manual_seed(0)
    model = LlamaGen(**SIZES[size])
    torch.nn.init.normal_(model.output.weight, std=0.2)
    return model.eval()


@torch.inference_mode()
def reference(model: LlamaGen, labels: Tensor, config: LlamaGenSampling, uniforms: Tensor) -> Tensor:
    """Generate tokens by the plain sampler, with the same parameters and random numbers."""
    tokens = torch.zeros(len(labels), 0, dtype=torch.int64)
    for place in range(model.num_positions):
        conditional = model(tokens, labels)[:, -1]
        unconditional = model(tokens, torch.full_like(labels, model.num_classes))[:, -1]
        guided = unconditional + config.guidance_scale * (conditional - unconditional)
        kept = filter_logits(guided / config.temperature, top_k=config.top_k, top_p=config.top_p)
        cumulative = kept.softmax(-1).cumsum(-1)
        chosen = (cumulative <= uniforms[:, place, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


@pytest.mark.parametrize(("size", "batch", "rounds"), [("tiny", 64, 5), ("medium", 1, 3)])
def test_generation(side_by_side: SideBySide, size: str, batch: int, rounds: int) -> None:
    model = make_model(size)
    labels = torch.arange(batch) % model.num_classes
    uniforms = image_noise(0, list(range(batch)), model.num_positions, 1).uniforms[..., 0]
    ours, theirs = (generate(model, labels, CONFIG, uniforms) for generate in (generate_tokens, reference))
    assert torch.equal(ours, theirs)
    name = f"LlamaGen, {size}, {batch} image{'s'[: batch > 1]} of {model.num_positions} tokens"
    side_by_side(
        name,
        lambda: generate_tokens(model, labels, CONFIG, uniforms),
        lambda: reference(model, labels, CONFIG, uniforms),
        rounds=rounds,
    )


def test_interval(side_by_side: SideBySide) -> None:
    """After the guidance interval the unconditional half is left out, which the official code runs to the end."""
    model = make_model("medium")
    labels = torch.arange(4)
    uniforms = image_noise(0, list(range(4)), model.num_positions, 1).uniforms[..., 0]
    config = LlamaGenSampling(guidance_scale=2.0, num_guided=36)
    whole = LlamaGenSampling(guidance_scale=2.0)
    side_by_side(
        "LlamaGen, medium, 4 images, guidance of 36 of 144 tokens against all",
        lambda: generate_tokens(model, labels, config, uniforms),
        lambda: generate_tokens(model, labels, whole, uniforms),
        rounds=3,
    )
