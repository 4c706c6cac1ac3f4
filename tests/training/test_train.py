"""The models of a scale: trained, saved, loaded, in the order in which they depend on one another."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from mini_scale import MINI, STEPS, TRAINED, World

from tokenbridge.training import train as experiment
from tokenbridge.training.train import build, load, train_recipe
from tokenbridge.utils.errors import UserError
from tokenbridge.utils.files import sha256_of
from tokenbridge.utils.locks import FolderInUseError, locked
from tokenbridge.weights.diffusers import WEIGHTS_FILE


def test_training_leaves_models_that_load(world: World) -> None:
    for name in TRAINED:
        files = sorted(path.name for path in (world.weights / name).iterdir())
        assert files == ["config.json", WEIGHTS_FILE]
        run_files = sorted(path.name for path in (world.root / "runs" / name).iterdir())
        assert run_files == ["checkpoint.pt", "loss.json", "loss.png"]
        assert world.logs[name]["loss"][-1][0] == 5
        model = load(MINI, name, world.weights)
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_saved_models_are_the_trained_ones_in_half_precision(world: World) -> None:
    for name in TRAINED:
        shadow = torch.load(world.root / "runs" / name / "checkpoint.pt", weights_only=True)["ema"]["shadow_params"]
        loaded = list(load(MINI, name, world.weights).parameters())
        assert len(loaded) == len(shadow)
        for ours, trained in zip(loaded, shadow, strict=True):
            assert torch.equal(ours, trained.half().float())


@pytest.mark.parametrize("gain", [None, 5.0])
def test_scaling_makes_latents_of_unit_variance(world: World, gain: float | None) -> None:
    """The untrained model's latents have nearly unit variance already, so they are also made larger."""
    vae = load(MINI, "vae", world.weights)
    factor = vae.config.scaling_factor
    dataset = experiment.images_of(MINI, "train")
    with torch.no_grad():
        if gain is not None:
            vae.quant_conv.weight[:4] *= gain  # the four channels of the mean
            factor = experiment._measure_scaling(vae, dataset)
            assert factor < 0.9
        torch.manual_seed(5)
        latents = vae.encode(dataset[:]["images"]).latent_dist.sample() * factor
    # 60 images of 64 latents: another draw of the posterior moves the deviation by 1 / sqrt(2 * 3840) = 1%.
    assert latents.std().item() == pytest.approx(1.0, abs=0.04)


def test_generator_has_the_measured_channel_order(world: World) -> None:
    order = json.loads((world.weights / "tokenbridge-64" / "config.json").read_text())["channel_order"]
    assert sorted(order) == [0, 1, 2, 3]
    assert tuple(order) == load(MINI, "tokenbridge-64", world.weights).channel_order


def test_training_again_gives_the_same_weights(world: World, tmp_path: Path) -> None:
    for name in TRAINED:
        train_recipe(MINI, name, weights=tmp_path / "weights", runs=tmp_path, show_progress=False)
        assert sha256_of(tmp_path / "weights" / name / WEIGHTS_FILE) == sha256_of(world.weights / name / WEIGHTS_FILE)


def test_initial_weights_come_from_the_seed() -> None:
    recipe = MINI.recipe("classifier")
    first, again = build(recipe), build(recipe)
    other = build(dataclasses.replace(recipe, training=dataclasses.replace(STEPS, seed=1)))
    assert torch.equal(first.to_logits.weight, again.to_logits.weight)
    assert not torch.equal(first.to_logits.weight, other.to_logits.weight)


def test_generator_without_autoencoder(world: World, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "weights" / "vae" / WEIGHTS_FILE))):
        train_recipe(MINI, "tokenbridge-64", weights=tmp_path / "weights", runs=tmp_path, show_progress=False)


def test_generator_follows_a_retrained_autoencoder(world: World, tmp_path: Path) -> None:
    """Cached latents belong to the autoencoder that made them: another one needs others."""
    changed = dataclasses.replace(MINI.recipe("vae"), training=dataclasses.replace(STEPS, seed=7))
    scale = dataclasses.replace(MINI, recipes=(changed, *MINI.recipes[1:]))
    for some, vae_runs in ((MINI, "a"), (scale, "b")):
        train_recipe(some, "vae", weights=tmp_path / "weights", runs=tmp_path / vae_runs, show_progress=False)
        table = experiment.latents_of(some, tmp_path / "weights", tmp_path / "latents")
        vae = load(some, "vae", tmp_path / "weights")
        with torch.no_grad():
            expected = vae.encode(experiment.images_of(some, "train")[:4]["images"]).latent_dist.parameters
        # Another batch size: float32 rounding of activations of order 1; two autoencoders differ by 1e-1.
        torch.testing.assert_close(table[:4]["moments"], expected, rtol=0, atol=1e-3)


def test_nothing_of_the_users_is_deleted(world: World, tmp_path: Path) -> None:
    """A folder with a file that training does not write is refused before the work, and a second run beside one too."""
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    (weights / "classifier").mkdir(parents=True)
    (weights / "classifier" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"classifier is not replaced, because it holds thesis\.tex"):
        train_recipe(MINI, "classifier", weights=weights, runs=runs)
    assert (weights / "classifier" / "thesis.tex").read_text() == "mine"
    with (
        locked(runs / "vq"),
        pytest.raises(FolderInUseError, match=rf"vq is in use by another run, process {os.getpid()}"),
    ):
        train_recipe(MINI, "vq", weights=weights, runs=runs)
