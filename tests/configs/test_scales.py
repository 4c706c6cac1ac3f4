"""Every declared recipe builds, and does one step of its loss; nothing here trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tokenbridge.configs.scales import SCALES
from tokenbridge.configs.schema import Recipe, Scale
from tokenbridge.tokenizers.base import VQTokenizer
from tokenbridge.training import train as experiment
from tokenbridge.training.train import build

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
    options: dict[str, Any] = dict(recipe.loss)
    if recipe.is_generator:
        options["with_mirrored"] = scale.with_mirrored
    if recipe.kind == "llamagen":
        places = (2, recipe.model["latent_size"] ** 2)
        batch = {name: torch.randint(recipe.model["num_codes"], places) for name in ("tokens", "tokens_mirrored")}
        batch["label"] = labels
    elif recipe.is_generator:
        options["scaling"] = 1.0
        shape = (2, 2 * recipe.model["num_channels"], *[math.isqrt(model.num_positions)] * 2)
        batch = {**{name: torch.randn(shape) for name in ("moments", "moments_mirrored")}, "label": labels}
    else:
        images = torch.rand(2, scale.channels, scale.image_size, scale.image_size) * 2 - 1
        batch = {"images": images, "labels": labels}
    loss = experiment.step_of(recipe)(model, batch, **options)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_tokenizers_fit_the_generators(scale: Scale) -> None:
    """Latents and tokens of the scale's images have the shape that its generators take."""
    images = torch.zeros(1, scale.channels, scale.image_size, scale.image_size)
    autoencoder, vq = build(scale.recipe("vae")).eval(), VQTokenizer(build(scale.recipe("vq")))
    with torch.no_grad():
        _, channels, height, width = autoencoder.encode(images).latent_dist.mode().shape
    tokens = vq.encode(images)
    for recipe in scale.recipes:
        if recipe.is_generator:
            model = build(recipe)
            assert model.num_classes == len(scale.classes)
            if recipe.kind == "llamagen":
                assert recipe.model["num_codes"] == vq.num_codes
                assert tokens.shape == (1, model.latent_size, model.latent_size)
            else:
                assert recipe.model["num_channels"] == channels
                assert model.num_positions == height * width


@pytest.mark.parametrize("scale", SCALES.values(), ids=list(SCALES))
def test_the_systems_differ_in_nothing_but_the_system(scale: Scale) -> None:
    """Parameters within 10 % of TokenBridge's, and the same training: as many images, the same learning rate."""

    def num_parameters(recipe: Recipe) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build(recipe).parameters())

    tokenbridge = scale.recipe("tokenbridge-64")
    for name in ("mar", "givt", "llamagen"):
        recipe = scale.recipe(name)
        assert recipe.training == tokenbridge.training
        assert num_parameters(recipe) == pytest.approx(num_parameters(tokenbridge), rel=0.1)
