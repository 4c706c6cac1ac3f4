"""The preset of GIVT: its published model, with its sizes and settings."""

from __future__ import annotations

from typing import Any

import torch

from tokenbridge.models.givt.model import GIVT
from tokenbridge.models.givt.sampling import GivtSampling
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.published import OFFICIAL, Preset, SamplingRecipe

README = "configs/proj/givt/README.md of google-research/big_vision at 0127fb6"

PRESETS: dict[str, Preset] = {
    "givt-causal-256": Preset(
        name="givt-causal-256",
        # configs/proj/givt/givt_imagenet2012.py, model_size "default"
        model={
            "num_positions": 256,
            "num_channels": 16,
            "num_classes": 1000,
            "num_components": 16,
            "width": 1024,
            "depth": 24,
            "num_heads": 16,
            "mlp_width": 4096,
            "dropout": 0.2,
        },
        num_parameters=304_009_744,
        official_name="givt_causal_256",
        sampling={OFFICIAL: SamplingRecipe(GivtSampling(temperature=0.95, guidance_weight=0.4), README)},
    )
}


def create_givt(name: str, **changes: Any) -> GIVT:
    """Build the model of a preset on the meta device, where it takes no memory, in evaluation mode.

    Args:
        name: our name of the preset, or the official one.
        changes: keyword arguments of `GIVT` that replace those of the preset.

    Raises:
        UserError: no preset has this name.
    """
    preset = next((p for p in PRESETS.values() if name in (p.name, p.official_name)), None)
    if preset is None:
        raise UserError(f"Unknown preset {name!r}; there are {', '.join(PRESETS)}.")
    with torch.device("meta"):
        model = GIVT(**{**preset.model, **changes}).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if not changes and count != preset.num_parameters:
        raise UserError(f"{preset.name} has {count:,} parameters, not the expected {preset.num_parameters:,}.")
    return model
