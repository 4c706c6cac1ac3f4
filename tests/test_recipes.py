"""Every declared recipe builds, and does one step of its loss; nothing here trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenbridge import experiment
from tokenbridge.experiment import build
from tokenbridge.recipes import SCALES, Recipe, Scale

ALL = [
    pytest.param(scale, recipe, id=f"{scale.name}-{recipe.name}")
    for scale in SCALES.values()
    for recipe in scale.recipes
]


@pytest.mark.parametrize(("scale", "recipe"), ALL)
def test_one_step(scale: Scale, recipe: Recipe) -> None:
    model: Any = build(recipe).train()
    torch.manual_seed(0)
    labels = torch.arange(2)
    if recipe.kind == "generator":
        size, channels = recipe.model["latent_size"], recipe.model["num_channels"]
        batch = {name: torch.randn(2, 2 * channels, size, size) for name in ("moments", "moments_mirrored")}
        step = experiment._generator_step
        options: dict[str, Any] = {"scaling": 1.0, "with_mirrored": scale.with_mirrored, **recipe.loss}
        loss = step(model, {**batch, "label": labels}, **options)
    else:
        images = torch.rand(2, scale.channels, scale.image_size, scale.image_size) * 2 - 1
        loss = experiment._PIXEL_STEPS[recipe.kind](model, {"images": images, "labels": labels}, **recipe.loss)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_autoencoder_fits_the_generators(scale: Scale) -> None:
    """Latents of the scale's images have the shape that its generators take."""
    autoencoder = build(scale.recipe("vae")).eval()
    with torch.no_grad():
        images = torch.zeros(1, scale.channels, scale.image_size, scale.image_size)
        _, channels, height, width = autoencoder.encode(images).latent_dist.mode().shape
    for recipe in scale.recipes:
        if recipe.kind == "generator":
            assert (recipe.model["num_channels"], recipe.model["latent_size"]) == (channels, height)
            assert height == width
            assert recipe.model["num_classes"] == len(scale.classes)
