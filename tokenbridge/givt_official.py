"""GIVT's published parameters: their names, their files, their presets.

Source: google-research/big_vision at 0127fb6, models/proj/givt and configs/proj/givt. A parameter tree is a flat dict
here: names are the '/'-joined paths of the Flax tree. The transformer's blocks are published scanned (one array
for all blocks, stacked along axis 1, `decoder/EncDecBlock/...`); unrolled, a block has arrays of its own
(`decoder/EncDecBlock7/...`). `unroll` and `scan` are each other's inverse; places (`official.Place`) are of the
unrolled tree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenbridge.givt import GIVT, GivtSamplingConfig
from tokenbridge.givt_vae import GivtVAE, ResBlock
from tokenbridge.official import Place, State, load_official
from tokenbridge.presets import OFFICIAL, Preset, SamplingRecipe

# ----------------------------------------------------------------------------------------------------- names

SCANNED = "decoder/EncDecBlock/"
UNROLLED = re.compile(r"decoder/EncDecBlock(\d+)/(.+)")


def unroll(tree: Mapping[str, Tensor]) -> State:
    """Split scanned blocks (axis 1) into one array a block; an unrolled tree stays as it is.

    Raises:
        ValueError: a scanned array without that axis, or blocks that are there both ways.
    """
    state: State = {}
    for name, value in tree.items():
        if not name.startswith(SCANNED):
            layers = {name: value}
        elif value.ndim < 2:
            raise ValueError(f"{name} {list(value.shape)} has no axis 1, along which blocks are stacked.")
        else:
            rest = name.removeprefix(SCANNED)
            layers = {f"decoder/EncDecBlock{i}/{rest}": layer for i, layer in enumerate(value.unbind(1))}
        if twice := sorted(set(layers) & set(state)):
            raise ValueError(f"{twice[0]} is there twice, scanned and unrolled.")
        state |= layers
    return state


def scan(tree: Mapping[str, Tensor]) -> State:
    """Stack the blocks of an unrolled tree along axis 1; the inverse of `unroll`."""
    state: State = {}
    blocks: dict[str, dict[int, Tensor]] = {}
    for name, value in tree.items():
        if match := UNROLLED.fullmatch(name):
            blocks.setdefault(SCANNED + match[2], {})[int(match[1])] = value
        else:
            state[name] = value
    return state | {name: torch.stack([layers[i] for i in range(len(layers))], 1) for name, layers in blocks.items()}


def givt_layout(model: GIVT) -> dict[str, Place]:
    """Return the places of a GIVT's unrolled parameters."""
    width, num_heads = model.pos_emb.shape[-1], model.blocks[0].attn.num_heads
    split = (num_heads, width // num_heads)
    places = {
        "EmbedLabels/embedding": Place("class_emb.weight", tuple(model.class_emb.weight.shape)),
        **_dense("EmbedTargets", "latent_proj", model.latent_proj),
        "decoder/pos_emb": Place("pos_emb", tuple(model.pos_emb.shape)),
        "decoder/LayerNorm/scale": Place("norm.weight", (width,)),
        "decoder/LayerNorm/bias": Place("norm.bias", (width,)),
        **_dense("decoder/LogitsDense", "head", model.head),
    }
    for i, block in enumerate(model.blocks):
        theirs, ours = f"decoder/EncDecBlock{i}", f"blocks.{i}"
        # There is no LayerNorm2: it stands before the attention to an encoder.
        places[f"{theirs}/LayerNorm1/scale"] = Place(f"{ours}.norm1.weight", (width,))
        places[f"{theirs}/LayerNorm3/scale"] = Place(f"{ours}.norm2.weight", (width,))
        for part, name in enumerate(("query", "key", "value")):
            place = Place(f"{ours}.attn.qkv.weight", (width, *split), kernel=True, part=(part, 3))
            places[f"{theirs}/SelfAttn/{name}/kernel"] = place
        places[f"{theirs}/SelfAttn/out/kernel"] = Place(f"{ours}.attn.proj.weight", (*split, width), kernel=True)
        places |= _dense(f"{theirs}/MLP/Dense_0", f"{ours}.fc1", block.fc1)
        places |= _dense(f"{theirs}/MLP/Dense_1", f"{ours}.fc2", block.fc2)
    return places


def givt_vae_layout(vae: GivtVAE) -> dict[str, Place]:
    """Return the places of a GIVT VAE's parameters; Flax counts the modules of a kind as they come."""
    places: dict[str, Place] = {}
    for side in ("encoder", "decoder"):
        for theirs, ours, module in _numbered(f"cnn_{side}", side, vae.get_submodule(side)):
            if isinstance(module, ResBlock):
                # The projection of the branch is made last: Conv_2.
                parts = [*_numbered(theirs, f"{ours}.branch", module.branch)]
                if module.mix is not None:
                    parts.append((f"{theirs}/Conv_2", f"{ours}.mix", module.mix))
            else:
                parts = [(theirs, ours, module)]
            for part in parts:
                places |= _convolution_or_norm(*part)
    return places


def _numbered(theirs: str, ours: str, modules: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """Return the official name and ours of the modules with parameters in a sequence."""
    kinds: dict[type[nn.Module], str] = {nn.Conv2d: "Conv", nn.GroupNorm: "GroupNorm", ResBlock: "ResBlock"}
    counts: Counter[str] = Counter()
    named = []
    for name, module in modules.named_children():
        if (kind := kinds.get(type(module))) is not None:
            named.append((f"{theirs}/{kind}_{counts[kind]}", f"{ours}.{name}", module))
            counts[kind] += 1
    return named


def _convolution_or_norm(theirs: str, ours: str, module: nn.Module) -> dict[str, Place]:
    shape = tuple(module.get_parameter("weight").shape)
    if isinstance(module, nn.Conv2d):
        out, width, height, length = shape
        places = {f"{theirs}/kernel": Place(f"{ours}.weight", (height, length, width, out), kernel=True)}
    else:
        places = {f"{theirs}/scale": Place(f"{ours}.weight", shape)}
    if module.bias is not None:
        places[f"{theirs}/bias"] = Place(f"{ours}.bias", (shape[0],))
    return places


def _dense(theirs: str, ours: str, linear: nn.Linear) -> dict[str, Place]:
    return {
        f"{theirs}/kernel": Place(f"{ours}.weight", (linear.in_features, linear.out_features), kernel=True),
        f"{theirs}/bias": Place(f"{ours}.bias", (linear.out_features,)),
    }


# ----------------------------------------------------------------------------------------------------- files


def load_tree(path: Path | str) -> State:
    """Read the parameters of a big_vision .npz file, by '/'-joined path, onto the CPU; nothing pickled is run.

    A file of parameters alone is taken whole; of one with an optimizer's state only what is under `params/` (or
    `opt/target/`, the older way) is read, as big_vision's `load_params` does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged or no .npz file, or arrays that are no numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            prefixes = (p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in file.files))
            prefix = next(prefixes, "")
            arrays = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
    except Exception as error:  # zipfile, zlib and numpy have many ways to say that bytes are damaged
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"{path} ({size}) is damaged or no .npz file of arrays ({error}).") from error
    return {name: _tensor(f"{path}: {name}", array) for name, array in arrays.items()}


def _tensor(where: str, array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor; numpy's files have bfloat16 as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where} has the type {array.dtype}, which is no number.")
    return torch.from_numpy(array)


def load_givt(path: Path | str, name: str = "givt-causal-256") -> GIVT:
    """Load a published transformer (`givt_imagenet_2012_causal_params.npz`), in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_tree`, `unroll` and `official.from_official`; the message begins with the path.
    """
    model = create_givt(name)
    _load(path, model)
    return model


def load_givt_vae(path: Path | str) -> GivtVAE:
    """Load the VAE's parameters from an .npz file, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_tree` and `official.from_official`; the message begins with the path.
    """
    vae = create_givt_vae()
    _load(path, vae)
    return vae


def _load(path: Path | str, module: nn.Module) -> None:
    tree = load_tree(path)
    try:
        load_official(module, {name: value.float() for name, value in unroll(tree).items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# --------------------------------------------------------------------------------------------------- presets

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
        sampling={OFFICIAL: SamplingRecipe(GivtSamplingConfig(temperature=0.95, guidance_weight=0.4), README)},
        published={"FID": 3.35, "precision": 0.84, "recall": 0.53},  # no IS; FID as in the README
    )
}
VAE_NUM_PARAMETERS = 53_032_611  # encoder 23,660,192, decoder 29,372,419


def create_givt(name: str, **changes: Any) -> GIVT:
    """Build a preset on the meta device, in evaluation mode.

    Args:
        name: of the preset; the official names work too.
        changes: keyword arguments of `GIVT` that replace the preset's.

    Raises:
        ValueError: an unknown name, or a model whose parameter count is not the preset's (without `changes`).
    """
    preset = next((p for p in PRESETS.values() if name in (p.name, p.official_name)), None)
    if preset is None:
        raise ValueError(f"Unknown preset {name!r}; there are {', '.join(PRESETS)}.")
    with torch.device("meta"):
        model = GIVT(**{**preset.model, **changes}).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if not changes and count != preset.num_parameters:
        raise ValueError(f"{preset.name} has {count:,} parameters, not the expected {preset.num_parameters:,}.")
    return model


def create_givt_vae(**changes: Any) -> GivtVAE:
    """Build the published VAE, or one of other sizes, on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return GivtVAE(**changes).eval()
