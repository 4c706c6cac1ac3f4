"""The presets of MAR: its published models, with their sizes and settings."""

from __future__ import annotations

from typing import Any

from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.sampling import MarSampling
from tokenbridge.weights.published import OFFICIAL, Preset, SamplingRecipe, build_preset, find_preset


def _published(width: int, depth: int, num_heads: int, head_width: int, head_depth: int) -> dict[str, Any]:
    """Return the sizes of a published model; all published models share those that are not arguments."""
    return {
        "latent_size": 16,
        "num_channels": 16,
        "num_classes": 1000,
        "patch_size": 1,
        "width": width,
        "encoder_depth": depth,
        "decoder_depth": depth,
        "num_heads": num_heads,
        "num_buffer": 64,
        "head_width": head_width,
        "head_depth": head_depth,
        "norm_eps": 1e-6,
        "dropout": 0.1,
    }


def _sampling(guidance_scale: float) -> dict[str, SamplingRecipe]:
    """Return the settings of the published evaluations, with 256 iterations of 100 diffusion steps each."""
    guided = MarSampling(256, guidance_scale, "linear", temperature=1.0, num_diffusion_steps=100)
    plain = MarSampling(256, 1.0, "linear", temperature=0.95, num_diffusion_steps=100)
    return {OFFICIAL: SamplingRecipe(guided, _README), "unguided": SamplingRecipe(plain, _README)}


_README = "README.md of LTH14/mar at fe470ac, section Evaluation"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="mar-b",
            model=_published(width=768, depth=12, num_heads=12, head_width=1024, head_depth=6),
            num_parameters=207_924_768,
            official_name="mar_base",
            sampling=_sampling(2.9),
        ),
        Preset(
            name="mar-l",
            model=_published(width=1024, depth=16, num_heads=16, head_width=1280, head_depth=8),
            num_parameters=478_326_304,
            official_name="mar_large",
            sampling=_sampling(3.0),
        ),
        Preset(
            name="mar-h",
            model=_published(width=1280, depth=20, num_heads=16, head_width=1536, head_depth=12),
            num_parameters=942_403_104,
            official_name="mar_huge",
            sampling=_sampling(3.2),
        ),
    )
}


def create_mar(name: str, **changes: Any) -> MAR:
    """Build the model of a preset on the meta device, where it takes no memory, in evaluation mode.

    Args:
        name: our name of the preset, or the official one.
        changes: keyword arguments of `MAR` that replace those of the preset.

    Raises:
        UserError: no preset has this name.
    """
    return build_preset(MAR, find_preset(name, PRESETS), **changes)
