"""What the test files share: the golden cases, models with the goldens' weights, real latents."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from tokenbridge.generator import TokenBridge

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "reference_results" / "goldens"  # computed with the official code; README.md there
SHARED = ROOT.parent / "shared"

torch.set_num_threads(1)  # the models here are tiny, and test processes run side by side
settings.register_profile("tokenbridge", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tokenbridge")

TINY: dict[str, Any] = {
    "latent_size": 4,
    "num_channels": 4,
    "num_classes": 5,
    "num_levels": 8,
    "channel_order": (2, 0, 3, 1),
    "width": 32,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 2,
    "num_buffer": 2,
    "head_width": 32,
    "head_depth": 2,
    "head_num_heads": 2,
}
SMALL_VAE: dict[str, Any] = {
    "embed_dim": 4,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
    "resolution": 16,
}


def rule_weights(model: TokenBridge, salt: str) -> TokenBridge:
    """Give `model` the goldens' weights (shared/goldens/README.md), by official parameter names.

    Tests other than goldens use them too: at initialisation the adaLN projections are zero, and much of the
    head does nothing.
    """
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            name = path.split(".", 1)[1]  # ours has "backbone." or "head." before the official name
            random = np.random.RandomState(zlib.crc32(f"{salt}/{name}".encode()))
            x = random.standard_normal(tuple(parameter.shape)).astype(np.float32)
            if x.ndim >= 2:
                x = x / np.sqrt(np.prod(x.shape[1:])).astype(np.float32)
            elif name.endswith(("weight", "scale")):
                x = 1 + 0.1 * x
            else:
                x = 0.1 * x
            parameter.copy_(torch.from_numpy(x))
    model.eval()
    return model


def golden_model(config: dict[str, Any], salt: str) -> TokenBridge:
    """Build the model of an official constructor's keyword arguments, with the goldens' weights."""
    model = TokenBridge(
        latent_size=config["img_size"] // config["vae_stride"],
        num_channels=config["vae_embed_dim"],
        num_classes=config["class_num"],
        num_levels=config["quant_levels"],
        value_range=config["quant_max"],
        width=config["encoder_embed_dim"],
        encoder_depth=config["encoder_depth"],
        decoder_depth=config["decoder_depth"],
        num_heads=config["encoder_num_heads"],
        num_buffer=config["buffer_size"],
        head_width=config["channel_embed_dim"],
        head_depth=config["channel_depth"],
        head_num_heads=config["channel_heads"],
        norm_eps=1e-5,  # of the bare official class, which made the goldens; the presets have 1e-6
    )
    return rule_weights(model, salt)


def tiny_model(**changes: Any) -> TokenBridge:
    """Return a model of 16 positions, 4 channels and 8 levels, in evaluation mode."""
    return rule_weights(TokenBridge(**{**TINY, **changes}), "tiny")


@dataclass(frozen=True)
class Golden:
    """A golden case: what goes in, what the official code made of it, how close one must come."""

    meta: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def model(self) -> TokenBridge:
        return golden_model(self.meta["config"], self.meta["weights"]["salt"])

    def close(self, name: str, ours: Tensor) -> bool:
        """Tell whether `ours` is within the case's own tolerance: float32 sums in another order."""
        tolerance = self.meta["tolerance"]
        return torch.allclose(ours, self.outputs[name], atol=tolerance["atol"], rtol=tolerance["rtol"])

    def visible_and_masked(self) -> tuple[Tensor, Tensor]:
        """Return visible [B, n] and masked [B, L - n] positions of the case's mask, both rising."""
        mask = self.inputs["mask"]
        order = mask.argsort(dim=1, stable=True)
        num_visible = int((mask[0] == 0).sum())
        return order[:, :num_visible], order[:, num_visible:]


@cache
def load_golden(name: str) -> Golden:
    """Load shared/goldens/tokenbridge-`name`.npz, or skip the test."""
    path = GOLDENS / f"tokenbridge-{name}.npz"
    if not path.is_file():
        pytest.skip(f"golden case {path} is absent")
    with np.load(path) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))
    assert meta["format"] == 1
    inputs = {key[3:]: value for key, value in arrays.items() if key.startswith("in.")}
    outputs = {key[4:]: value for key, value in arrays.items() if key.startswith("out.")}
    return Golden(meta, inputs, outputs)


@pytest.fixture(scope="session")
def real_latents() -> Tensor:
    """KL latents of ten photographs [10, 32, 32, 32], float32, of unit standard deviation."""
    path = SHARED / "data" / "real_latents.npz"
    if not path.is_file():
        pytest.skip(f"real latents {path} are absent")
    latents = torch.from_numpy(np.load(path)["latents"]).float()
    return latents / latents.std()
