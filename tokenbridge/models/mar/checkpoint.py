"""Published checkpoints of MAR."""

from __future__ import annotations

from pathlib import Path

from tokenbridge.models.mar.model import MAR
from tokenbridge.models.mar.presets import create_mar
from tokenbridge.weights.official import Layout, ParamMapping
from tokenbridge.weights.torch_files import load_checkpoint


def mar_layout(model: MAR) -> Layout:
    """Return the layout of the official model, whose head and output position embedding have names of their own."""

    def official(name: str) -> str:
        part, rest = name.split(".", 1)
        if part == "head":
            return f"diffloss.net.{rest}"
        return "diffusion_pos_embed_learned" if rest == "output_pos_embed" else rest

    mappings = {official(name): ParamMapping(name, tuple(value.shape)) for name, value in model.named_parameters()}
    return Layout(mappings, "MAR")


def load_mar(path: Path | str, name: str, *, ema: bool = True) -> MAR:
    """Load a published checkpoint of the preset `name`; the model is in evaluation mode.

    Args:
        path: `checkpoint-last.pth`, or the folder that holds it.
        ema: load the moving average of the weights, which the published evaluations used, and not the last weights.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged or lacks the weights; the message begins with the path.
        WrongStateError: the file holds another model.
    """
    model = create_mar(name)
    load_checkpoint(model, path, mar_layout(model), ema=ema)
    return model
