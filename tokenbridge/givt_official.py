"""GIVT's published parameters: their names, their files, their presets.

Source: google-research/big_vision at 0127fb6, models/proj/givt and configs/proj/givt. A parameter tree is a flat dict
here: names are the '/'-joined paths of the Flax tree. The transformer's blocks are published scanned (one array
for all blocks, stacked along axis 1, `decoder/EncDecBlock/...`); unrolled, a block has arrays of its own
(`decoder/EncDecBlock7/...`). `unroll` and `scan` are each other's inverse; places (`official.Place`) are of the
unrolled tree.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenbridge.givt import GIVT, GIVTBlock, GivtSamplingConfig
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
        if (twice := next((layer for layer in layers if layer in state), None)) is not None:
            raise ValueError(f"{twice} is there twice, scanned and unrolled.")
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
    width = model.pos_emb.shape[-1]
    split = (model.num_heads, width // model.num_heads)
    places = {
        "EmbedLabels/embedding": Place("class_emb.weight", tuple(model.class_emb.weight.shape)),
        **_dense("EmbedTargets", "latent_proj", model.latent_proj),
        "decoder/pos_emb": Place("pos_emb", tuple(model.pos_emb.shape)),
        "decoder/LayerNorm/scale": Place("norm.weight", (width,)),
        "decoder/LayerNorm/bias": Place("norm.bias", (width,)),
        **_dense("decoder/LogitsDense", "head", model.head),
    }
    for i, block in enumerate(model.blocks):
        assert isinstance(block, GIVTBlock)
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
    """Read a tree of arrays, by '/'-joined path, onto the CPU; nothing pickled is run.

    - .npz (the transformer). A file of parameters alone is taken whole; of one with an optimizer's state only what
      is under `params/` (or `opt/target/`, the older way) is read, as big_vision's `load_params` does.
    - Flax's msgpack (the VAE), taken whole. Arrays above 1 GiB, which Flax splits, are not put together.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged or neither of these, or arrays that are no numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    try:
        arrays = _read_npz(path) if zipfile.is_zipfile(path) else _read_msgpack(path)
    except ImportError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and msgpack have many ways to say that bytes are damaged
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"{path} ({size}) is damaged, or neither .npz nor msgpack of arrays ({error}).") from error
    return {name: _tensor(f"{path}: {name}", array) for name, array in arrays.items()}


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        prefixes = (p for p in ("params/", "opt/target/") if any(name.startswith(p) for name in file.files))
        prefix = next(prefixes, "")
        return {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}


def _read_msgpack(path: Path) -> dict[str, NDArray[Any]]:
    """Read a file of flax.serialization: nested maps, whose arrays are extensions of (shape, type, bytes)."""
    import msgpack

    def array(code: int, data: bytes) -> NDArray[Any]:
        if code not in (1, 3):  # an array, or a scalar of numpy
            raise ValueError(f"extension {code}")
        shape, dtype, content = msgpack.unpackb(data)
        return np.frombuffer(content, "V2" if dtype == "bfloat16" else dtype).reshape(shape)

    def flat(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, NDArray[Any]]]:
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{name}/")
            else:
                yield prefix + name, np.asarray(value)

    # No limits: the file is on this disk, and no number in it makes msgpack reserve more than it holds.
    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__}")
    return dict(flat(tree, ""))


def _tensor(where: str, array: NDArray[Any]) -> Tensor:
    """Return an array as a tensor; numpy knows bfloat16 as two bytes without a type."""
    if array.dtype.kind == "V" and array.dtype.itemsize == 2:
        return _tensor(where, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where} has the type {array.dtype}, which is no number.")
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def load_givt(path: Path | str, name: str = "givt-causal-256") -> GIVT:
    """Load a published transformer (`givt_imagenet_2012_causal_params.npz`), in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_tree`, `unroll` and `official.from_official`; the message begins with the path.
    """
    model = create_givt(name)
    _load(path, model, load_tree(path))
    return model


def load_givt_vae(path: Path | str, *, ema: bool = True) -> GivtVAE:
    """Load the published VAE (`vae_imagenet_2012_beta_5e-5_params`), in evaluation mode.

    Args:
        path: the published file, Flax's msgpack of a whole training state; or an .npz file of the VAE's parameters.
        ema: of a training state, take the moving average of the weights, as the published configuration does;
            otherwise the weights themselves.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `load_tree` and `official.from_official`; the message begins with the path.
    """
    vae, tree = create_givt_vae(), load_tree(path)
    if any(name.startswith(("ema_params/", "g_params/")) for name in tree):
        prefix = "ema_params/" if ema else "g_params/"
        # Names of the training code, without `cnn_` (cnn.py, load).
        tree = {"cnn_" + n.removeprefix(prefix): value for n, value in tree.items() if n.startswith(prefix)}
    _load(path, vae, tree)
    return vae


def _load(path: Path | str, module: nn.Module, tree: Mapping[str, Tensor]) -> None:
    try:
        state = unroll(tree)
        # Half precision is widened; integers stay, and are refused.
        load_official(module, {n: value.float() if value.is_floating_point() else value for n, value in state.items()})
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
