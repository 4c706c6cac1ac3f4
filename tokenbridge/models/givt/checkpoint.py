"""The published checkpoints of GIVT.

Source: google-research/big_vision at 0127fb6, models/proj/givt and configs/proj/givt. A parameter tree is a flat dict
here, whose names are the paths of the Flax tree joined with '/'. The published tree is scanned: the blocks of the
transformer share arrays, in which they are stacked along axis 1 (`decoder/EncDecBlock/...`). In an unrolled tree, each
block has arrays of its own (`decoder/EncDecBlock7/...`). `unroll` and `scan` convert between the two. The layout is
that of the unrolled tree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenbridge.models.givt.model import GIVT, GIVTBlock
from tokenbridge.models.givt.presets import create_givt
from tokenbridge.utils.errors import UserError
from tokenbridge.weights.flax_files import load_tree, read_tree
from tokenbridge.weights.official import Layout, ParamMapping, State

SCANNED = "decoder/EncDecBlock/"
UNROLLED = re.compile(r"decoder/EncDecBlock(\d+)/(.+)")


def givt_layout(model: GIVT) -> Layout:
    """Return the layout of the official parameter tree after unrolling."""
    width = model.pos_emb.shape[-1]
    split = (model.num_heads, width // model.num_heads)
    mappings = {
        "EmbedLabels/embedding": ParamMapping("class_emb.weight", tuple(model.class_emb.weight.shape)),
        **_dense("EmbedTargets", "latent_proj", model.latent_proj),
        "decoder/pos_emb": ParamMapping("pos_emb", tuple(model.pos_emb.shape)),
        "decoder/LayerNorm/scale": ParamMapping("norm.weight", (width,)),
        "decoder/LayerNorm/bias": ParamMapping("norm.bias", (width,)),
        **_dense("decoder/LogitsDense", "head", model.head),
    }
    for i, block in enumerate(model.blocks):
        assert isinstance(block, GIVTBlock)
        theirs, ours = f"decoder/EncDecBlock{i}", f"blocks.{i}"
        # LayerNorm2 is missing because it belongs to the attention to an encoder, which GIVT does not have.
        mappings[f"{theirs}/LayerNorm1/scale"] = ParamMapping(f"{ours}.norm1.weight", (width,))
        mappings[f"{theirs}/LayerNorm3/scale"] = ParamMapping(f"{ours}.norm2.weight", (width,))
        for part, name in enumerate(("query", "key", "value")):
            mapping = ParamMapping(f"{ours}.attn.qkv.weight", (width, *split), kernel=True, part=(part, 3))
            mappings[f"{theirs}/SelfAttn/{name}/kernel"] = mapping
        mappings[f"{theirs}/SelfAttn/out/kernel"] = ParamMapping(
            f"{ours}.attn.proj.weight", (*split, width), kernel=True
        )
        mappings |= _dense(f"{theirs}/MLP/Dense_0", f"{ours}.fc1", block.fc1)
        mappings |= _dense(f"{theirs}/MLP/Dense_1", f"{ours}.fc2", block.fc2)
    return Layout(mappings, "GIVT")


def _dense(theirs: str, ours: str, linear: nn.Linear) -> dict[str, ParamMapping]:
    return {
        f"{theirs}/kernel": ParamMapping(f"{ours}.weight", (linear.in_features, linear.out_features), kernel=True),
        f"{theirs}/bias": ParamMapping(f"{ours}.bias", (linear.out_features,)),
    }


def load_givt(path: Path | str, name: str = "givt-causal-256") -> GIVT:
    """Load a published transformer (`givt_imagenet_2012_causal_params.npz`); the model is in evaluation mode.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is damaged or does not hold a parameter tree; the message begins with the path.
        WrongStateError: the file holds another model.
    """
    model, tree = create_givt(name), read_tree(path)
    try:
        tree = unroll(tree)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    load_tree(model, tree, givt_layout(model), path)
    return model


def unroll(tree: Mapping[str, Tensor]) -> State:
    """Split the scanned arrays of a tree along axis 1 into one array for each block; other arrays stay as they are.

    Raises:
        UserError: a scanned array has no axis 1, or a block occurs both scanned and unrolled.
    """
    state: State = {}
    for name, value in tree.items():
        if not name.startswith(SCANNED):
            layers = {name: value}
        elif value.ndim < 2:
            raise UserError(f"{name} {list(value.shape)} has no axis 1, along which blocks are stacked.")
        else:
            rest = name.removeprefix(SCANNED)
            layers = {f"decoder/EncDecBlock{i}/{rest}": layer for i, layer in enumerate(value.unbind(1))}
        if (twice := next((layer for layer in layers if layer in state), None)) is not None:
            raise UserError(f"{twice} is there twice, scanned and unrolled.")
        state |= layers
    return state


def scan(tree: Mapping[str, Tensor]) -> State:
    """Stack the blocks of an unrolled tree along axis 1; this is the inverse of `unroll`."""
    state: State = {}
    blocks: dict[str, dict[int, Tensor]] = {}
    for name, value in tree.items():
        if match := UNROLLED.fullmatch(name):
            blocks.setdefault(SCANNED + match[2], {})[int(match[1])] = value
        else:
            state[name] = value
    return state | {name: torch.stack([layers[i] for i in range(len(layers))], 1) for name, layers in blocks.items()}
