"""The presets of TokenBridge: its published models and the tiny model of this project, with their settings.

Sizes and official settings: YuqingWang1029/TokenBridge at 3ede281, models/tokenbridge.py (`tokenbridge_base`,
`tokenbridge_large`, `tokenbridge_huge`) and README.md; the paper is arXiv 2503.16430 v1. Parameter counts were
counted with the official code, for 64 levels.
"""

from __future__ import annotations

from typing import Any

from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.weights.published import OFFICIAL, Preset, SamplingRecipe, build_preset, find_preset

PAPER = "paper"


def _published(width: int, depth: int, num_heads: int, head_width: int, head_depth: int) -> dict[str, Any]:
    """Return the sizes of a published model; all published models share those that are not arguments."""
    return {
        "latent_size": 16,
        "num_channels": 16,
        "num_classes": 1000,
        "num_levels": 64,
        "width": width,
        "encoder_depth": depth,
        "decoder_depth": depth,
        "num_heads": num_heads,
        "num_buffer": 64,
        "head_width": head_width,
        "head_depth": head_depth,
        "head_num_heads": 8,
        "norm_eps": 1e-6,
        "dropout": 0.1,
    }


def _sampling(guidance_scale: float, temperature: float, source: str) -> SamplingRecipe:
    """Return the settings of a published evaluation, which has 256 iterations and linear guidance."""
    return SamplingRecipe(
        TokenBridgeSampling(
            num_iterations=256,
            guidance_scale=guidance_scale,
            guidance_schedule="linear",
            temperature=temperature,
            first_element="official",
        ),
        source,
    )


_README = "README.md of YuqingWang1029/TokenBridge at 3ede281, section Evaluation"
_PAPER = "arXiv 2503.16430 v1, table 4 (temperature and guidance; it names no number of iterations)"
_TINY: dict[str, Any] = {
    "latent_size": 4,
    "num_channels": 16,
    "num_classes": 10,
    "num_levels": 64,
    "head_type": "ar",
    "width": 112,
    "encoder_depth": 2,
    "decoder_depth": 3,
    "num_heads": 4,
    "num_buffer": 4,
    "head_width": 64,
    "head_depth": 2,
    "head_num_heads": 2,
    "dropout": 0.0,
}
_TINY_SAMPLING = TokenBridgeSampling(
    num_iterations=16, guidance_scale=3.0, temperature=0.95, first_element="training-consistent"
)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="tokenbridge-b",
            model=_published(width=768, depth=12, num_heads=12, head_width=768, head_depth=4),
            num_parameters=218_024_704,
            official_name="tokenbridge_base",  # the official code has it, but no weights or settings were published
        ),
        Preset(
            name="tokenbridge-l",
            model=_published(width=1024, depth=16, num_heads=16, head_width=1024, head_depth=4),
            num_parameters=486_889_472,
            official_name="tokenbridge_large",
            sampling={OFFICIAL: _sampling(3.1, 0.96, _README), PAPER: _sampling(3.1, 0.97, _PAPER)},
        ),
        Preset(
            name="tokenbridge-h",
            model=_published(width=1280, depth=20, num_heads=16, head_width=1024, head_depth=6),
            num_parameters=910_040_576,
            official_name="tokenbridge_huge",
            sampling={OFFICIAL: _sampling(3.45, 0.91, _README), PAPER: _sampling(3.45, 0.91, _PAPER)},
        ),
        Preset(
            name="tokenbridge-tiny",
            model=_TINY,  # configs/tiny.py says how it is trained
            num_parameters=1_078_640,
            sampling={"tiny": SamplingRecipe(_TINY_SAMPLING, "this project")},
        ),
    )
}


def create_model(name: str, **changes: Any) -> TokenBridge:
    """Build the model of a preset on the meta device, where it takes no memory, in evaluation mode.

    Load weights with `load_state_dict(state, assign=True)`, which uses the tensors of `state` without copying them
    (`official.load_official` does this), or allocate memory with `to_empty`. The quantizer's codebook is not on the
    meta device and has its values from the start.

    Args:
        name: our name of the preset, or the official one.
        changes: keyword arguments of `TokenBridge` that replace those of the preset.

    Raises:
        UserError: no preset has this name.
    """
    return build_preset(TokenBridge, find_preset(name, PRESETS), **changes)
