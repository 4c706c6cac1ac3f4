"""The published checkpoint of GIVT's VAE."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tokenbridge.tokenizers.givt_vae import GivtVAE, ResBlock
from tokenbridge.weights.flax_files import load_into, load_tree
from tokenbridge.weights.official import Layout, ParamMapping


def givt_vae_layout(vae: GivtVAE) -> Layout:
    """Return how the official tensors map to the parameters; Flax counts the modules of a kind as they come."""
    mappings: dict[str, ParamMapping] = {}
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
                mappings |= _convolution_or_norm(*part)
    return Layout(mappings, "GivtVAE")


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


def _convolution_or_norm(theirs: str, ours: str, module: nn.Module) -> dict[str, ParamMapping]:
    shape = tuple(module.get_parameter("weight").shape)
    if isinstance(module, nn.Conv2d):
        out, width, height, length = shape
        mappings = {f"{theirs}/kernel": ParamMapping(f"{ours}.weight", (height, length, width, out), kernel=True)}
    else:
        mappings = {f"{theirs}/scale": ParamMapping(f"{ours}.weight", shape)}
    if module.bias is not None:
        mappings[f"{theirs}/bias"] = ParamMapping(f"{ours}.bias", (shape[0],))
    return mappings


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
    load_into(vae, tree, givt_vae_layout(vae), path)
    return vae


def create_givt_vae(**changes: Any) -> GivtVAE:
    """Build the published VAE, or one of other sizes, on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return GivtVAE(**changes).eval()
