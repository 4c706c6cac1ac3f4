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

# At 64 levels, float32 rounding of erf and exp changes the buffers by about 1e-5, while levels are 1e-2 apart.
BUFFER_TOLERANCE = 1e-4


def official_buffers(model: TokenBridge) -> State:
    """Return the three buffers of the official model, computed from our configuration.

    `channel_mask` [C, C] is causal, with -inf above the diagonal. `reconstruction_values` [V] and `boundaries` [V + 1]
    are the levels and the bin edges of the quantizer, in units of its Gaussian's deviation. The official code never
    uses the bin edges.
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
    """Return the layout of the official model: its names are ours without `backbone.` or `head.`, and it has buffers.

    The channel order is a constant of the official code and not part of its state, so the official code gives the
    same results only for models with that order.
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
    """Load a published checkpoint of the preset `name`; the model is in evaluation mode.

    Args:
        path: `checkpoint-last.pth`, or the folder that holds it.
        ema: load the moving average of the weights, which the published evaluations used, and not the last weights.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged or lacks the weights; the message begins with the path.
        WrongStateError: the file holds another model.
    """
    model = create_model(name)
    load_checkpoint(model, path, tokenbridge_layout(model), ema=ema)
    return model
