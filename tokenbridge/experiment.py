"""Train, save and load the models of a scale, in the order they depend on one another.

A folder of models has one sub-folder per recipe, in diffusers' format: `config.json` and safetensors, half
precision on disk, float32 when loaded. A training run's checkpoint and loss curve go into
a run folder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from tokenbridge import provenance
from tokenbridge.classifier import Classifier, classifier_loss
from tokenbridge.data import load_images, pixels_to_images, to_pixels
from tokenbridge.files import replacing_folder, write_json
from tokenbridge.generator import TokenBridge, generator_loss
from tokenbridge.latents import cache_latents
from tokenbridge.orders import channel_order
from tokenbridge.tokenizers import autoencoder_loss, sample_posterior, vq_loss
from tokenbridge.training import train

if TYPE_CHECKING:
    from datasets import Dataset

    from tokenbridge.recipes import Recipe, Scale

MODEL_CLASSES: dict[str, Any] = {
    "autoencoder": AutoencoderKL,
    "vq": VQModel,
    "classifier": Classifier,
    "generator": TokenBridge,
}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def build(recipe: Recipe, **overrides: Any) -> Any:
    """Return the recipe's model, initialised from its training seed; `overrides` go to its class."""
    torch.manual_seed(recipe.training.seed)
    return MODEL_CLASSES[recipe.kind](**recipe.model, **overrides)


def load(recipe: Recipe, weights: Path | str) -> Any:
    """Load the recipe's model from a folder of models, float32, in evaluation mode.

    Raises:
        FileNotFoundError: the model is not there; the message says where it should be and how to make it.
    """
    folder = Path(weights) / recipe.name
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"The weights of {recipe.name!r} are missing: {folder / WEIGHTS_FILE} does not exist. "
            "Train them with `tokenbridge train`, or name the folder that holds them with --weights."
        )
    model_class: Any = MODEL_CLASSES[recipe.kind]
    return model_class.from_pretrained(folder, torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()


def save(model: Any, folder: Path | str) -> None:
    """Save a model in half precision as safetensors; the folder's files appear whole or not at all."""
    with replacing_folder(folder) as temporary:
        nn.Module.half(model).save_pretrained(temporary, safe_serialization=True)
    model.float()


def train_recipe(
    scale: Scale, name: str, *, weights: Path | str, runs: Path | str, show_progress: bool = True
) -> dict[str, Any]:
    """Train one model of a scale; save it to `weights/name` and its log to `runs/name`.

    A generator needs the scale's autoencoder in `weights`.

    Returns:
        The training log (see `training.train`).
    """
    recipe = scale.recipe(name)
    runs = Path(runs) / name
    if recipe.kind == "generator":
        dataset = latents_of(scale, weights, runs.parent / "latents")
        scaling = _autoencoder_scaling(scale, weights)
        num_channels = recipe.model["num_channels"]
        order = channel_order(recipe.channel_order, num_channels, _some_latents(dataset))
        model = build(recipe, channel_order=order)
        loss = functools.partial(_generator_step, scaling=scaling, with_mirrored=scale.with_mirrored, **recipe.loss)
    else:
        model = build(recipe)
        dataset = images_of(scale, "train")
        loss = functools.partial(_PIXEL_STEPS[recipe.kind], **recipe.loss)
    log = train(model, dataset, loss, recipe.training, runs, name=name, show_progress=show_progress)
    log |= {
        "recipe": {
            "model": recipe.model,
            "loss": recipe.loss,
            "channel_order": recipe.channel_order,
            "data": scale.data,
        },
        "command": provenance.command(),
        **provenance.commit(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }
    write_json(runs / "loss.json", log)
    if recipe.kind == "autoencoder":
        model.register_to_config(scaling_factor=_measure_scaling(model, dataset))
    save(model, Path(weights) / name)
    return log


def images_of(scale: Scale, split: str) -> Dataset:
    """Return a split as rows of `images` float32 [C, H, W] in [-1, 1] and `labels`."""

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        pixels = to_pixels(batch["image"], size=scale.image_size, channels=scale.channels)
        return {"images": pixels_to_images(pixels), "labels": torch.tensor(batch["label"])}

    return load_images(scale.data, split).with_transform(transform)


def latents_of(scale: Scale, weights: Path | str, folder: Path) -> Dataset:
    """Return the cached moments of the training images, encoded by the autoencoder in `weights`."""
    autoencoder = load(scale.recipe("vae"), weights)
    if torch.cuda.is_available():
        autoencoder.cuda()
    return cache_latents(
        autoencoder,
        load_images(scale.data, "train"),
        folder,
        image_size=scale.image_size,
        channels=scale.channels,
        with_mirrored=scale.with_mirrored,
    )


def _some_latents(dataset: Dataset) -> Tensor:
    """Return posterior samples [N, C, h, w] of at most 4,096 images, to measure the channel order on.

    Samples, not means: a channel that the autoencoder has shut is white noise to the generator.
    """
    torch.manual_seed(0)
    return sample_posterior(dataset.shuffle(seed=0)[: min(4096, len(dataset))]["moments"])


def _autoencoder_step(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    return autoencoder_loss(model, batch["images"], **options)


def _vq_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return vq_loss(model, batch["images"])


def _classifier_step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return classifier_loss(model, batch["images"], batch["labels"])


_PIXEL_STEPS: dict[str, Any] = {
    "autoencoder": _autoencoder_step,
    "vq": _vq_step,
    "classifier": _classifier_step,
}


def _generator_step(
    model: Any, batch: dict[str, Tensor], *, scaling: float, with_mirrored: bool, **options: Any
) -> Tensor:
    moments = batch["moments"]
    if with_mirrored:
        mirror = torch.rand(len(moments), 1, 1, 1, device=moments.device) < 0.5
        moments = torch.where(mirror, batch["moments_mirrored"], moments)
    return generator_loss(model, sample_posterior(moments) * scaling, batch["label"], **options)


def _autoencoder_scaling(scale: Scale, weights: Path | str) -> float:
    return float(load(scale.recipe("vae"), weights).config.scaling_factor)


@torch.inference_mode()
def _measure_scaling(autoencoder: Any, dataset: Dataset) -> float:
    """Return 1 / standard deviation of posterior samples over the training images (at most 4,096 of them)."""
    torch.manual_seed(0)
    device = next(autoencoder.parameters()).device
    batches = dataset.shuffle(seed=0).select(range(min(4096, len(dataset)))).iter(256)
    latents = [autoencoder.encode(batch["images"].to(device)).latent_dist.sample().cpu() for batch in batches]
    return round(1 / torch.cat(latents).std().item(), 4)
