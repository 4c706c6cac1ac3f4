"""Folders saved by earlier layouts of the package, which must load for ever.

`saved_at_3c903de` was written by `TokenBridgePipeline.save_pretrained` at that commit, where all modules lay in one
folder. Its transformer and VAE are as `tokenbridge convert` wrote them; weights are random.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from tokenbridge import TokenBridge, TokenBridgePipeline
from tokenbridge.weights.diffusers import load_model

SAVED = Path(__file__).parent / "saved_at_3c903de"
# Images of classes 0 and 2 with seed 5, as the same commit made them from this folder.
IMAGES = [
    [[[0.5269379019737244, 0.48772552609443665], [0.5751053094863892, 0.5470277667045593]]],
    [[[0.5617331862449646, 0.43708041310310364], [0.5282487273216248, 0.5679399371147156]]],
]


def images_of(folder: Path) -> Any:
    pipeline = TokenBridgePipeline.from_pretrained(folder)
    return pipeline([0, 2], seed=5, output_type="pt").images


def test_an_old_pipeline_loads_and_makes_its_images() -> None:
    index = json.loads((SAVED / "model_index.json").read_text())
    assert index["transformer"] == ["tokenbridge.generator", "TokenBridge"]  # a module that is no more
    assert torch.allclose(images_of(SAVED), torch.tensor(IMAGES), atol=1e-5)


def test_old_model_folders_load() -> None:
    """What `tokenbridge convert` wrote: a folder for each model."""
    assert isinstance(load_model(TokenBridge, SAVED / "transformer"), TokenBridge)
    assert isinstance(load_model(AutoencoderKL, SAVED / "vae"), AutoencoderKL)


def test_saved_names_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    TokenBridgePipeline.from_pretrained(SAVED).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["tokenbridge", "TokenBridge"]
    assert torch.equal(images_of(tmp_path), images_of(SAVED))


@pytest.mark.parametrize("library", ["elsewhere.generator", "tokenbridges"])
def test_a_class_of_another_package_is_not_taken_for_ours(library: str, tmp_path: Path) -> None:
    """The control: names are mapped for this package alone."""
    folder = tmp_path / "saved"
    shutil.copytree(SAVED, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"][0] = library
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((ImportError, ValueError)):
        images_of(folder)
