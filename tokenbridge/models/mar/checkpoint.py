"""Published checkpoints of MAR."""

from __future__ import annotations

from pathlib import Path

from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.presets import create_mar
from tokenbridge.weights.official import Layout, ParamMapping
from tokenbridge.weights.torch_files import load_checkpoint


def mar_layout(model: MAR) -> Layout:
    """Return how the official tensors map to the parameters."""

    def official(name: str) -> str:
        part, rest = name.split(".", 1)
        if part == "head":
            return f"diffloss.net.{rest}"
        return "diffusion_pos_embed_learned" if rest == "output_pos_embed" else rest

    mappings = {official(name): ParamMapping(name, tuple(value.shape)) for name, value in model.named_parameters()}
    return Layout(mappings, "MAR")


def load_mar(path: Path | str, name: str, *, ema: bool = True) -> MAR:
    """Load a published MAR checkpoint, in evaluation mode; as `load_tokenbridge`."""
    model = create_mar(name)
    load_checkpoint(model, path, mar_layout(model), ema=ema)
    return model
