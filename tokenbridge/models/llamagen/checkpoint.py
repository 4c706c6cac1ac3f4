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
    """Return how the official tensors map to the parameters; only one has another name here."""
    mappings = {
        name.replace("class_embedding.", "cls_embedding.embedding_table."): ParamMapping(name, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    return Layout(mappings, "LlamaGen")


def load_llamagen(path: Path | str, name: str) -> LlamaGen:
    """Load a published `c2i_*.pt`, in evaluation mode and in the file's own number type.

    The rotary table, `freqs_cis`, may be in the file or not (the official script has a line that drops it, commented
    out); one that is there must agree with ours. Everything else is strict, where the official script is not.

    Args:
        path: the file.
        name: of the preset. Without a rotary table, files for 256 and for 384 pixels look the same.

    Raises:
        MissingFileError: there is no such file.
        UserError: as `read_weights` and `load_state`; the message begins with the path.
    """
    model, state = create_model(name), read_weights(path)
    table = state.pop("freqs_cis", None)
    load_state(model, state, llamagen_layout(model), path)
    if table is not None:
        ours = model.rotary_rows()
        # The tolerance lets a table in bfloat16 through, which is off by up to 0.002.
        if table.shape != ours.shape or not torch.allclose(table.float(), ours, atol=1e-2):
            raise UserError(f"{path}: the rotary table (freqs_cis) is not that of {name}.")
    return model
