"""Files as the official code writes them, of models so small that tests can."""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, tiny_model
from diffusers import AutoencoderKL
from official_names import load_official, rule_state, to_official
from torch import Tensor, nn

from tokenbridge.evaluation.inception import write_random_inception
from tokenbridge.models.tokenbridge.checkpoint import official_buffers
from tokenbridge.models.tokenbridge.model import TokenBridge
from tokenbridge.models.tokenbridge.presets import PRESETS
from tokenbridge.models.tokenbridge.sampling import TokenBridgeSampling
from tokenbridge.tokenizers.kl16 import create_kl16
from tokenbridge.tokenizers.published import KL16, TOKENIZERS
from tokenbridge.weights.published import Preset, SamplingRecipe
from tokenbridge.weights.rule import RULE

SMALL_VAE: dict[str, Any] = {
    "embed_dim": 4,
    "ch": 32,
    "ch_mult": (1, 2),
    "num_res_blocks": 1,
    "attn_resolutions": (8,),
    "resolution": 16,
}


def empty_tiny(**changes: Any) -> TokenBridge:
    with torch.device("meta"):
        return TokenBridge(**{**TINY, **changes}).eval()


def small_vae() -> AutoencoderKL:
    vae = create_kl16(**SMALL_VAE)
    load_official(vae, rule_state(vae, {"rule": RULE, "salt": "official"}))
    return vae


def declare_small_models(monkeypatch: pytest.MonkeyPatch) -> str:
    """Let KL-16 be a small one; declare a preset of the tests' model, and return its name."""
    name = "tokenbridge-test"
    count = sum(p.numel() for p in empty_tiny().parameters())
    few, fewer = (TokenBridgeSampling(num_iterations=n, guidance_scale=2.0) for n in (4, 3))
    sampling = {"official": SamplingRecipe(few, "tests"), "paper": SamplingRecipe(fewer, "tests")}
    monkeypatch.setitem(PRESETS, name, Preset(name, TINY, count, sampling=sampling))
    small = functools.partial(create_kl16, **SMALL_VAE)
    monkeypatch.setattr("tokenbridge.tokenizers.kl16.create_kl16", small)
    monkeypatch.setitem(TOKENIZERS, KL16.key, replace(KL16, create=small))
    return name


def official_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in to_official(module).items()}


def write_checkpoint(path: Path, **changes: Any) -> Path:
    """Write a file as the official save_model does (util/misc.py): more in it than weights."""
    model = tiny_model()
    content = {
        "model": {
            name: value + 1 if value.is_floating_point() else value for name, value in official_state(model).items()
        },
        "model_ema": official_state(model),
        "optimizer": {
            "state": {0: {"step": 3, "exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        },
        "epoch": 399,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": argparse.Namespace(model="tokenbridge_large", quant_bits=6, device="cuda", resume=None),
        **changes,
    }
    # The buffers of "model" are not trained.
    content["model"] = {**content["model"], **official_buffers(model)}
    torch.save(content, path)
    return path


def write_kl16(path: Path, **changes: Any) -> Path:
    torch.save({"model": official_state(small_vae()), **changes}, path)
    return path


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def write_quick_inception(file: Path, seed: int = 0) -> None:
    """Write random weights most of whose features stay 0, so that eigenvalues take a second instead of ten."""
    write_random_inception(file, seed)
    weights = torch.load(file, weights_only=True)
    for branch in ("branch3x3_2a", "branch3x3_2b", "branch3x3dbl_3a", "branch3x3dbl_3b"):
        torch.nn.init.zeros_(weights[f"Mixed_7c.{branch}.bn.weight"])
    torch.save(weights, file)
