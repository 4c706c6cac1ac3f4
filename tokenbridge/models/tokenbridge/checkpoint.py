"""Published checkpoints of TokenBridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS, create_model
from tokenbridge.tokenizers.quantizer import gaussian_bin_edges
from tokenbridge.weights.official import Layout, ParamMapping, State
from tokenbridge.weights.torch_files import load_checkpoint

BUFFER_TOLERANCE = 1e-4  # buffers carry float32 rounding of erf and exp, about 1e-5 at 64 levels; spacing is 1e-2


def official_buffers(model: TokenBridge) -> State:
    """Return the official model's three buffers, computed from our configuration.

    `channel_mask` [C, C] is causal: -inf above the diagonal. `reconstruction_values` [V] and `boundaries` [V + 1]
    are the quantiser's levels and bin edges in units of its Gaussian; the official code never uses the edges.
    """
    config: Any = model.config
    size = model.num_channels
    unit = float(config.num_sigmas) / float(config.value_range)
    return {
        "channel_mask": torch.full((size, size), float("-inf"), device="cpu").triu(1),
        "reconstruction_values": model.quantizer.codebook.cpu() * unit,
        "boundaries": gaussian_bin_edges(config.num_levels, num_sigmas=config.num_sigmas),
    }


def tokenbridge_layout(model: TokenBridge) -> Layout:
    """Return the layout of the official model: flat names, which are ours without `backbone.` or `head.`, and buffers.

    The channel order is a constant of the official code and not a part of its state: only models of that order mean
    the same there.
    """
    mappings: dict[str, ParamMapping] = {}
    for name, parameter in model.named_parameters():
        official = name.split(".", 1)[1]
        assert official not in mappings, "two parameters share an official name"
        mappings[official] = ParamMapping(name, tuple(parameter.shape))
    count = sum(parameter.numel() for parameter in model.parameters())
    name = next((preset.name for preset in PRESETS.values() if preset.num_parameters == count), "TokenBridge")
    return Layout(mappings, name, official_buffers(model), BUFFER_TOLERANCE)


def load_tokenbridge(path: Path | str, name: str, *, ema: bool = True) -> TokenBridge:
    """Load a published TokenBridge checkpoint, in evaluation mode.

    Args:
        path: `checkpoint-last.pth`, or the folder that holds it.
        name: of the preset.
        ema: see `read_checkpoint`.

    Raises:
        MissingFileError: there is no such file.
        UserError: as `load_checkpoint`; the message begins with the path.
    """
    model = create_model(name)
    load_checkpoint(model, path, tokenbridge_layout(model), ema=ema)
    return model
