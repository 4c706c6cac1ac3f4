"""Published checkpoints of LlamaGen."""

from __future__ import annotations

from pathlib import Path

import torch

from tokenbridge.models.llamagen.model import LlamaGen
from tokenbridge.models.llamagen.presets import create_model
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.official import Layout, ParamMapping, load_state
from tokenbridge.weights.torch_files import read_weights


def llamagen_layout(model: LlamaGen) -> Layout:
    """Return the layout of the official model; only the class embedding has another name here."""
    mappings = {
        name.replace("class_embedding.", "cls_embedding.embedding_table."): ParamMapping(name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    return Layout(mappings, "LlamaGen")


def load_llamagen(path: Path | str, name: str) -> LlamaGen:
    """Load a published `c2i_*.pt`; the model is in evaluation mode and has the number type of the file.

    The file may hold the rotary table (`freqs_cis`), which must then agree with ours; the official script has a line
    that drops it, but the line is commented out. All other tensors are loaded strictly, which the official script does
    not do.

    Args:
        path: the file.
        name: name of the preset. It must be right, because files for 256 and for 384 pixels look the same if they hold
            no rotary table.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged, or its rotary table is another one; the message begins with the path.
        WrongStateError: the file holds another model.
    """
    model, state = create_model(name), read_weights(path)
    table = state.pop("freqs_cis", None)
    load_state(model, state, llamagen_layout(model), path)
    if table is not None:
        ours = model.rotary_rows()
        # The tolerance admits a table in bfloat16, whose values are off by up to 0.002.
        if table.shape != ours.shape or not torch.allclose(table.float(), ours, atol=1e-2):
            raise UserError(f"{path}: the rotary table (freqs_cis) is not that of {name}.")
    return model
