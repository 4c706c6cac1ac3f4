"""Checkpoints: as of MAR's format, with our own names."""

from __future__ import annotations

from pathlib import Path

from tokenbridge.weights.official import flat_layout
from tokenbridge.weights.published import build_preset
from tokenbridge.weights.torch_files import load_checkpoint

from .model import Gaussians
from .presets import PRESETS


def load_gaussians(path: Path, name: str) -> Gaussians:
    """Load a checkpoint of a preset, in evaluation mode."""
    model = build_preset(Gaussians, PRESETS[name])
    load_checkpoint(model, path, flat_layout(model), ema=False)
    return model
