"""The presets of LlamaGen: its published models, with their sizes and settings."""

from __future__ import annotations

from typing import Any

import torch

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.sampling import LlamaGenSampling
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.published import OFFICIAL, Preset, SamplingRecipe

SIZES: dict[str, dict[str, int]] = {
    "GPT-B": {"width": 768, "depth": 12, "num_heads": 12},
    "GPT-L": {"width": 1024, "depth": 24, "num_heads": 16},
    "GPT-XL": {"width": 1280, "depth": 36, "num_heads": 20},
    "GPT-XXL": {"width": 1536, "depth": 48, "num_heads": 24},
    "GPT-XXXL": {"width": 2560, "depth": 48, "num_heads": 40},
    "GPT-1B": {"width": 2048, "depth": 22, "num_heads": 32},
    "GPT-3B": {"width": 3200, "depth": 24, "num_heads": 32},
    "GPT-7B": {"width": 4096, "depth": 32, "num_heads": 32},
}
"""Sizes by official name (gpt.py, `GPT_models`). Those without a preset have no published class-conditional model."""

_COMMANDS = (
    "GETTING_STARTED.md of FoundationVision/LlamaGen at ce98ec4, section Sampling; defaults of sample_c2i_ddp.py "
    "otherwise (in bfloat16, 384 x 384 images scaled to 256 x 256)"
)
_ISSUE = (
    "issue 48 of FoundationVision/LlamaGen: a user's command; the repository names no guidance scale for this model"
)


def _preset(
    size: str,
    pixels: int,
    num_parameters: int,
    guidance_scale: float | None = None,
    source: str = _COMMANDS,
) -> Preset:
    """Return the preset of a size at a resolution; `guidance_scale` is None if no settings were published."""
    sampling = {}
    if guidance_scale is not None:
        sampling = {OFFICIAL: SamplingRecipe(LlamaGenSampling(guidance_scale=guidance_scale), source)}
    return Preset(
        name=f"llamagen-{size.lower()}-{pixels}",
        model={"latent_size": pixels // 16, "num_codes": 16384, "num_classes": 1000, **SIZES[f"GPT-{size}"]},
        num_parameters=num_parameters,
        official_name=f"GPT-{size}",
        sampling=sampling,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset("B", 256, 110_888_448, 2.0, _ISSUE),
        _preset("B", 384, 110_888_448, 2.0),
        _preset("L", 256, 342_910_976),
        _preset("L", 384, 342_910_976, 2.0),
        _preset("XL", 256, 774_699_520),
        _preset("XL", 384, 774_699_520, 1.75),
        _preset("XXL", 256, 1_410_972_672),
        _preset("XXL", 384, 1_410_972_672, 1.75),
        _preset("3B", 256, 3_096_659_200),
        _preset("3B", 384, 3_096_659_200, 1.65),
    )
}


def create_model(name: str, **changes: Any) -> LlamaGen:
    """Build the model of a preset on the meta device, where it takes no memory, in evaluation mode.

    Args:
        name: our name of the preset; the official names are those of several presets.
        changes: keyword arguments of `LlamaGen` that replace those of the preset.

    Raises:
        UserError: no preset has this name.
    """
    if name not in PRESETS:
        raise UserError(f"Unknown preset {name!r}; there are {', '.join(PRESETS)}.")
    with torch.device("meta"):
        return LlamaGen(**{**PRESETS[name].model, **changes}).eval()
